"""States of vocabulary shards: made from a part of the columns, merged by any device, finished into statistics.

    row_state      logits of a shard           -> state [STATE_FIELDS, N]
    merge_states   states [S, STATE_FIELDS, N] -> state [STATE_FIELDS, N]
    finish_state   state                       -> RowStatistics

`state.py` has the layout and the arithmetic. Merging is associative up to rounding; states merge in the order given.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from caop_kernels.backend import require
from caop_kernels.checks import assert_fields, assert_labels, contiguous, shared_columns
from caop_kernels.chunk_state import chunk_states
from caop_kernels.constants import SAVED_FIELDS, STATE_FIELDS, STATISTICS
from caop_kernels.launch import (
    MERGE_ROWS,
    backend_of,
    compiled_with,
    compute_type,
    current_device,
    merge_warps,
    scalings,
)
from caop_kernels.row_stats import RowStatistics, finish_kernel
from caop_kernels.state import ABSENT, LABEL_FIELD, empty_state, load_state, merge, store_state
from caop_kernels.tile import exponents, gather_logits, row_logits


@triton.jit
def join_labels(y, m, other_y, other_m, new_m):
    """The label's exponent relative to the common maximum, from whichever of two states holds the label."""
    y = tl.where(y < ABSENT, y + (m - new_m), y)
    other_y = tl.where(other_y < ABSENT, other_y + (other_m - new_m), other_y)
    return tl.where(other_y < ABSENT, other_y, y)


@triton.jit
def label_exponent(logits, label, valid, m, SOFTCAP: tl.constexpr):
    """u of the label, and ABSENT where it is not among the columns (nothing is read then)."""
    v = gather_logits(logits, label, valid, SOFTCAP)
    return tl.where(valid, exponents(v, logits.scale, m), ABSENT)


@triton.jit(do_not_specialize=["n_rows", "n_states"])
def merge_states_kernel(
    states_ptr,  # [n_states, FIELDS, n_rows]
    out_ptr,  # [STATE_FIELDS, n_rows]
    student_ptr,  # logits that the states were made of, None where the states hold the label's exponent
    teacher_ptr,
    labels_ptr,  # [n_rows] int64, or None
    student_stride,
    teacher_stride,
    n_rows,
    n_states,
    n_cols,
    scale_s: tl.float64,
    scale_t: tl.float64,
    inverse_cap_s: tl.float64,
    inverse_cap_t: tl.float64,
    ROWS: tl.constexpr,
    SOFTCAP_S: tl.constexpr,
    SOFTCAP_T: tl.constexpr,
    COMPUTE: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """One thread per row: merge the row's states in order."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = rows < n_rows
    n_rows = n_rows.to(tl.int64)
    zero = tl.zeros([ROWS], COMPUTE)
    state = empty_state(zero)
    y_s, y_t = zero + ABSENT, zero + ABSENT
    for i in tl.range(0, n_states):
        pointer = states_ptr + i * (FIELDS * n_rows) + rows
        other = load_state(pointer, n_rows, mask)
        union = merge(state, other)
        if FIELDS > LABEL_FIELD:
            other_y_s = tl.load(pointer + LABEL_FIELD * n_rows, mask=mask, other=1.0)
            other_y_t = tl.load(pointer + (LABEL_FIELD + 1) * n_rows, mask=mask, other=1.0)
            y_s = join_labels(y_s, state.m_s, other_y_s, other.m_s, union.m_s)
            y_t = join_labels(y_t, state.m_t, other_y_t, other.m_t, union.m_t)
        state = union
    if labels_ptr is not None:
        label = tl.load(labels_ptr + rows, mask=mask, other=-1)
        valid = mask & (label >= 0) & (label < n_cols)
        student = row_logits(student_ptr + rows * student_stride, scale_s, inverse_cap_s, COMPUTE)
        teacher = row_logits(teacher_ptr + rows * teacher_stride, scale_t, inverse_cap_t, COMPUTE)
        y_s = label_exponent(student, label, valid, state.m_s, SOFTCAP_S)
        y_t = label_exponent(teacher, label, valid, state.m_t, SOFTCAP_T)
    store_state(out_ptr + rows, n_rows, mask, state)
    tl.store(out_ptr + LABEL_FIELD * n_rows + rows, y_s, mask=mask)
    tl.store(out_ptr + (LABEL_FIELD + 1) * n_rows + rows, y_t, mask=mask)


def _merge(
    states: torch.Tensor,
    student_logits: torch.Tensor | None = None,
    teacher_logits: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    n_cols: int = 0,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> torch.Tensor:
    n_states, fields, n_rows = states.shape
    out = states.new_empty((STATE_FIELDS, n_rows))
    if n_rows == 0:
        return out
    with current_device(states.device):
        merge_states_kernel[(triton.cdiv(n_rows, MERGE_ROWS),)](
            states,
            out,
            student_logits,
            teacher_logits,
            labels,
            0 if student_logits is None else student_logits.stride(0),
            0 if teacher_logits is None else teacher_logits.stride(0),
            n_rows,
            n_states,
            n_cols,
            **scalings(temperature, student_softcap, teacher_softcap),
            ROWS=MERGE_ROWS,
            SOFTCAP_S=student_softcap is not None,
            SOFTCAP_T=teacher_softcap is not None,
            COMPUTE=compute_type(states.dtype),
            FIELDS=fields,
            **compiled_with(merge_warps(backend_of(states.device))),
        )
    return out


def row_state(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """The state [STATE_FIELDS, N] of a shard's logits [N, V_s] and [N, V_t]; arguments as in `row_statistics`.

    labels: [N] int64 relative to the shard's first column; a label that is not among its columns is another shard's.
    """
    n_rows, n_cols = shared_columns(student_logits, teacher_logits, vocab_size)
    assert_labels(labels, n_rows, student_logits.device)
    require(student_logits.device)
    double = torch.float64 in (student_logits.dtype, teacher_logits.dtype)
    dtype = torch.float64 if double else torch.float32
    if n_rows == 0:
        return student_logits.new_empty((STATE_FIELDS, 0), dtype=dtype)
    states = chunk_states(
        student_logits, teacher_logits, n_cols=n_cols, dtype=dtype, asked=STATISTICS,
        temperature=temperature, student_softcap=student_softcap, teacher_softcap=teacher_softcap,
    )  # fmt: skip
    return _merge(
        states, student_logits, teacher_logits, contiguous(labels), n_cols, temperature, student_softcap,
        teacher_softcap,
    )  # fmt: skip


def merge_states(states: torch.Tensor) -> torch.Tensor:
    """The state [STATE_FIELDS, N] of all columns, from those of disjoint shards, [S, STATE_FIELDS, N]."""
    require(states.device)
    states = states.contiguous()
    assert_fields(states, states.shape[0], STATE_FIELDS, states.shape[2])
    return _merge(states)


def finish_state(state: torch.Tensor, labels: torch.Tensor | None = None) -> RowStatistics:
    """The statistics of a state [STATE_FIELDS, N], and the saved statistics that its gradient needs.

    labels: [N] int64: log-probabilities are 0 where they are -100 and NaN where no shard held the label; None for none.
    """
    require(state.device)
    state, n_rows, labels = state.contiguous(), state.shape[1], contiguous(labels)
    assert_fields(state, STATE_FIELDS, n_rows)
    assert_labels(labels, n_rows, state.device)
    outputs: dict[str, torch.Tensor | None] = {name: state.new_empty(n_rows) for name in STATISTICS}
    if labels is None:
        outputs["student_logprob"] = outputs["teacher_logprob"] = None
    outputs["divergence"] = None
    outputs["saved_statistics"] = state.new_empty((SAVED_FIELDS, n_rows))
    if n_rows == 0:
        return RowStatistics(**outputs)
    with current_device(state.device):
        finish_kernel[(triton.cdiv(n_rows, MERGE_ROWS),)](
            state,
            None,
            None,
            labels,
            None,
            None,
            *outputs.values(),
            0,
            0,
            n_rows,
            1,
            0,
            **scalings(1.0, None, None),
            ROWS=MERGE_ROWS,
            SOFTCAP_S=False,
            SOFTCAP_T=False,
            TEACHER=True,
            FORWARD=True,
            REVERSE=True,
            COMPUTE=compute_type(state.dtype),
            FIELDS=STATE_FIELDS,
            **compiled_with(merge_warps(backend_of(state.device))),
        )
    return RowStatistics(**outputs)
