"""Row statistics of a student and a teacher from one read of both logits: the states of `chunk_state.py`, finished.

With a = softcap(z_s)/T, b = softcap(z_t)/T, p = softmax, all in nats, and the sums of `state.py`:

    log-ratio of the partition sums    lr  = log1p(d / z_t)  where |d| <= z_t / 2,  else  ln z_s - ln z_t
    forward KL(teacher || student)     fkl =  ln2 * c_t / z_t + lr
    reverse KL(student || teacher)     rkl = -ln2 * c_s / z_s - lr
    entropy                            H   = ln z - ln2 * a / z
    log-sum-exp                        lse = ln2 * (m + log2 z)
    log-probability of a label         a[y] - lse = ln2 * (u[y] - log2 z)

KLs are formed from paired differences, so their rounding error shrinks with the KL itself; what is left below zero is
rounding and is clamped, as are the entropies. NaN stays NaN.

Edge values: a column where both logits are -inf contributes 0. Forward KL is +inf where the student excludes a column
(-inf) that the teacher does not, reverse KL where the teacher excludes one that the student does not. A row that is
-inf throughout, or holds NaN or +inf, gives NaN in the statistics that involve that side, and in that row only. Logits
are expected within +-1e4. Beyond that: finite masks act like -inf wherever both sides use one, and a column where one
side lies 2^64 or more below the other counts as excluded; a side with no logit above -2^40 has no distribution (NaN).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from caop_kernels.backend import require
from caop_kernels.checks import assert_labels, assert_rows, contiguous, shared_columns
from caop_kernels.chunk_state import chunk_states
from caop_kernels.constants import SAVED_FIELDS, STATISTICS, STUDENT_STATISTICS
from caop_kernels.launch import (
    MERGE_ROWS,
    backend_of,
    compiled_with,
    compute_type,
    current_device,
    merge_warps,
    scalings,
)
from caop_kernels.masked_rows import live_rows, store_live
from caop_kernels.math import LN2, log1p
from caop_kernels.state import ABSENT, CHUNK_STATE_FIELDS, LABEL_FIELD, empty_state, load_state, merge
from caop_kernels.tile import IGNORE_INDEX, exponents, gather_logits, row_logits


class RowStatistics(NamedTuple):
    """Per-row statistics, each [N] in nats; float32, or float64 when an input is. None where not asked for.

    `student_logprob` and `teacher_logprob` are also None without labels.
    """

    forward_kl: torch.Tensor | None
    reverse_kl: torch.Tensor | None
    student_lse: torch.Tensor | None
    teacher_lse: torch.Tensor | None
    student_logprob: torch.Tensor | None
    teacher_logprob: torch.Tensor | None
    student_entropy: torch.Tensor | None
    teacher_entropy: torch.Tensor | None
    divergence: torch.Tensor | None
    """The KL that `beta` chose in each row."""
    saved_statistics: torch.Tensor | None
    """[SAVED_FIELDS, N]: what a gradient needs to rebuild probabilities to the last digits, also where lse is
    large: m_s, m_t (log2 units), z_s, z_t, lr, and the unclamped reverse KL (0 where that was not computed)."""


@triton.jit
def label_logprob(logits, label, valid, ignored, z, m, SOFTCAP: tl.constexpr):
    """ln2 * (u[label] - log2 z) per row; 0 where ignored, NaN where the label is out of range (and nothing is read)."""
    v = gather_logits(logits, label, valid, SOFTCAP)
    logprob = (exponents(v, logits.scale, m) - tl.log2(z)) * LN2
    return tl.where(ignored, 0.0, tl.where(valid, logprob, float("nan")))


@triton.jit
def held_logprob(u, z, ignored):
    """The same from the label's own exponent, which a shard's state holds; NaN where no shard held the label."""
    return tl.where(ignored, 0.0, tl.where(u < ABSENT, (u - tl.log2(z)) * LN2, float("nan")))


@triton.jit
def store_entropy(pointer, rows, z, a, live, mask):
    entropy = tl.log(z) - a / z * LN2
    store_live(pointer, rows, tl.where(entropy < 0, 0.0, entropy), live, mask)


@triton.jit(do_not_specialize=["n_rows", "n_states"])
def finish_kernel(
    states_ptr,  # [n_states, FIELDS, n_rows]
    student_ptr,  # both None with states of shards, which hold the label's exponent
    teacher_ptr,
    labels_ptr,  # [n_rows] int64 or None
    weights_ptr,  # [n_rows] or None: rows of weight 0 report 0, whatever their states hold
    beta_ptr,  # [n_rows] zeros and ones, or None
    forward_kl_ptr,  # [n_rows] each, or None where not asked for
    reverse_kl_ptr,
    student_lse_ptr,
    teacher_lse_ptr,
    student_logprob_ptr,
    teacher_logprob_ptr,
    student_entropy_ptr,
    teacher_entropy_ptr,
    divergence_ptr,
    saved_statistics_ptr,  # [SAVED_FIELDS, n_rows]
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
    TEACHER: tl.constexpr,  # False: no statistic that involves the teacher
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    COMPUTE: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """One thread per row: merge the row's states in order, then turn the sums into statistics."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = rows < n_rows
    n_rows = n_rows.to(tl.int64)
    live = live_rows(weights_ptr, rows, mask)

    zero = tl.zeros([ROWS], COMPUTE)
    state = empty_state(zero)
    for i in tl.range(0, n_states):
        state = merge(state, load_state(states_ptr + i * (FIELDS * n_rows) + rows, n_rows, live))
    m_s, m_t, z_s, z_t, d, a_s, a_t, c_t, c_s, s = state

    # A side without a single finite logit has no distribution: everything that involves it is NaN.
    z_s = tl.where(z_s > 0, z_s, float("nan"))
    if student_lse_ptr is not None:
        store_live(student_lse_ptr, rows, (m_s + tl.log2(z_s)) * LN2, live, mask)
    if student_entropy_ptr is not None:
        store_entropy(student_entropy_ptr, rows, z_s, a_s, live, mask)
    lr, reverse = zero, zero
    if TEACHER:
        z_t = tl.where(z_t > 0, z_t, float("nan"))
        if teacher_lse_ptr is not None:
            store_live(teacher_lse_ptr, rows, (m_t + tl.log2(z_t)) * LN2, live, mask)
        if teacher_entropy_ptr is not None:
            store_entropy(teacher_entropy_ptr, rows, z_t, a_t, live, mask)
        near = (tl.abs(d) <= 0.5 * z_t) & (z_s > 0)  # NaN logits may have left d finite
        lr = tl.where(near, log1p(tl.where(near, d / z_t, 0.0)), tl.log(z_s) - tl.log(z_t))
        both = s != s  # one side excludes a column, the other another (or NaN logits: then lr is NaN)
        if FORWARD:
            forward = tl.where(both | (s == float("inf")), float("inf"), c_t / z_t * LN2) + lr
            forward = tl.where(forward < 0, 0.0, forward)
            if forward_kl_ptr is not None:
                store_live(forward_kl_ptr, rows, forward, live, mask)
        if REVERSE:
            reverse = tl.where(both | (s == float("-inf")), float("inf"), -(c_s / z_s) * LN2) - lr
            clamped = tl.where(reverse < 0, 0.0, reverse)
            if reverse_kl_ptr is not None:
                store_live(reverse_kl_ptr, rows, clamped, live, mask)
        if divergence_ptr is not None:
            beta = tl.load(beta_ptr + rows, mask=mask, other=0.0)
            chosen = tl.where(beta == 0, forward, tl.where(beta == 1, clamped, float("nan")))
            store_live(divergence_ptr, rows, chosen, live, mask)
    else:
        z_t = zero + 1.0
    if saved_statistics_ptr is not None:
        store_live(saved_statistics_ptr, rows, m_s, live, mask)
        store_live(saved_statistics_ptr + n_rows, rows, m_t, live, mask)
        store_live(saved_statistics_ptr + 2 * n_rows, rows, z_s, live, mask)
        store_live(saved_statistics_ptr + 3 * n_rows, rows, z_t, live, mask)
        store_live(saved_statistics_ptr + 4 * n_rows, rows, lr, live, mask)
        store_live(saved_statistics_ptr + 5 * n_rows, rows, reverse, live, mask)
    if labels_ptr is not None:
        label = tl.load(labels_ptr + rows, mask=mask, other=IGNORE_INDEX)
        ignored = label == IGNORE_INDEX
        valid = live & (label >= 0) & (label < n_cols)
        if FIELDS > LABEL_FIELD:
            u = tl.load(states_ptr + LABEL_FIELD * n_rows + rows, mask=live, other=0.0)
            store_live(student_logprob_ptr, rows, held_logprob(u, z_s, ignored), live, mask)
            if TEACHER:
                u = tl.load(states_ptr + (LABEL_FIELD + 1) * n_rows + rows, mask=live, other=0.0)
                store_live(teacher_logprob_ptr, rows, held_logprob(u, z_t, ignored), live, mask)
        if student_ptr is not None and student_logprob_ptr is not None:
            student = row_logits(student_ptr + rows * student_stride, scale_s, inverse_cap_s, COMPUTE)
            logprob = label_logprob(student, label, valid, ignored, z_s, m_s, SOFTCAP_S)
            store_live(student_logprob_ptr, rows, logprob, live, mask)
        if teacher_ptr is not None and teacher_logprob_ptr is not None:
            teacher = row_logits(teacher_ptr + rows * teacher_stride, scale_t, inverse_cap_t, COMPUTE)
            logprob = label_logprob(teacher, label, valid, ignored, z_t, m_t, SOFTCAP_T)
            store_live(teacher_logprob_ptr, rows, logprob, live, mask)


def row_statistics(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    labels: torch.Tensor | None = None,
    *,
    beta: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    vocab_size: int | None = None,
    statistics: Collection[str] | None = None,
    saved_statistics: bool = False,
) -> RowStatistics:
    """Both KLs, log-sum-exps, entropies and label log-probabilities of each row, from one read of both logits.

    Args:
        student_logits: [N, V_s], float32, bfloat16, float16 or float64; unit column stride, any row stride.
        teacher_logits: [N, V_t], likewise; the dtypes may differ. None for the student's statistics alone.
        labels: [N] int64 of any stride, or None. -100 gives log-probability 0; any other value outside [0, V) gives NaN
            in that row and reads nothing.
        beta: [N] in the dtype of the statistics, 0 for the forward and 1 for the reverse KL of that row, anything else
            for NaN; fills `divergence`. Both KLs are computed then, stored only where asked for.
        weights: [N], or None. Rows of weight 0 are not read and report 0.
        temperature: > 0; logits are divided by it, after the softcap.
        student_softcap: c > 0 replaces z by c * tanh(z / c); None leaves z.
        teacher_softcap: likewise.
        vocab_size: compare the first `vocab_size` columns only. Required where V_s and V_t differ.
        statistics: names out of STATISTICS to compute, None for all there can be; the others are None and their work
            is compiled out.
        saved_statistics: also return what `gradient.distillation_coefficients` and `mixture.py` need.

    Returns:
        RowStatistics of [N] tensors in nats: float32, or float64 when an input is float64. Not differentiable.

    Raises:
        RuntimeError: where the kernels cannot run (`caop_kernels.available` gives the same reason).
    """
    n_rows, n_cols = shared_columns(student_logits, teacher_logits, vocab_size)
    assert_labels(labels, n_rows, student_logits.device)
    assert_rows(n_rows, student_logits.device, weights, beta)
    possible = STATISTICS if teacher_logits is not None else STUDENT_STATISTICS
    asked = set(possible if statistics is None else statistics)
    assert asked <= set(possible), asked
    assert beta is None or teacher_logits is not None
    require(student_logits.device)

    labels, weights, beta = contiguous(labels), contiguous(weights), contiguous(beta)
    double = torch.float64 in (student_logits.dtype, None if teacher_logits is None else teacher_logits.dtype)
    dtype = torch.float64 if double else torch.float32
    if labels is None:
        asked -= {"student_logprob", "teacher_logprob"}
    outputs = {name: student_logits.new_empty(n_rows, dtype=dtype) if name in asked else None for name in STATISTICS}
    outputs["divergence"] = None if beta is None else student_logits.new_empty(n_rows, dtype=dtype)
    outputs["saved_statistics"] = (
        student_logits.new_empty((SAVED_FIELDS, n_rows), dtype=dtype) if saved_statistics else None
    )
    if n_rows == 0 or not (asked or saved_statistics or beta is not None):
        return RowStatistics(**outputs)

    sums = (
        asked
        | ({"saved_statistics"} if saved_statistics else set())
        | ({"forward_kl", "reverse_kl"} if beta is not None else set())
    )
    states = chunk_states(
        student_logits, teacher_logits, n_cols=n_cols, dtype=dtype, asked=sums, weights=weights,
        temperature=temperature, student_softcap=student_softcap, teacher_softcap=teacher_softcap,
    )  # fmt: skip
    with current_device(student_logits.device):
        finish_kernel[(triton.cdiv(n_rows, MERGE_ROWS),)](
            states,
            student_logits,
            teacher_logits,
            labels,
            weights,
            beta,
            *outputs.values(),
            student_logits.stride(0),
            0 if teacher_logits is None else teacher_logits.stride(0),
            n_rows,
            states.shape[0],
            n_cols,
            **scalings(temperature, student_softcap, teacher_softcap),
            ROWS=MERGE_ROWS,
            SOFTCAP_S=student_softcap is not None,
            SOFTCAP_T=teacher_softcap is not None,
            TEACHER=teacher_logits is not None,
            FORWARD="forward_kl" in sums,
            REVERSE="reverse_kl" in sums,
            COMPUTE=compute_type(dtype),
            FIELDS=CHUNK_STATE_FIELDS,
            **compiled_with(merge_warps(backend_of(student_logits.device))),
        )
    return RowStatistics(**outputs)
