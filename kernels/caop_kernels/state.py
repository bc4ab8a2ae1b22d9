"""The mergeable state of a row of logits: its layout and its arithmetic, once.

For one row, a = student logits / T and b = teacher logits / T (after the softcap), taken to base 2: multiply by
k = log2(e) / T. A state summarises any set of columns of the row, so threads, column chunks and vocabulary shards all
combine by the same rule. With running maxima m_s, m_t and, per column,

    u_s = a - m_s     u_t = b - m_t     e_s = 2^u_s     e_t = 2^u_t     x = u_t - u_s

the state of a chunk of columns is [CHUNK_STATE_FIELDS, N], float32 (float64 when an input is), one row per field:

    index  field  meaning
      0    m_s    student's maximum, log2 units; FLOOR when every column is -inf (or there is none)
      1    m_t    teacher's maximum, likewise
      2    z_s    sum e_s
      3    z_t    sum e_t
      4    d      sum (e_s - e_t): paired, so that nearly equal rows keep their digits
      5    a_s    sum e_s * u_s         student entropy
      6    a_t    sum e_t * u_t         teacher entropy
      7    c_t    sum e_t * x           forward KL
      8    c_s    sum e_s * x           reverse KL
      9    s      sum x * 2^64 (2^960 in float64): support. Stays finite while both sides give every column some
                  probability. +inf: a column where the student is -inf and the teacher is not. -inf: the reverse.
                  NaN: both kinds, or NaN logits.

z_s is a sum of its own because z_t + d loses it when the student is peaked and the teacher flat. s exists because a
product e_t * x cannot carry an infinity: with -inf stored as a large finite number, p_t = 1e-30 on a column the student
excludes would look like an ordinary contribution.

The state of a vocabulary shard, which travels between devices, has STATE_FIELDS and adds, for the row's label,

     10    y_s    u_s of the label, relative to m_s, where the label is among the columns; else ABSENT = +inf
     11    y_t    u_t of the label, likewise

A field belonging to a statistic that was not asked for holds no meaning; it is never read.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

CHUNK_STATE_FIELDS = 10
LABEL_FIELD = tl.constexpr(CHUNK_STATE_FIELDS)
ABSENT = tl.constexpr(float("inf"))  # rounding may leave the u of a row's maximum a little above 0

# A finite stand-in for the exponent of a column whose logit is -inf: both sides excluded gives x = 0 exactly.
EXCLUDED = tl.constexpr(-(2.0**100))
# Where running maxima start. Finite, so that m - m is 0 and not NaN for a thread that saw only -inf; far enough from
# EXCLUDED that no logit of interest lies below it.
FLOOR = tl.constexpr(-(2.0**40))
# What stands for -inf where differences of logarithms are multiplied: two of it differ by 0, any gap that counts as
# finite (2^64) lies above, 2^LOWEST is 0, and products with coefficients stay finite.
LOWEST = tl.constexpr(-(2.0**66))


class RowState(NamedTuple):
    """The sums of some columns, as a value of device code; fields and their order are those of the table above."""

    m_s: tl.tensor
    m_t: tl.tensor
    z_s: tl.tensor
    z_t: tl.tensor
    d: tl.tensor
    a_s: tl.tensor
    a_t: tl.tensor
    c_t: tl.tensor
    c_s: tl.tensor
    s: tl.tensor


@triton.jit
def empty_state(zero):
    """The state of no columns; `zero` gives shape and dtype."""
    return RowState(zero + FLOOR, zero + FLOOR, zero, zero, zero, zero, zero, zero, zero, zero)


@triton.jit
def rebase(state, m_s, m_t):
    """The same state relative to the maxima m_s, m_t, which are at least as large as its own.

    With shift = m - m' <= 0 and q = 2^shift, every u grows by its shift and x by shift_t - shift_s; the support field
    does not change.
    """
    shift_s = state.m_s - m_s
    shift_t = state.m_t - m_t
    q_s = tl.exp2(shift_s)
    q_t = tl.exp2(shift_t)
    shift_x = shift_t - shift_s
    d = q_s * state.d + (q_s - q_t) * state.z_t
    a_s = q_s * (state.a_s + state.z_s * shift_s)
    a_t = q_t * (state.a_t + state.z_t * shift_t)
    c_t = q_t * (state.c_t + state.z_t * shift_x)
    c_s = q_s * (state.c_s + state.z_s * shift_x)
    return RowState(m_s, m_t, q_s * state.z_s, q_t * state.z_t, d, a_s, a_t, c_t, c_s, state.s)


@triton.jit
def merge(a, b):
    """The state of the union of two disjoint sets of columns: rebase both to the common maxima, then add."""
    m_s = tl.maximum(a.m_s, b.m_s)
    m_t = tl.maximum(a.m_t, b.m_t)
    a = rebase(a, m_s, m_t)
    b = rebase(b, m_s, m_t)
    return RowState(
        m_s, m_t, a.z_s + b.z_s, a.z_t + b.z_t, a.d + b.d, a.a_s + b.a_s, a.a_t + b.a_t, a.c_t + b.c_t,
        a.c_s + b.c_s, a.s + b.s,
    )  # fmt: skip


@triton.jit
def join_threads(state):
    """The state of all columns, scalars, from the states [threads] of the columns of each thread."""
    state = rebase(state, tl.max(state.m_s, axis=0), tl.max(state.m_t, axis=0))
    return RowState(
        state.m_s, state.m_t, tl.sum(state.z_s, axis=0), tl.sum(state.z_t, axis=0), tl.sum(state.d, axis=0),
        tl.sum(state.a_s, axis=0), tl.sum(state.a_t, axis=0), tl.sum(state.c_t, axis=0), tl.sum(state.c_s, axis=0),
        tl.sum(state.s, axis=0),
    )  # fmt: skip


@triton.jit
def store_state(pointer, stride, mask, state):
    """Write the fields at `pointer`, `stride` elements apart; `mask` may be None."""
    for i in tl.static_range(len(state)):
        tl.store(pointer + i * stride, state[i], mask=mask)


@triton.jit
def load_state(pointer, stride, mask):
    """Read what `store_state` wrote; masked-off rows read as ones, which every formula can digest."""
    return RowState(
        tl.load(pointer, mask=mask, other=1.0),
        tl.load(pointer + stride, mask=mask, other=1.0),
        tl.load(pointer + 2 * stride, mask=mask, other=1.0),
        tl.load(pointer + 3 * stride, mask=mask, other=1.0),
        tl.load(pointer + 4 * stride, mask=mask, other=1.0),
        tl.load(pointer + 5 * stride, mask=mask, other=1.0),
        tl.load(pointer + 6 * stride, mask=mask, other=1.0),
        tl.load(pointer + 7 * stride, mask=mask, other=1.0),
        tl.load(pointer + 8 * stride, mask=mask, other=1.0),
        tl.load(pointer + 9 * stride, mask=mask, other=1.0),
    )
