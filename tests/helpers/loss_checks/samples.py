"""Inputs of the checks, the same on every machine: drawn on the CPU, seeded by the check's options."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from helpers.loss_checks.check import Setting, Spec
from helpers.loss_checks.definitions import IGNORE_INDEX

SPREAD = 2.5  # standard deviation of the logits
GAP = {"normal": 0.7, "peaked": 0.7, "near": 1e-3}  # between teacher and student, as a share of SPREAD
ODDS = 3.5  # log odds of the likely id in losses on logits; for higher ones float32 itself is inaccurate
PEAK = 12.0  # added to its logit in the linear losses
OFFSET, MARGIN = 3, 10  # columns before strided rows, and all that are added to them


def generator(spec: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(str(spec).encode()))


@dataclass(frozen=True)
class Rows:
    """What tokens have besides their logits."""

    labels: Tensor | None
    weights: Tensor | None
    beta: float | Tensor

    @property
    def off(self) -> Tensor | None:
        """The rows with a given weight of 0."""
        return None if self.weights is None else self.weights == 0


def rows(spec: Spec, n: int, vocab: int, device: torch.device, g: torch.Generator) -> Rows:
    """Labels, some -100 from the second on; weights, some 0 from the third on."""
    labels = weights = None
    beta: float | Tensor
    if spec.labels:
        labels = torch.randint(0, vocab, (n,), generator=g)
        labels[1::4] = IGNORE_INDEX
        labels = labels.to(device)
    if spec.weights:
        weights = torch.rand(n, generator=g) + 0.25
        weights[2::3] = 0
        weights = (weights if spec.weights == "nan" else 0 * weights).to(device)
    if spec.beta == "per token":
        beta = (torch.arange(n) % 2).float().to(device)
    else:
        beta = spec.beta
    return Rows(labels, weights, beta)


def logits(spec: Spec, n: int, vocab: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Student and teacher, float64 [n, vocab]."""
    student = SPREAD * torch.randn(n, vocab, generator=g, dtype=torch.float64)
    if spec.logits == "peaked":
        at = torch.randint(0, vocab, (n,), generator=g)
        student[torch.arange(n), at] = student.logsumexp(-1) + ODDS
    noise = torch.randn(n, vocab, generator=g, dtype=torch.float64)
    teacher = student + GAP[spec.logits] * SPREAD * noise
    if spec.excluded:
        out = torch.rand(n, vocab, generator=g) < 0.2
        if spec.excluded in ("both", "student"):
            student[out] = -math.inf
        if spec.excluded in ("both", "teacher"):
            teacher[out] = -math.inf
    return student, teacher


def stored(values: Tensor, spec: Spec, device: torch.device, off: Tensor | None = None) -> Tensor:
    """``values`` in the dtype of ``spec`` on ``device``, NaN in the rows ``off``."""
    made = values.to(getattr(torch, spec.dtype)).to(device)
    return made if off is None else made.masked_fill(off.unsqueeze(-1), math.nan)


def apart(values: Tensor) -> Tensor:
    """Rows with other columns around them; the inverse of ``within``."""
    return torch.nn.functional.pad(values, (OFFSET, MARGIN - OFFSET), value=1.0)


def within(wider: Tensor) -> Tensor:
    """A view of the rows in ``apart``."""
    return wider[:, OFFSET : wider.shape[1] - (MARGIN - OFFSET)]


@dataclass(frozen=True)
class Projection:
    """Hidden states, head and bias of one side, in their dtype on their device."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def projections(
    spec: Spec, setting: Setting, n: int, vocab: int, g: torch.Generator, off: Tensor | None
) -> tuple[Projection, Projection]:
    """Student (with ``extra`` more ids) and teacher; logits have the standard deviation of those of ``logits``."""
    width = setting.sizes.hidden
    hidden = torch.randn(n, width, generator=g, dtype=torch.float64)
    weight = torch.randn(vocab + spec.extra, width, generator=g, dtype=torch.float64) * (SPREAD / width**0.5)
    if spec.logits == "peaked":
        head = weight[torch.randint(0, vocab, (n,), generator=g)]
        hidden = hidden + PEAK * head / head.square().sum(-1, keepdim=True)
    gap = GAP[spec.logits]
    other = hidden + gap * torch.randn(n, width, generator=g, dtype=torch.float64)
    teacher_weight = weight[:vocab] + gap * torch.randn(vocab, width, generator=g, dtype=torch.float64) / width**0.5
    bias = torch.randn(vocab + spec.extra, generator=g, dtype=torch.float64) if spec.bias else None

    def side(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Projection:
        return Projection(
            stored(hidden, spec, setting.device, off),
            stored(weight, spec, setting.device),
            None if bias is None else stored(bias, spec, setting.device),
        )

    return side(hidden, weight, bias), side(other, teacher_weight, None if bias is None else 0.5 * bias[:vocab])


def teacher_list(spec: Spec, teacher: Tensor, k: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """The k most likely ids of float64 logits [n, vocab] in random order, and their float32 log-probabilities."""
    n, vocab = teacher.shape
    log_t = (teacher / spec.temperature).log_softmax(-1)
    ids = log_t.topk(min(k, vocab // 2), dim=-1).indices
    ids = ids.gather(-1, torch.rand(ids.shape, generator=g).argsort(-1))
    logprobs = log_t.gather(-1, ids).float()
    if spec.padded:
        short = torch.arange(ids.shape[-1]) >= ids.shape[-1] - torch.arange(n).unsqueeze(-1) % 3
        ids, logprobs = ids.masked_fill(short, -1), logprobs.masked_fill(short, math.nan)
    return ids, logprobs
