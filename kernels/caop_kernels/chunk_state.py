"""The state of a chunk of columns of each row: the one read of both logits.

Program (row, chunk) reduces one fixed chunk of columns to a state of `state.py`. Every thread keeps an online state of
its own, in registers, and they are joined once at the end: the loop holds no barrier. No atomics: the bits of a row
depend on that row, its strides and its alignment.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from caop_kernels.launch import (
    CHUNK,
    RowLaunch,
    backend_of,
    compiled_with,
    compute_type,
    current_device,
    is_aligned,
    scalings,
    statistics_launch,
)
from caop_kernels.masked_rows import live_row
from caop_kernels.math import LN2
from caop_kernels.state import CHUNK_STATE_FIELDS, EXCLUDED, RowState, empty_state, join_threads, rebase, store_state
from caop_kernels.tile import Tile, by_thread, exponents, load_logits, row_logits, thread_max, thread_sum, tile_columns
from caop_kernels.tuning import chosen

# x of an excluded column is +-2^100; times this it overflows, while sums of ordinary x stay far from it.
SUPPORT_SCALE_32 = tl.constexpr(2.0**64)
SUPPORT_SCALE_64 = tl.constexpr(2.0**960)

# Where three terms of 2^r - 1 do: what they leave out, r^4, has one sign and would add up; it is 1e-8 at the ends.
NEAR = tl.constexpr(1 / 32)


class Asked(NamedTuple):
    """What is there to compute: compile-time values of device code."""

    softcap_s: tl.constexpr
    softcap_t: tl.constexpr
    teacher: tl.constexpr
    difference: tl.constexpr
    forward: tl.constexpr
    reverse: tl.constexpr
    entropy_s: tl.constexpr
    entropy_t: tl.constexpr


@triton.jit
def paired_difference(difference, product, r):
    """e_s - e_t in float32 without the errors of two exponentials, which would be of first order in a divergence of
    second: e_t (2^r - 1) from e_t r where |r| <= NEAR; likewise e_s (1 - 2^r). `product` is -e_t r or e_s r."""
    if r.dtype != tl.float64:
        p = r * (-LN2 * LN2 * LN2 / 6.0) - LN2 * LN2 / 2.0
        difference = tl.where(tl.abs(r) <= NEAR, product * (p * r - LN2), difference)
    return difference


@triton.jit
def accumulate(
    state, student, teacher, columns, n_cols, TILE: tl.constexpr, ASKED: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Add one tile of columns [groups, threads * vector] to the states [threads], one per thread."""
    v_s = by_thread(load_logits(student, columns, n_cols, MASKED, ASKED.softcap_s), TILE)
    m_s = tl.maximum(state.m_s, thread_max(v_s) * student.scale)
    m_t = state.m_t
    if ASKED.teacher:
        v_t = by_thread(load_logits(teacher, columns, n_cols, MASKED, ASKED.softcap_t), TILE)
        m_t = tl.maximum(state.m_t, thread_max(v_t) * teacher.scale)
    _, _, z_s, z_t, d, a_s, a_t, c_t, c_s, s = rebase(state, m_s, m_t)

    # Exponentials before the clamp: 2^-inf is 0, and NaN gets through (maximum may drop it).
    u_s = exponents(v_s, student.scale, m_s[None, :, None])
    e_s = tl.exp2(u_s)
    z_s += thread_sum(e_s)
    u_s = tl.maximum(u_s, EXCLUDED)
    if ASKED.entropy_s:
        a_s += thread_sum(e_s * u_s)
    if ASKED.teacher:
        u_t = exponents(v_t, teacher.scale, m_t[None, :, None])
        e_t = tl.exp2(u_t)
        z_t += thread_sum(e_t)
        u_t = tl.maximum(u_t, EXCLUDED)
        if ASKED.entropy_t:
            a_t += thread_sum(e_t * u_t)
        x = u_t - u_s
        if ASKED.forward or ASKED.reverse:
            if x.dtype == tl.float64:
                s += thread_sum(x * SUPPORT_SCALE_64)
            else:
                s += thread_sum(x * SUPPORT_SCALE_32)
        difference = e_s - e_t
        if ASKED.forward:
            product = e_t * x
            c_t += thread_sum(product)
            difference = paired_difference(difference, product, -x)
        if ASKED.reverse:
            product = e_s * x
            c_s += thread_sum(product)
            if not ASKED.forward:
                difference = paired_difference(difference, product, x)
        if ASKED.difference:
            d += thread_sum(difference)
    return RowState(m_s, m_t, z_s, z_t, d, a_s, a_t, c_t, c_s, s)


@triton.jit(do_not_specialize=["n_rows"])
def chunk_state_kernel(
    student_ptr,  # [n_rows, >= n_cols], unit column stride
    teacher_ptr,  # likewise, or None: the teacher's fields stay empty
    weights_ptr,  # [n_rows], or None: a row of weight 0 is not read, and its state not written
    states_ptr,  # [chunks, CHUNK_STATE_FIELDS, n_rows], COMPUTE
    student_stride,
    teacher_stride,
    n_rows,
    n_cols,
    scale_s: tl.float64,  # log2(e) / T, times the cap where there is one
    scale_t: tl.float64,
    inverse_cap_s: tl.float64,
    inverse_cap_t: tl.float64,
    CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
    SOFTCAP_S: tl.constexpr,
    SOFTCAP_T: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    ENTROPY_S: tl.constexpr,
    ENTROPY_T: tl.constexpr,
    COMPUTE: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """Program (row, chunk): reduce one chunk of columns of one row to a state."""
    TILE: tl.constexpr = Tile(GROUPS, THREADS, VECTOR)
    COLUMNS: tl.constexpr = GROUPS * THREADS * VECTOR
    ASKED: tl.constexpr = Asked(
        SOFTCAP_S, SOFTCAP_T, teacher_ptr is not None, DIFFERENCE, FORWARD, REVERSE, ENTROPY_S, ENTROPY_T
    )
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    if live_row(weights_ptr, row):
        student = row_logits(student_ptr + row * student_stride, scale_s, inverse_cap_s, COMPUTE)
        if teacher_ptr is not None:
            teacher = row_logits(teacher_ptr + row * teacher_stride, scale_t, inverse_cap_t, COMPUTE)
        else:
            teacher = student  # not read
        state = empty_state(tl.zeros([THREADS], COMPUTE))
        begin = chunk * CHUNK
        offsets = begin + tile_columns(TILE)
        width = tl.minimum(n_cols - begin, CHUNK)
        whole = width // COLUMNS * COLUMNS
        for start in tl.range(0, whole, COLUMNS, loop_unroll_factor=UNROLL):
            state = accumulate(state, student, teacher, start + offsets, n_cols, TILE, ASKED, False)
        if whole < width:
            state = accumulate(state, student, teacher, whole + offsets, n_cols, TILE, ASKED, True)
        pointer = states_ptr + chunk.to(tl.int64) * FIELDS * n_rows + row
        store_state(pointer, n_rows, None, join_threads(state))


def statistics_flags(asked: Collection[str]) -> dict[str, bool]:
    """Constexpr arguments of the kernel that compile out the sums that were not asked for."""
    return {
        "DIFFERENCE": not {"forward_kl", "reverse_kl", "saved_statistics"}.isdisjoint(asked),
        "FORWARD": "forward_kl" in asked,
        "REVERSE": "reverse_kl" in asked,
        "ENTROPY_S": "student_entropy" in asked,
        "ENTROPY_T": "teacher_entropy" in asked,
    }


def chunk_states(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    *,
    n_cols: int,
    dtype: torch.dtype,
    asked: Collection[str],
    weights: torch.Tensor | None = None,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> torch.Tensor:
    """States [chunks, CHUNK_STATE_FIELDS, N] in `dtype`, N >= 1; arguments as in `row_stats.row_statistics`."""
    n_rows = student_logits.shape[0]
    operands = [t for t in (student_logits, teacher_logits) if t is not None]
    table = statistics_launch(
        backend_of(student_logits.device),
        min(t.element_size() for t in operands),
        aligned=is_aligned(*operands),
        softcap=student_softcap is not None or teacher_softcap is not None,
        double=dtype == torch.float64,
    )
    chunks = triton.cdiv(n_cols, CHUNK)
    states = student_logits.new_empty((chunks, CHUNK_STATE_FIELDS, n_rows), dtype=dtype)

    def run(config: RowLaunch) -> None:
        chunk_state_kernel[(n_rows, chunks)](
            student_logits,
            teacher_logits,
            weights,
            states,
            student_logits.stride(0),
            0 if teacher_logits is None else teacher_logits.stride(0),
            n_rows,
            n_cols,
            **scalings(temperature, student_softcap, teacher_softcap),
            SOFTCAP_S=student_softcap is not None,
            SOFTCAP_T=teacher_softcap is not None,
            COMPUTE=compute_type(dtype),
            FIELDS=CHUNK_STATE_FIELDS,
            **config.constants(),
            **flags,
            **compiled_with(config.num_warps, config.num_stages),
        )

    flags = statistics_flags(asked)
    key = ("statistics", n_cols, *(t.dtype for t in operands), student_softcap, teacher_softcap, *flags.values())
    with current_device(student_logits.device):
        run(chosen(key, student_logits.device, table, run))
    return states
