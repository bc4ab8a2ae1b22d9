"""The outcomes a sparse teacher leaves to compare, and the divergence over them, for one row in one vector.

A row is a vector of K_BLOCK > k lanes: lanes 0 ... k-1 are the listed ids, lane k is the tail (everything else), and
the rest, like padding ids, is impossible on both sides, which contributes nothing. With s = log p_s and t = log p_t of
an outcome (nats) and r = t - s, the terms of the divergence D and h = dD / d log p_s (as if each p_s were free) are

                         term                                             h
    forward KL           p_t r - p_t + p_s                                -p_t
    reverse KL           -p_s r - p_s + p_t                               -p_s r
    0 < beta < 1         beta p_t (t - log m) + (1-beta) p_s (s - log m)  (1-beta) p_s (s - log m)
    TAIL = ignore        p_t r,  -p_s r                                   -p_t,  p_s (1 - r)

Over distributions the added p_s - p_t sum to 0. With them a term is p_t (e^-r - 1 + r): of second order in r, so the
rounding of the listed log-probabilities can make a small KL neither wrong nor negative.
"""

from __future__ import annotations

import triton
import triton.language as tl

from caop_kernels.math import LN2, accurate_exp, exp_excess, expm1, log1p
from caop_kernels.state import LOWEST

IMPOSSIBLE = tl.constexpr(-(2.0**64))  # a log-probability below this counts as -inf: finite masks act as -inf does


@triton.jit
def student_outcomes(u, m, z, m_tail, z_tail, lane, k, TAIL: tl.constexpr):
    """(s, p_s) of the outcomes, from u = listed logits in log2 units minus m (-inf in lanes that list nothing).

    m, z: maximum and partition sum of the whole row; m_tail, z_tail: of its tail.
    """
    if TAIL == "renormalize":
        top = tl.max(u, axis=0)
        u = u - tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.exp2(u), axis=0)
        total = tl.where(total == 0, 1.0, total)
    else:
        total = z
    p = tl.exp2(u) / total
    s = u - tl.log2(total)
    if TAIL == "bucket":
        below = m_tail - m
        p = tl.where(lane == k, tl.exp2(below) * (z_tail / z), p)
        s = tl.where(lane == k, below + tl.log2(z_tail) - tl.log2(z), s)
    s = s * LN2
    return tl.where(s < IMPOSSIBLE, float("-inf"), s), p


@triton.jit
def teacher_outcomes(lp, s, lane, k, full, resolution, TAIL: tl.constexpr):
    """(t, p_t) of the outcomes, from the listed log-probabilities lp (-inf in lanes that list nothing).

    The tail is 1 - sum p with the largest entry apart, -expm1(l_max) - sum of the others, which keeps what the
    log-probabilities carry, and at least what their rounding resolves, resolution * sum p |l| (resolution = eps / 2 of
    the dtype they came in). It is 0 where no column is left (`full`), and where the student's tail is impossible
    unless the log-probabilities say otherwise.
    """
    lp = tl.where(lp < IMPOSSIBLE, float("-inf"), lp)
    if TAIL == "renormalize":
        top = tl.max(lp, axis=0)
        lp = lp - tl.where(top == float("-inf"), 0.0, top)
        p = accurate_exp(lp)
        total = tl.sum(p, axis=0)
        total = tl.where(total == 0, 1.0, total)
        return lp - tl.log(total), p / total
    p = accurate_exp(lp)
    if TAIL == "bucket":
        top = tl.max(lp, axis=0)
        # The first of the largest: a tie is counted once.
        hot = tl.min(tl.where(lp == top, lane, k), axis=0)
        left = -expm1(top) - tl.sum(tl.where(lane == hot, 0.0, p), axis=0)
        resolved = resolution * tl.sum(tl.where(p > 0, p * tl.abs(lp), 0.0), axis=0)
        no_student = tl.sum(tl.where((lane == k) & (s == float("-inf")), 1, 0), axis=0) > 0
        none = full | ((left <= resolved) & no_student)
        tail = tl.where(none, 0.0, tl.where(left < resolved, resolved, left))
        p = tl.where(lane == k, tail, p)
        lp = tl.where(lane == k, tl.log(tail), lp)
    return lp, p


@triton.jit
def forward_terms(s, t, p_s, p_t, r, TAIL: tl.constexpr):
    term = p_t * r
    if TAIL != "ignore":
        term = tl.where(tl.abs(r) <= 0.5, p_t * exp_excess(r), term - p_t + p_s)
    return tl.where((s == float("-inf")) & (t > float("-inf")), float("inf"), term), -p_t


@triton.jit
def reverse_terms(s, t, p_s, p_t, r, TAIL: tl.constexpr):
    term = -p_s * r
    h = term
    if TAIL == "ignore":
        h += p_s
    else:
        term = tl.where(tl.abs(r) <= 0.5, p_s * exp_excess(-r), term - p_s + p_t)
    infinite = (t == float("-inf")) & (s > float("-inf"))
    return tl.where(infinite, float("inf"), term), tl.where(infinite, float("inf"), h)


@triton.jit
def divergence_terms(
    s, t, p_s, p_t, beta, FORWARD: tl.constexpr, REVERSE: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    """(terms, h) of the table above. FORWARD and REVERSE: beta chooses, 0 or 1 (else NaN); neither: 0 < beta < 1."""
    r = tl.maximum(t, LOWEST) - tl.maximum(s, LOWEST)  # two impossible outcomes differ by 0
    if FORWARD and REVERSE:
        term, h = forward_terms(s, t, p_s, p_t, r, TAIL)
        other, other_h = reverse_terms(s, t, p_s, p_t, r, TAIL)
        term = tl.where(beta == 0, term, tl.where(beta == 1, other, float("nan")))
        h = tl.where(beta == 0, h, tl.where(beta == 1, other_h, float("nan")))
    elif FORWARD:
        term, h = forward_terms(s, t, p_s, p_t, r, TAIL)
    elif REVERSE:
        term, h = reverse_terms(s, t, p_s, p_t, r, TAIL)
    else:
        # The larger of the two exceeds m by -above; share is the weight of the smaller one.
        y = tl.where(r >= 0, 1.0 - beta, beta) * expm1(-tl.abs(r))
        above = tl.where(y < -0.5, tl.log(1.0 + y), log1p(tl.maximum(y, -0.5)))
        h = -(1.0 - beta) * p_s * (above + tl.maximum(r, 0.0))
        term = h - beta * p_t * (above - tl.minimum(r, 0.0))
    return term, h
