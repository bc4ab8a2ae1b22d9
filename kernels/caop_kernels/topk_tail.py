"""The one read of the student's logits against a sparse teacher: the state of the columns that are not listed.

Program (row, chunk) reduces one fixed chunk of columns, without those listed, to

    m = max u,   z = sum 2^(u - m),   a = sum 2^(u - m) (u - m)        u = z_s log2(e) / T (after the softcap)

so the student's tail is a sum of its own, relative to its own maximum, and exact at any size. The row's ids come
sorted: the loop over tiles holds the next one and blanks its column when it is reached. Every thread keeps an online
state of its own; they are joined once at the end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from caop_kernels.launch import (
    CHUNK,
    backend_of,
    compiled_with,
    compute_type,
    current_device,
    is_aligned,
    tail_launch,
)
from caop_kernels.masked_rows import live_row
from caop_kernels.state import EXCLUDED, FLOOR
from caop_kernels.tile import Tile, by_thread, exponents, load_logits, row_logits, thread_max, thread_sum, tile_columns


class TailState(NamedTuple):
    """The sums of some columns of the tail, relative to their maximum."""

    m: tl.tensor
    z: tl.tensor
    a: tl.tensor


TAIL_FIELDS = len(TailState._fields)


class NextListed(NamedTuple):
    """The next listed id to come, and its position in the sorted list."""

    position: tl.tensor
    column: tl.tensor


@triton.jit
def rebase_tail(state, m):
    """The same state relative to a maximum that is at least as large."""
    shift = state.m - m
    q = tl.exp2(shift)
    return TailState(m, q * state.z, q * (state.a + state.z * shift))


@triton.jit
def accumulate_tail(
    state, listed, sorted_ids, k, start, stop, student, n_cols,
    TILE: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Add the columns [start, stop) of one tile that are not listed."""
    offsets = tile_columns(TILE)
    v = load_logits(student, start + offsets, n_cols, MASKED, SOFTCAP)
    position, column = listed
    while column < stop:
        v = tl.where(offsets == column - start, float("-inf"), v)
        position += 1
        column = tl.load(sorted_ids + position, mask=position < k, other=2147483647)
    v = by_thread(v, TILE)
    m, z, a = rebase_tail(state, tl.maximum(state.m, thread_max(v) * student.scale))
    u = exponents(v, student.scale, m[None, :, None])
    e = tl.exp2(u)  # before the clamp: 2^-inf is 0, and NaN gets through (maximum may drop it)
    z += thread_sum(e)
    a += thread_sum(e * tl.maximum(u, EXCLUDED))
    return TailState(m, z, a), NextListed(position, column)


@triton.jit(do_not_specialize=["n_rows"])
def tail_kernel(
    student_ptr,  # [n_rows, >= n_cols], unit column stride
    sorted_ids_ptr,  # [n_rows, k] int32 ascending
    weights_ptr,  # [n_rows], or None: rows of weight 0 are not read
    states_ptr,  # [n_rows, TAIL_FIELDS, chunks], COMPUTE
    student_stride,
    k,
    n_rows,
    n_cols,
    scale: tl.float64,  # log2(e) / T, times the cap where there is one
    inverse_cap: tl.float64,
    CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
    K_BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """Program (row, chunk): reduce the columns of one chunk that are not listed to a state."""
    TILE: tl.constexpr = Tile(GROUPS, THREADS, VECTOR)
    COLUMNS: tl.constexpr = GROUPS * THREADS * VECTOR
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    if live_row(weights_ptr, row):
        student = row_logits(student_ptr + row * student_stride, scale, inverse_cap, COMPUTE)
        sorted_ids = sorted_ids_ptr + row * k
        begin = chunk * CHUNK
        width = tl.minimum(n_cols - begin, CHUNK)
        whole = width // COLUMNS * COLUMNS

        lane = tl.arange(0, K_BLOCK)
        ids = tl.load(sorted_ids + lane, mask=lane < k, other=2147483647)
        position = tl.sum((ids < begin).to(tl.int32), axis=0)
        listed = NextListed(position, tl.load(sorted_ids + position, mask=position < k, other=2147483647))

        zero = tl.zeros([THREADS], COMPUTE)
        state = TailState(zero + FLOOR, zero, zero)
        for start in tl.range(begin, begin + whole, COLUMNS, loop_unroll_factor=UNROLL):
            state, listed = accumulate_tail(
                state, listed, sorted_ids, k, start, start + COLUMNS, student, n_cols, TILE, False, SOFTCAP
            )  # fmt: skip
        if whole < width:
            state, listed = accumulate_tail(
                state, listed, sorted_ids, k, begin + whole, begin + width, student, n_cols, TILE, True, SOFTCAP
            )

        m, z, a = rebase_tail(state, tl.max(state.m, axis=0))
        chunks = tl.num_programs(1)
        pointer = states_ptr + row * (FIELDS * chunks) + chunk
        tl.store(pointer, m)
        tl.store(pointer + chunks, tl.sum(z, axis=0))
        tl.store(pointer + 2 * chunks, tl.sum(a, axis=0))


def lanes(k: int) -> int:
    """Width of the vector that holds k listed ids and the tail."""
    return max(16, triton.next_power_of_2(k + 1))


def tail_states(
    student_logits: torch.Tensor,
    sorted_ids: torch.Tensor,
    weights: torch.Tensor | None,
    *,
    n_cols: int,
    dtype: torch.dtype,
    softcap: bool,
    scale: float,
    inverse_cap: float,
) -> torch.Tensor:
    """States [N, TAIL_FIELDS, chunks] in `dtype` of the first `n_cols` columns of logits [N, V], without those listed.

    `sorted_ids` [N, k] are those of `listed_ids.py`. Rows of weight 0 are not read, and their states hold anything.
    """
    n_rows, k = sorted_ids.shape
    config = tail_launch(
        backend_of(student_logits.device),
        student_logits.element_size(),
        aligned=is_aligned(student_logits),
        softcap=softcap,
        double=dtype == torch.float64,
    )
    chunks = triton.cdiv(n_cols, CHUNK)
    states = student_logits.new_empty((n_rows, TAIL_FIELDS, chunks), dtype=dtype)
    with current_device(student_logits.device):
        tail_kernel[(n_rows, chunks)](
            student_logits,
            sorted_ids,
            weights,
            states,
            student_logits.stride(0),
            k,
            n_rows,
            n_cols,
            scale,
            inverse_cap,
            K_BLOCK=lanes(k),
            SOFTCAP=softcap,
            COMPUTE=compute_type(dtype),
            FIELDS=TAIL_FIELDS,
            **config.constants(),
            **compiled_with(config.num_warps, config.num_stages),
        )
    return states
