"""How kernels walk over the columns of a row: the shape of a tile, and loading one.

A tile is [groups, threads * vector]. Within a group columns are contiguous, which leaves the compiler one way to lay
them out, `vector` per thread; every operand of a kernel then has the same register layout, whatever its dtype.
Reshaped to [groups, threads, vector], reductions over groups and vector stay inside a thread.

Runtime values that belong together travel through device code as one named tuple, compile-time values as another,
assigned with the annotation `tl.constexpr`: an assignment without it makes tensors of them. Kernels' own arguments stay
single, because only a single argument can be declared float64.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from caop_kernels import constants
from caop_kernels.math import tanh

IGNORE_INDEX = tl.constexpr(constants.IGNORE_INDEX)


class Tile(NamedTuple):
    """The shape of a tile: a compile-time value of device code."""

    groups: tl.constexpr
    threads: tl.constexpr
    vector: tl.constexpr


class Logits(NamedTuple):
    """One row of logits in device code, and what takes them to log2 units; scale and inverse_cap are COMPUTE."""

    row: tl.tensor  # pointer to the first column; with several rows a vector of pointers
    scale: tl.tensor  # log2(e) / T, times the cap where there is one
    inverse_cap: tl.tensor  # 1 / cap; read with SOFTCAP only


@triton.jit
def row_logits(row, scale, inverse_cap, COMPUTE: tl.constexpr):
    """The `Logits` at a pointer, from the kernel's float64 arguments."""
    return Logits(row, tl.full((), scale, COMPUTE), tl.full((), inverse_cap, COMPUTE))


@triton.jit
def tile_columns(TILE: tl.constexpr):
    """Columns of the first tile, [groups, threads * vector]."""
    WIDTH: tl.constexpr = TILE.threads * TILE.vector
    return tl.arange(0, TILE.groups)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def by_thread(values, TILE: tl.constexpr):
    """Values of a tile as [groups, threads, vector]."""
    return tl.reshape(values, [TILE.groups, TILE.threads, TILE.vector])


@triton.jit
def thread_sum(values):
    """Sums [threads] of [groups, threads, vector]; the vector first, so that both reductions stay inside a thread."""
    return tl.sum(tl.sum(values, axis=2), axis=0)


@triton.jit
def thread_max(values):
    """Maxima [threads] of [groups, threads, vector], likewise."""
    return tl.max(tl.max(values, axis=2), axis=0)


@triton.jit
def load_logits(logits, columns, n_cols, MASKED: tl.constexpr, SOFTCAP: tl.constexpr):
    """Columns of one row as COMPUTE, through tanh(z / cap) with SOFTCAP (its factor cap is left to the scale).

    Columns from n_cols on give -inf, and are not read. Read once: evict first.
    """
    if MASKED:
        mask = columns < n_cols
        v = tl.load(logits.row + columns, mask=mask, other=0.0, eviction_policy="evict_first").to(logits.scale.dtype)
    else:
        v = tl.load(logits.row + columns, eviction_policy="evict_first").to(logits.scale.dtype)
    if SOFTCAP:
        v = tanh(v * logits.inverse_cap)
    if MASKED:  # after the softcap, which would turn -inf into -cap
        v = tl.where(mask, v, float("-inf"))
    return v


@triton.jit
def gather_logits(logits, ids, valid, SOFTCAP: tl.constexpr):
    """Single columns as COMPUTE, through tanh(z / cap) with SOFTCAP; 0 where not valid (nothing is read)."""
    v = tl.load(logits.row + ids, mask=valid, other=0.0).to(logits.scale.dtype)
    if SOFTCAP:
        v = tanh(v * logits.inverse_cap)
    return v


@triton.jit
def exponents(v, scale, shift):
    """u = v * scale - shift of logits v, rounded once; a shift per thread comes as [1, threads, 1]."""
    return tl.fma(v, tl.zeros_like(v) + scale, tl.zeros_like(v) - shift)


@triton.jit
def narrow(value, DTYPE: tl.constexpr):
    """`value` as DTYPE. float64 reaches bfloat16 by way of float32: Triton has no direct conversion."""
    if value.dtype == tl.float64 and tl.bfloat16 == DTYPE:
        result = value.to(tl.float32).to(DTYPE)
    else:
        result = value.to(DTYPE)
    return result


@triton.jit
def store_gradient(out, gradient, columns, n_cols, n_out, MASKED: tl.constexpr):
    """Write one tile of a row's gradient in the dtype of `out`; 0 from n_cols on, nothing from n_out on."""
    if MASKED:
        gradient = tl.where(columns < n_cols, gradient, 0.0)
        tl.store(out + columns, narrow(gradient, out.dtype.element_ty), mask=columns < n_out)
    else:
        tl.store(out + columns, narrow(gradient, out.dtype.element_ty))


@triton.jit
def store_zeros(out, columns, n_out, stop, TILE: tl.constexpr):
    """The gradient of a row of weight 0: zeros in its chunk of `stop` columns, of which `columns` is the first tile."""
    COLUMNS: tl.constexpr = TILE.groups * TILE.threads * TILE.vector
    zero = tl.zeros([TILE.groups, TILE.threads * TILE.vector], out.dtype.element_ty)
    for start in tl.range(0, stop, COLUMNS):
        tl.store(out + start + columns, zero, mask=start + columns < n_out)
