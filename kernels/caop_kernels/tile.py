"""How kernels walk over the columns of a row: the shape of a tile, and loading one.

A tile is [groups, threads * vector]. Within a group columns are contiguous, which leaves the compiler one way to lay
them out, `vector` per thread; every operand of a kernel then has the same register layout, whatever its dtype.
Reshaped to [groups, threads, vector], reductions over groups and vector stay inside a thread.
"""

from __future__ import annotations

import triton
import triton.language as tl

from caop_kernels import constants
from caop_kernels.math import tanh

IGNORE_INDEX = tl.constexpr(constants.IGNORE_INDEX)


@triton.jit
def tile_columns(GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Columns of the first tile, [GROUPS, WIDTH] with WIDTH = threads * vector."""
    return tl.arange(0, GROUPS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def load_logits(
    row, columns, n_cols, inverse_cap, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    """Logits of one row as COMPUTE, through tanh(z / cap) with SOFTCAP (its factor cap is left to the caller's scale).

    Columns from n_cols on give -inf, and are not read. Read once: evict first.
    """
    if MASKED:
        mask = columns < n_cols
        v = tl.load(row + columns, mask=mask, other=0.0, eviction_policy="evict_first").to(COMPUTE)
    else:
        v = tl.load(row + columns, eviction_policy="evict_first").to(COMPUTE)
    if SOFTCAP:
        v = tanh(v * inverse_cap)
    if MASKED:  # after the softcap, which would turn -inf into -cap
        v = tl.where(mask, v, float("-inf"))
    return v


@triton.jit
def gather_logits(row, ids, valid, inverse_cap, SOFTCAP: tl.constexpr, COMPUTE: tl.constexpr):
    """Logits of single columns as COMPUTE, through tanh(z / cap) with SOFTCAP; 0 where not valid (nothing is read)."""
    v = tl.load(row + ids, mask=valid, other=0.0).to(COMPUTE)
    if SOFTCAP:
        v = tanh(v * inverse_cap)
    return v


@triton.jit
def narrow(value, DTYPE: tl.constexpr):
    """`value` as DTYPE. float64 reaches bfloat16 by way of float32: Triton has no direct conversion."""
    if value.dtype == tl.float64 and tl.bfloat16 == DTYPE:
        result = value.to(tl.float32).to(DTYPE)
    else:
        result = value.to(DTYPE)
    return result
