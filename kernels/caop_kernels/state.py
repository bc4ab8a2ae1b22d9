"""The mergeable state of a row of logits: its layout and its arithmetic, once.

For one row, a = student logits / T and b = teacher logits / T (after the softcap), taken to base 2: multiply by
k = log2(e) / T. A state summarises any set of columns of the row, so threads, column chunks and vocabulary shards all
combine by the same rule. With running maxima m_s, m_t and, per column,

    u_s = a - m_s     u_t = b - m_t     e_s = 2^u_s     e_t = 2^u_t     x = u_t - u_s

a state tensor is [STATE_FIELDS, N], float32 (float64 when an input is), one row per field:

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

The state of a vocabulary shard, which travels between devices, has SHARD_FIELDS and adds, for the row's label,

     10    y_s    u_s of the label, relative to m_s, where the label is among the columns; else ABSENT = +inf
     11    y_t    u_t of the label, likewise

A field belonging to a statistic that was not asked for holds no meaning; it is never read.
"""

from __future__ import annotations

import triton
import triton.language as tl

STATE_FIELDS = 10
LABEL_FIELD = tl.constexpr(10)
SHARD_FIELDS = tl.constexpr(12)
ABSENT = tl.constexpr(float("inf"))  # rounding may leave the u of a row's maximum a little above 0

# A finite stand-in for the exponent of a column whose logit is -inf: both sides excluded gives x = 0 exactly.
EXCLUDED = tl.constexpr(-(2.0**100))
# Where running maxima start. Finite, so that m - m is 0 and not NaN for a thread that saw only -inf; far enough from
# EXCLUDED that no logit of interest lies below it.
FLOOR = tl.constexpr(-(2.0**40))


@triton.jit
def rebase(m_s, m_t, z_s, z_t, d, a_s, a_t, c_t, c_s, new_m_s, new_m_t):
    """The sums of a state, expressed relative to maxima that are at least as large.

    With shift = m - m' <= 0 and q = 2^shift, every u grows by its shift and x by shift_t - shift_s.
    Returns (z_s, z_t, d, a_s, a_t, c_t, c_s); the support field does not change.
    """
    shift_s = m_s - new_m_s
    shift_t = m_t - new_m_t
    q_s = tl.exp2(shift_s)
    q_t = tl.exp2(shift_t)
    shift_x = shift_t - shift_s
    d = q_s * d + (q_s - q_t) * z_t
    a_s = q_s * (a_s + z_s * shift_s)
    a_t = q_t * (a_t + z_t * shift_t)
    c_t = q_t * (c_t + z_t * shift_x)
    c_s = q_s * (c_s + z_s * shift_x)
    return q_s * z_s, q_t * z_t, d, a_s, a_t, c_t, c_s


@triton.jit
def merge(
    m_s, m_t, z_s, z_t, d, a_s, a_t, c_t, c_s, s,
    other_m_s, other_m_t, other_z_s, other_z_t, other_d, other_a_s, other_a_t, other_c_t, other_c_s, other_s,
):  # fmt: skip
    """The state of the union of two disjoint sets of columns: rebase both to the common maxima, then add."""
    new_m_s = tl.maximum(m_s, other_m_s)
    new_m_t = tl.maximum(m_t, other_m_t)
    z_s, z_t, d, a_s, a_t, c_t, c_s = rebase(m_s, m_t, z_s, z_t, d, a_s, a_t, c_t, c_s, new_m_s, new_m_t)
    other_z_s, other_z_t, other_d, other_a_s, other_a_t, other_c_t, other_c_s = rebase(
        other_m_s, other_m_t, other_z_s, other_z_t, other_d, other_a_s, other_a_t, other_c_t, other_c_s,
        new_m_s, new_m_t,
    )  # fmt: skip
    return (
        new_m_s, new_m_t, z_s + other_z_s, z_t + other_z_t, d + other_d, a_s + other_a_s, a_t + other_a_t,
        c_t + other_c_t, c_s + other_c_s, s + other_s,
    )  # fmt: skip


@triton.jit
def store_state(pointer, stride, mask, m_s, m_t, z_s, z_t, d, a_s, a_t, c_t, c_s, s):
    """Write the ten fields at `pointer`, `stride` elements apart; `mask` may be None."""
    tl.store(pointer, m_s, mask=mask)
    tl.store(pointer + stride, m_t, mask=mask)
    tl.store(pointer + 2 * stride, z_s, mask=mask)
    tl.store(pointer + 3 * stride, z_t, mask=mask)
    tl.store(pointer + 4 * stride, d, mask=mask)
    tl.store(pointer + 5 * stride, a_s, mask=mask)
    tl.store(pointer + 6 * stride, a_t, mask=mask)
    tl.store(pointer + 7 * stride, c_t, mask=mask)
    tl.store(pointer + 8 * stride, c_s, mask=mask)
    tl.store(pointer + 9 * stride, s, mask=mask)


@triton.jit
def load_state(pointer, stride, mask):
    """Read ten fields written by `store_state`; masked-off rows read as ones, which every formula can digest."""
    return (
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
