"""Float64 oracle of the confidence scores, from the definitions, with autograd for the gradients."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("cross_entropy", "brier", "expected_brier", "bernoulli_nll")


def hat_weights(values: Tensor, target: float) -> list[float]:
    """Mass of a target on each value: straight lines between neighbours, flat beyond the ends."""
    ordered = sorted(values.tolist())
    clipped = min(max(target, ordered[0]), ordered[-1])
    weights = []
    for value in values.tolist():
        k = ordered.index(value)
        if clipped == value:
            weight = 1.0
        elif clipped < value:
            weight = 0.0 if k == 0 else max(0.0, (clipped - ordered[k - 1]) / (value - ordered[k - 1]))
        else:
            weight = 0.0 if k == len(ordered) - 1 else max(0.0, (ordered[k + 1] - clipped) / (ordered[k + 1] - value))
        weights.append(weight)
    return weights


def log_p(logits: Tensor, ids: Tensor, temperature: float = 1.0, softcap: float | None = None) -> Tensor:
    z = logits.double() if logits.dtype != torch.float64 else logits
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return torch.log_softmax(z / temperature, -1)[:, ids]


def scores(logp: Tensor, values: Tensor, target: Tensor, kind: str, outside_weight: float = 1.0, eps: float = 1e-6):
    """loss, expected, variance, outside mass [N] of log-probabilities [N, C]."""
    inside = torch.logsumexp(logp, -1)
    logq = logp - inside[:, None]
    q = logq.exp()
    v, t = values.double(), target.double()
    expected = (q * v).sum(-1)
    if kind == "cross_entropy":
        mass = torch.tensor([hat_weights(v, y) for y in t.tolist()], dtype=torch.float64, device=logp.device)
        loss = -torch.where(mass > 0, mass * torch.where(mass > 0, logq, 0.0), 0.0).sum(-1)
    elif kind == "brier":
        loss = (expected - t).square()
    elif kind == "expected_brier":
        loss = sum(q[:, i] * (v[i] - t).square() for i in range(len(v)))
    else:
        e = expected.clamp(eps, 1 - eps)
        f = (q * (1 - v)).sum(-1).clamp(eps, 1 - eps)
        loss = -t * e.log() - (1 - t) * f.log()
    variance = (q * v.square()).sum(-1) - expected.square()
    return loss - outside_weight * inside, expected, variance, 1 - inside.exp()


def mixed_gradient(leaf: Tensor, outputs, upstream) -> Tensor:
    (gradient,) = torch.autograd.grad(sum((o * u.double()).sum() for o, u in zip(outputs, upstream, strict=True)), leaf)
    return gradient
