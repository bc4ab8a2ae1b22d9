"""Float64 oracle of the distillation losses, written from the definitions with torch's own softmax and autograd."""

from __future__ import annotations

from itertools import combinations, product

import torch
from torch import Tensor


def log_probs(logits: Tensor, temperature: float, softcap: float | None) -> Tensor:
    z = logits.double()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return torch.log_softmax(z / temperature, -1)


def _times(p: Tensor, v: Tensor) -> Tensor:
    """p * v with 0 * anything = 0."""
    return torch.where(p > 0, p * torch.where(p > 0, v, 0.0), 0.0)


def statistics(student, teacher, labels=None, *, beta=0.0, temperature=1.0, student_softcap=None, teacher_softcap=None):
    """divergence, student_logprob, teacher_logprob, student_entropy, teacher_entropy; differentiable in ``student``."""
    ls, lt = log_probs(student, temperature, student_softcap), log_probs(teacher, temperature, teacher_softcap).detach()
    ps, pt = ls.exp(), lt.exp()
    forward, reverse = _times(pt, lt - ls).sum(-1), _times(ps, ls - lt).sum(-1)
    if isinstance(beta, Tensor):
        divergence = torch.where(beta == 0, forward, reverse)
    elif beta in (0, 1):
        divergence = forward if beta == 0 else reverse
    else:
        b = torch.tensor(beta, dtype=torch.float64)
        lm = torch.logaddexp(b.log() + lt, (1 - b).log() + ls)
        divergence = beta * _times(pt, lt - lm).sum(-1) + (1 - beta) * _times(ps, ls - lm).sum(-1)
    picked = [None, None]
    if labels is not None:
        ids = labels.clamp(min=0).unsqueeze(-1)
        picked = [torch.where(labels == -100, 0.0, x.gather(-1, ids).squeeze(-1)) for x in (ls, lt)]
    return divergence, picked[0], picked[1], -_times(ps, ls).sum(-1), -_times(pt, lt).sum(-1)


def weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return values.mean()
    w = weights.double()
    return torch.where(w > 0, w * values, 0.0).sum() / w.sum()


def plain(student: Tensor, teacher: Tensor, beta: float = 0.0, temperature: float = 1.0):
    """Straightforward PyTorch in the dtype torch picks: the yardstick for errors. Returns loss per row, entropy."""
    ls = torch.log_softmax(student.float() / temperature, -1)
    lt = torch.log_softmax(teacher.float() / temperature, -1)
    first, second = (ls, lt) if beta == 0 else (lt, ls)
    kl = torch.nn.functional.kl_div(first, second, reduction="none", log_target=True).sum(-1)
    return kl, -(ls.exp() * ls).sum(-1)


def pairwise(**axes: list) -> list[dict]:
    """Few combinations that hold every pair of values of two axes (greedy all-pairs cover)."""
    names = list(axes)
    full = [dict(zip(names, values, strict=True)) for values in product(*(range(len(axes[n])) for n in names))]

    def pairs(row):
        return {(a, row[a], b, row[b]) for a, b in combinations(names, 2)}

    missing = set().union(*(pairs(row) for row in full))
    chosen = []
    while missing:
        best = max(full, key=lambda row: len(pairs(row) & missing))
        missing -= pairs(best)
        chosen.append({n: axes[n][best[n]] for n in names})
    return chosen
