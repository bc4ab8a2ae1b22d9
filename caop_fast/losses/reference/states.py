"""Mergeable states of rows, in plain PyTorch: the same fields as the kernels', formed in float64.

For a set of columns, with k = log2(e) / T, maxima m_s, m_t of the tempered logits in log2 units (k z), and per column
u = k z - m, e = 2^u, x = u_t - u_s, a state is [12, N]:

     0, 1   m_s, m_t          2, 3   sum e_s, sum e_t          4   sum (e_s - e_t)
     5, 6   sum e_s u_s, sum e_t u_t                           7, 8   sum e_t x, sum e_s x
     9      support: +inf where the student excludes a column that the teacher allows, -inf for the reverse, NaN for
            both; finite otherwise
    10, 11  u_s and u_t of the label where it is among the columns, else +inf

Rebasing a state to larger maxima, with d = m - m' <= 0, q = 2^d and shift = d_t - d_s, multiplies every sum by its q
and moves what is linear in u or x; states relative to the same maxima add. Finished, in nats:

    lr = log1p(sum (e_s - e_t) / sum e_t), or the difference of the logarithms where the two differ much
    KL(t||s) = ln2 sum(e_t x)/sum e_t + lr     KL(s||t) = -ln2 sum(e_s x)/sum e_s - lr
    H = ln(sum e) - ln2 sum(e u)/sum e         lse = ln2 (m + log2 sum e)         log p(label) = ln2 (u - log2 sum e)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from caop_fast.losses.options import DivergenceOptions
from caop_fast.losses.outputs import RowStatistics
from caop_fast.losses.reference.divergence import EXCLUDED, temper
from caop_kernels.constants import IGNORE_INDEX, STATE_FIELDS

FLOOR = -(2.0**40)  # the maximum of columns that are all excluded; finite, so that m - m is 0
SUPPORT_GAP = 2.0**64  # a larger |x| means that only one side allows the column
ABSENT = math.inf  # rounding may leave the u of a row's maximum a little above 0
LN2 = math.log(2.0)


def row_state(
    student: Tensor, teacher: Tensor, labels: Tensor | None, options: DivergenceOptions, dtype: torch.dtype
) -> Tensor:
    """The state [12, R] in ``dtype`` of raw logits [R, V]; a label outside [0, V) is not among the columns."""
    maxima, exponents = [], []
    for logits, softcap in ((student, options.student_softcap), (teacher, options.teacher_softcap)):
        a, *_ = temper(logits, options.temperature, softcap, torch.float64, consume=False)
        a = a / LN2
        top = a.amax(-1, keepdim=True).clamp(min=FLOOR).to(dtype)  # sums are relative to the number that is kept
        maxima.append(top)
        exponents.append(a - top.double())
    e_s, e_t = (torch.exp2(u) for u in exponents)
    u_s, u_t = (u.clamp(min=EXCLUDED) for u in exponents)
    x = u_t - u_s
    support = torch.where(x > SUPPORT_GAP, math.inf, 0.0).amax(-1) + torch.where(x < -SUPPORT_GAP, -math.inf, 0.0).amin(
        -1
    )
    held = []
    for u in exponents:
        if labels is None:
            held.append(torch.full_like(support, ABSENT))
            continue
        inside = (labels >= 0) & (labels < u.shape[-1])
        own = u.gather(-1, torch.where(inside, labels, 0).unsqueeze(-1)).squeeze(-1)
        held.append(torch.where(inside, own, ABSENT))
    sums = [e_s, e_t, e_s - e_t, e_s * u_s, e_t * u_t, e_t * x, e_s * x]
    fields = [maxima[0].squeeze(-1), maxima[1].squeeze(-1), *(t.sum(-1) for t in sums), support, *held]
    return torch.stack([f.to(dtype) for f in fields])


def empty_state(n_rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The state [12, N] of no columns."""
    state = torch.zeros(STATE_FIELDS, n_rows, dtype=dtype, device=device)
    state[:2] = FLOOR
    state[10:] = ABSENT
    return state


def merge_states(states: Tensor) -> Tensor:
    """The state [12, N] of the union of disjoint sets of columns, from theirs, [S, 12, N]."""
    merged = states[0].clone()
    for other in states[1:]:
        m_s, m_t = torch.maximum(merged[0], other[0]), torch.maximum(merged[1], other[1])
        first, second = _rebase(merged, m_s, m_t), _rebase(other, m_s, m_t)
        labels = torch.where(second[10:] < ABSENT, second[10:], first[10:])
        merged = torch.cat([torch.stack([m_s, m_t]), first[2:10] + second[2:10], labels])
    return merged


def _rebase(state: Tensor, new_m_s: Tensor, new_m_t: Tensor) -> Tensor:
    """A state relative to maxima that are at least as large."""
    m_s, m_t, z_s, z_t, d, a_s, a_t, c_t, c_s, support, y_s, y_t = state
    shift_s, shift_t = m_s - new_m_s, m_t - new_m_t
    q_s, q_t, shift_x = torch.exp2(shift_s), torch.exp2(shift_t), shift_t - shift_s
    return torch.stack(
        [
            new_m_s,
            new_m_t,
            q_s * z_s,
            q_t * z_t,
            q_s * d + (q_s - q_t) * z_t,
            q_s * (a_s + z_s * shift_s),
            q_t * (a_t + z_t * shift_t),
            q_t * (c_t + z_t * shift_x),
            q_s * (c_s + z_s * shift_x),
            support,
            torch.where(y_s < ABSENT, y_s + shift_s, y_s),
            torch.where(y_t < ABSENT, y_t + shift_t, y_t),
        ]
    )


def finish_state(state: Tensor, labels: Tensor | None) -> RowStatistics:
    """Statistics [N] in nats of a state [12, N]."""
    m_s, m_t, _, _, _, a_s, a_t, *_, y_s, y_t = state
    z_s, z_t, _, forward, reverse = _ratios(state)

    def label_logprob(y: Tensor, z: Tensor) -> Tensor | None:
        if labels is None:
            return None
        held = torch.where(y < ABSENT, (y - z.log2()) * LN2, math.nan)
        return torch.where(labels == IGNORE_INDEX, 0.0, held)

    return RowStatistics(
        forward_kl=forward.clamp(min=0),
        reverse_kl=reverse.clamp(min=0),
        student_lse=(m_s + z_s.log2()) * LN2,
        teacher_lse=(m_t + z_t.log2()) * LN2,
        student_logprob=label_logprob(y_s, z_s),
        teacher_logprob=label_logprob(y_t, z_t),
        student_entropy=(z_s.log() - a_s / z_s * LN2).clamp(min=0),
        teacher_entropy=(z_t.log() - a_t / z_t * LN2).clamp(min=0),
    )


def _ratios(state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Partition sums, the log of their quotient, and both KLs as they are, [N] each."""
    _, _, z_s, z_t, d, _, _, c_t, c_s, support, *_ = state
    # A side without a single finite logit has no distribution.
    z_s, z_t = (torch.where(z > 0, z, math.nan) for z in (z_s, z_t))
    log_ratio = torch.where(d.abs() <= z_t / 2, (d / z_t).log1p(), z_s.log() - z_t.log())
    both = support.isnan()
    forward = torch.where(both | (support == math.inf), math.inf, c_t / z_t * LN2) + log_ratio
    reverse = torch.where(both | (support == -math.inf), math.inf, -c_s / z_s * LN2) - log_ratio
    return z_s, z_t, log_ratio, forward, reverse


def saved_statistics(state: Tensor) -> Tensor:
    """[6, N] of a state [12, N]: what a gradient needs, in the order of
    ``DistillationRows.saved_statistics``.

    The shifts are maxima in nats, m ln2 as far as the dtype can hold it; what its rounding leaves out, 5e-4 at
    logits of 1e4, goes into the partition sums.
    """
    z_s, z_t, log_ratio, _, reverse = _ratios(state)
    shifts, rests, totals = [], [], []
    for m, z in ((state[0], z_s), (state[1], z_t)):
        shifts.append(m * LN2)
        rests.append(m.double() * LN2 - shifts[-1].double())
        totals.append((z.double() * rests[-1].exp()).to(z.dtype))
    log_ratio = (log_ratio.double() + rests[0] - rests[1]).to(log_ratio.dtype)
    return torch.stack([*shifts, *totals, log_ratio, reverse])
