"""Calibration over confidence bins, in plain PyTorch: the definition.

Hard bins are left-closed, ``edges[b] <= c < edges[b + 1]``, and the last takes its right edge too. Soft bins
(Karandikar et al. 2021, arXiv 2108.00106, order 1) give every row a membership in each of B equal-width bins with
centres x_b = (b + 1/2) / B:

    u_b = softmax_b(-(c - x_b)^2 / temperature)      D_b = sum_rows w u_b (c - y)      soft ECE = sum_b |D_b| / sum w
    d / dc = w / sum(w) * sum_b sign(D_b) u_b (1 + (c - y) 2 (x_b - x) / temperature),   x = sum_b u_b x_b

which is sum_b (S_b / N) |A_b - C_b| with the paper's soft sizes S_b, accuracies A_b and mean confidences C_b, in one
fraction. The derivative of |.| at 0 is 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def counted(confidence: Tensor, correct: Tensor) -> Tensor:
    """The rows that count, bool [R]: both numbers lie in [0, 1], so neither is NaN."""
    return (confidence >= 0) & (confidence <= 1) & (correct >= 0) & (correct <= 1)


def bin_sums(confidence: Tensor, correct: Tensor, edges: Tensor) -> Tensor:
    """[3, B] count, sum of confidence, sum of correct per bin, all float64 [R] in and float64 out."""
    n_bins = edges.numel() - 1
    index = torch.bucketize(confidence, edges, right=True).sub_(1).clamp_(0, n_bins - 1)
    member = (index.unsqueeze(-1) == torch.arange(n_bins, device=index.device)) & counted(
        confidence, correct
    ).unsqueeze(-1)
    columns = (torch.ones_like(confidence), confidence, correct)
    return torch.stack([torch.where(member, column.unsqueeze(-1), 0.0).sum(0) for column in columns])


class CleanedRows(NamedTuple):
    """Rows [R] with 0 in those that are left out."""

    confidence: Tensor
    correct: Tensor
    weight: Tensor


def clean(confidence: Tensor, correct: Tensor, weights: Tensor | None, dtype: torch.dtype) -> CleanedRows:
    """Confidence, correct and weight as ``dtype`` [R]; 0 in rows that are left out."""
    c, y = confidence.to(dtype), correct.to(dtype)
    used = counted(c, y)
    if weights is not None:
        used = used & (weights != 0)
    w = torch.ones_like(c) if weights is None else weights.to(dtype)
    return CleanedRows(*(torch.where(used, column, 0.0) for column in (c, y, w)))


def memberships(confidence: Tensor, n_bins: int, temperature: float) -> tuple[Tensor, Tensor]:
    """u [R, B] and the bins' centres [B]."""
    steps = torch.arange(n_bins, dtype=confidence.dtype, device=confidence.device)
    centres = (steps + 0.5) / n_bins
    return (-((confidence.unsqueeze(-1) - centres) ** 2) / temperature).softmax(-1), centres


def soft_sums(rows: CleanedRows, n_bins: int, temperature: float) -> Tensor:
    """[B + 1]: D_b, and the sum of weights, of cleaned rows [R]."""
    c, y, w = rows
    u, _ = memberships(c, n_bins, temperature)
    return torch.cat([(u * (w * (c - y)).unsqueeze(-1)).sum(0), w.sum().view(1)])


def soft_error(sums: Tensor) -> tuple[Tensor, Tensor]:
    """The error [1], and for its gradient sign(D_b) / sum w, then sum w [B + 1]. 0 where all weights are."""
    total = sums[-1:]
    inverse = torch.where(total > 0, 1 / total, 0.0)
    return sums[:-1].abs().sum().view(1) * inverse, torch.cat([sums[:-1].sign() * inverse, total])


def soft_gradient(rows: CleanedRows, signs: Tensor, temperature: float) -> Tensor:
    """Gradient [R] of the error in the confidence of cleaned rows."""
    c, y, w = rows
    u, centres = memberships(c, signs.numel() - 1, temperature)
    mean = (u * centres).sum(-1, keepdim=True)
    pull = (c - y).unsqueeze(-1) * (2 / temperature) * (centres - mean)
    return w * (u * signs[:-1] * (1 + pull)).sum(-1)
