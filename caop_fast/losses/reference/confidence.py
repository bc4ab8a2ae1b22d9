"""Scores of a distribution over C confidence candidates, in plain PyTorch: the definition.

Everything a row reports depends on the candidates' log-probabilities log p_c only, through the restricted distribution
q_c = p_c / P and the mass P = sum_c p_c:

    expected = E_q v       variance = E_q (v - expected)^2       outside mass = 1 - P
    loss = kind(q, target) + outside_weight * -log P

The outputs of a row have the slopes s_c in log p_c at fixed P (these add up to 0) and h in log P:

    output              s_c                                                h
    cross_entropy       q_c - t_c                                          0
    brier               2 (expected - target) q_c (v_c - expected)         0
    expected_brier      q_c (d (d + 2 (expected - target)) - variance)     0, with d = v_c - expected
    bernoulli_nll       -q_c (target / e (v_c - e) + (1 - target) / f (1 - v_c - f)), a term 0 where e or f is clipped
    -log P              0                                                  -1
    expected            q_c (v_c - expected)                               0
    variance            q_c ((v_c - expected)^2 - variance)                0
    outside mass        0                                                  -P

and as d log P / d log p_c = q_c and d log p_c / d a_j = [j is c] - p_j, the gradients are

    s_c + h q_c            in log p_c
    s_c + h q_c (1 - P)    in the tempered logit a_j of candidate c,  -h p_j in any other

Written so, a row whose mass lies on the candidates keeps its digits: q_c - p_c is never formed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from caop_fast.losses.batches import ConfidenceGrads
from caop_fast.losses.options import ConfidenceOptions


class Scores(NamedTuple):
    """Per row, [R]."""

    loss: Tensor
    expected: Tensor
    variance: Tensor
    outside_mass: Tensor


def scores(log_p: Tensor, values: Tensor, target: Tensor, options: ConfidenceOptions) -> Scores:
    """Scores of log p [R, C] for candidates worth ``values`` [C] against ``target`` [R].

    NaN in a row without a possible candidate, and in one that holds NaN.
    """
    log_inside = log_mass(log_p).squeeze(-1)
    log_q = log_p.log_softmax(-1)
    q = log_q.exp()
    expected = (q * values).sum(-1)  # no product of matrices: autocast would round it
    variance = (q * (values - expected.unsqueeze(-1)) ** 2).sum(-1)
    loss = _score(options.kind, log_q, q, expected, values, target, options.eps)
    if options.outside_weight:
        loss = loss - options.outside_weight * log_inside
    return Scores(loss, expected, variance, -torch.expm1(log_inside.clamp(max=0)))


def log_mass(log_p: Tensor) -> Tensor:
    """log P [R, 1]; NaN in a row without a possible candidate, as everything else about it."""
    total = log_p.logsumexp(-1, keepdim=True)
    return total.masked_fill(total == -torch.inf, torch.nan)


def _score(kind: str, log_q: Tensor, q: Tensor, expected: Tensor, values: Tensor, target: Tensor, eps: float) -> Tensor:
    """The chosen score of each row, [R]."""
    if kind == "cross_entropy":
        mass = split_target(values, target)
        return -torch.where(mass == 0, 0.0, mass * log_q).sum(-1)
    if kind == "brier":
        return (expected - target) ** 2
    if kind == "expected_brier":
        return (q * (values - target.unsqueeze(-1)) ** 2).sum(-1)
    eps = max(eps, torch.finfo(expected.dtype).tiny)
    # 1 - e is a sum of its own: where e rounds to 1 its complement would have no digits, and no logarithm.
    success, failure = expected.clamp(eps, 1 - eps), (q * (1 - values)).sum(-1).clamp(eps, 1 - eps)
    return -(target * success.log() + (1 - target) * failure.log())


def split_target(values: Tensor, target: Tensor) -> Tensor:
    """The target's mass on the candidates, [N, C]: linear between the two neighbouring values [C], ends beyond them."""
    if values.numel() == 1:
        return torch.where(target.isnan(), target, 1.0).unsqueeze(-1)
    ordered, order = values.sort()
    upper = torch.searchsorted(ordered, target).clamp(1, values.numel() - 1)
    low, high = ordered[upper - 1], ordered[upper]
    share = ((target - low) / (high - low)).clamp(0, 1)
    mass = target.new_zeros(target.shape[0], values.numel())
    mass.scatter_(1, order[upper - 1].unsqueeze(-1), (1 - share).unsqueeze(-1))
    return mass.scatter_(1, order[upper].unsqueeze(-1), share.unsqueeze(-1))


def slopes(
    log_p: Tensor, values: Tensor, target: Tensor, options: ConfidenceOptions, upstream: ConfidenceGrads
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(s [R, C], h [R, 1], q [R, C], log P [R, 1]) for what flows into the four scores, [R] each or None."""
    grad_loss, grad_expected, grad_variance, grad_outside = (None if d is None else d.unsqueeze(-1) for d in upstream)
    log_inside = log_mass(log_p)
    q = log_p.softmax(-1)
    expected = (q * values).sum(-1, keepdim=True)
    deviation = values - expected
    s, h = torch.zeros_like(q), torch.zeros_like(expected)
    if grad_loss is not None:
        target = target.unsqueeze(-1)
        slope = _score_slopes(options.kind, q, expected, values, target, options.eps)
        # A NaN target does no harm to the other outputs where nothing flows into the loss.
        s = s + torch.where(grad_loss == 0, 0.0, grad_loss * slope)
        h = h - options.outside_weight * grad_loss
    if grad_expected is not None:
        s = s + grad_expected * q * deviation
    if grad_variance is not None:
        variance = (q * deviation**2).sum(-1, keepdim=True)
        s = s + grad_variance * q * (deviation**2 - variance)
    if grad_outside is not None:  # where rounding takes P above 1, the outside mass is 0 and stays so
        inside = torch.where(log_inside > 0, 0.0, log_inside.exp())
        h = h - torch.where(grad_outside == 0, 0.0, grad_outside * inside)
    return s, torch.where(log_inside.isnan(), log_inside, h), q, log_inside


def _score_slopes(kind: str, q: Tensor, expected: Tensor, values: Tensor, target: Tensor, eps: float) -> Tensor:
    """d score / d log p_c at fixed P, [R, C]; expected and target [R, 1]."""
    if kind == "cross_entropy":
        return q - split_target(values, target.squeeze(-1))
    if kind == "brier":
        return 2 * (expected - target) * q * (values - expected)
    if kind == "expected_brier":
        deviation = values - expected
        variance = (q * deviation**2).sum(-1, keepdim=True)
        return q * (deviation * (deviation + 2 * (expected - target)) - variance)
    eps = max(eps, torch.finfo(expected.dtype).tiny)
    failed = (q * (1 - values)).sum(-1, keepdim=True)
    success, failure = (
        torch.where((mean < eps) | (mean > 1 - eps), torch.where(share.isnan(), share, 0.0), share / mean)
        for share, mean in ((target, expected), (1 - target, failed))
    )
    return -q * (success * (values - expected) + failure * (1 - values - failed))


class OpenRows(NamedTuple):
    """A block of logits, ready for scores and for their gradient."""

    exponent: Tensor
    """[R, V] tempered logits minus the row's maximum."""
    log_total: Tensor
    """[R, 1] log of the sum of their exponentials."""
    slope: Tensor | None
    """[R, V] derivative of the softcap; None without one."""


def open_rows(logits: Tensor, options: ConfidenceOptions, dtype: torch.dtype, *, slope: bool = False) -> OpenRows:
    """Softcap and temperature applied to raw logits [R, V], shifted to a maximum of 0. The input is left as it is."""
    derivative = None
    exponent = logits.to(dtype)
    if options.softcap is not None:
        exponent = torch.tanh(exponent / options.softcap)
        if slope:
            derivative = 1 - exponent * exponent
        exponent = exponent * options.softcap
    if options.temperature != 1:
        exponent = exponent / options.temperature
    exponent = exponent - exponent.amax(-1, keepdim=True)
    return OpenRows(exponent, exponent.exp().sum(-1, keepdim=True).log(), derivative)


def candidate_log_p(rows: OpenRows, ids: Tensor) -> Tensor:
    """log p [R, C] of the candidates; NaN for ids outside the vocabulary."""
    vocab = rows.exponent.shape[-1]
    picked = rows.exponent[:, ids.clamp(0, vocab - 1)] - rows.log_total
    return picked.masked_fill((ids < 0) | (ids >= vocab), torch.nan)


def logprob_gradient(
    log_p: Tensor, values: Tensor, target: Tensor, options: ConfidenceOptions, upstream: ConfidenceGrads
) -> Tensor:
    """Gradient [R, C] in log p."""
    s, h, q, _ = slopes(log_p, values, target, options, upstream)
    return s + h * q


def logit_gradient(
    rows: OpenRows, ids: Tensor, values: Tensor, target: Tensor, options: ConfidenceOptions, upstream: ConfidenceGrads
) -> Tensor:
    """Gradient [R, V] in the raw logits."""
    s, h, q, log_inside = slopes(candidate_log_p(rows, ids), values, target, options, upstream)
    gradient = (rows.exponent - rows.log_total).exp_().mul_(-h)
    valid = (ids >= 0) & (ids < gradient.shape[-1])
    # Ids outside the vocabulary take column 0 along, which holds NaN then, as the row does.
    at = torch.where(valid, ids, 0).expand_as(s)
    gradient.scatter_(1, at, s - h * q * torch.expm1(log_inside.clamp(max=0)))
    if rows.slope is not None:
        gradient *= rows.slope
    return gradient.div_(options.temperature)
