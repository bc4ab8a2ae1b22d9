"""The inputs of a case: peaked student logits and a teacher near them, as self-distillation has them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import CANDIDATES, LISTED, Case

SPREAD = 2.5  # standard deviation of the logits
GAP = 0.05  # of teacher and student, as a share of it: a divergence near 0.004
ODDS = (-4.0, 6.0)  # logarithm of those of one id of each token: as after training, some tokens are all but sure
BLOCK_BYTES = 1 << 28  # what making an input may take beside it


@dataclass(frozen=True)
class Inputs:
    """Tensors of one case; those with ``requires_grad`` are what gradients are taken of.

    Attributes:
        case: what they are the inputs of.
        labels: [N] int64, -100 where a token does not count.
        keep: [M] int64, the tokens that count, or None for all; a trainer knows them on the host.
        student, teacher: [N, V] logits, at logits level; ``teacher`` where it is dense.
        hidden, weight: [N, H], [V, H] of the student, elsewhere.
        teacher_hidden, teacher_weight: [N, H], [V, H], where the teacher is dense.
        teacher_ids, teacher_logprobs: [N, k] int64 and float32, where the teacher is sparse.
        candidate_ids, candidate_values, target: [C] int64, [C] and [N] float32, for the confidence losses.
    """

    case: Case
    labels: Tensor
    keep: Tensor | None = None
    student: Tensor | None = None
    teacher: Tensor | None = None
    hidden: Tensor | None = None
    weight: Tensor | None = None
    teacher_hidden: Tensor | None = None
    teacher_weight: Tensor | None = None
    teacher_ids: Tensor | None = None
    teacher_logprobs: Tensor | None = None
    candidate_ids: Tensor | None = None
    candidate_values: Tensor | None = None
    target: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All there are, by name."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def leaves(self) -> dict[str, Tensor]:
        """Those that get a gradient."""
        return {name: value for name, value in self.tensors().items() if value.requires_grad}

    def counting(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Rows of the tokens that count, picked by what the host knows: no device is asked."""
        return tensors if self.keep is None else tuple(t.index_select(0, self.keep) for t in tensors)

    @property
    def count(self) -> int:
        """Tokens that count."""
        return self.case.n if self.keep is None else self.keep.shape[0]

    def bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors().values())

    def copy(self) -> Inputs:
        """The same values elsewhere in memory."""
        made = {name: t.detach().clone().requires_grad_(t.requires_grad) for name, t in self.tensors().items()}
        return dataclasses.replace(self, **made)

    def first(self, n: int) -> Inputs:
        """The first ``n`` tokens."""
        return self.rows(torch.arange(min(n, self.case.n), device=self.labels.device))

    def rows(self, index: Tensor) -> Inputs:
        """The tokens at ``index`` [M], with gradients of their own; heads and candidates share their memory."""
        made: dict[str, Tensor | None] = {}
        for name, tensor in self.tensors().items():
            whole = name in ("weight", "teacher_weight", "candidate_ids", "candidate_values")
            part = tensor.detach() if whole else tensor.detach()[index] if name != "keep" else None
            made[name] = None if part is None else part.requires_grad_(tensor.requires_grad)
        if self.keep is not None:
            made["keep"] = (made["labels"] != -100).nonzero().squeeze(1)
        return dataclasses.replace(self, case=dataclasses.replace(self.case, n=index.shape[0]), **made)


def make(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Inputs of ``case`` on ``device``, the same for equal seeds."""
    generator = torch.Generator(device=device).manual_seed(seed)
    draw = _Draw(device, generator)
    labels = torch.randint(0, case.v, (case.n,), device=device, generator=generator)
    keep = None
    if case.masked:
        counts = torch.rand(case.n, device=device, generator=generator) >= case.masked
        counts[0] = True  # never none at all
        labels = torch.where(counts, labels, -100)
        keep = counts.nonzero().squeeze(1)
    parts = _linear(case, draw) if case.linear else _logits(case, draw)
    if case.suite.endswith("confidence"):
        parts["candidate_ids"] = torch.randperm(case.v, device=device, generator=generator)[:CANDIDATES].sort().values
        parts["candidate_values"] = torch.linspace(0, 1, CANDIDATES, device=device)
        parts["target"] = torch.rand(case.n, device=device, generator=generator)
    return Inputs(case, labels, keep, **parts)


@dataclass(frozen=True)
class _Draw:
    device: torch.device
    generator: torch.Generator

    def normal(self, rows: int, columns: int, scale: float, dtype: torch.dtype) -> Tensor:
        out = torch.empty(rows, columns, dtype=dtype, device=self.device)
        for block in blocks(rows, 4 * columns):
            shape = (block.stop - block.start, columns)
            out[block] = torch.randn(shape, device=self.device, generator=self.generator) * scale
        return out

    def peaks(self, case: Case) -> tuple[Tensor, Tensor]:
        """[N] ids, and the logit of each: over what all others sum to."""
        ids = torch.randint(0, case.v, (case.n,), device=self.device, generator=self.generator)
        odds = torch.empty(case.n, device=self.device).uniform_(*ODDS, generator=self.generator)
        return ids, math.log(case.v) + SPREAD**2 / 2 + odds


def blocks(rows: int, bytes_per_row: int) -> Iterator[slice]:
    """Slices of rows of at most ``BLOCK_BYTES``."""
    step = max(1, BLOCK_BYTES // max(1, bytes_per_row))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _logits(case: Case, draw: _Draw) -> dict[str, Tensor]:
    dtype = getattr(torch, case.dtype)
    student = draw.normal(case.n, case.v, SPREAD, dtype)
    ids, heights = draw.peaks(case)
    student.scatter_(1, ids.unsqueeze(1), heights.unsqueeze(1).to(dtype))
    if case.suite not in ("logits", "topk"):
        return {"student": student.requires_grad_()}
    teacher = student.clone()
    for block in blocks(case.n, 4 * case.v):
        noise = torch.randn(teacher[block].shape, device=draw.device, generator=draw.generator)
        teacher[block] += (noise * (GAP * SPREAD)).to(dtype)
    if case.suite == "logits":
        return {"student": student.requires_grad_(), "teacher": teacher}
    return {"student": student.requires_grad_(), **_listed(case, (teacher[b] for b in blocks(case.n, 4 * case.v)))}


def _linear(case: Case, draw: _Draw) -> dict[str, Tensor]:
    dtype = getattr(torch, case.dtype)
    hidden = draw.normal(case.n, case.h, 1.0, dtype)
    weight = draw.normal(case.v, case.h, SPREAD / case.h**0.5, dtype)
    ids, heights = draw.peaks(case)
    for block in blocks(case.n, 8 * case.h):  # as far along the id's row of the head as brings its logit there
        row = weight[ids[block]].float()
        missing = heights[block] - (row * hidden[block]).sum(1)
        hidden[block] += ((missing / row.square().sum(1)).unsqueeze(1) * row).to(dtype)
    made = {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_(bool(case.head_trained))}
    if case.suite not in ("linear", "linear-topk"):
        return made
    teacher_hidden = hidden.detach() + draw.normal(case.n, case.h, GAP, dtype)
    teacher_weight = weight.detach().clone()  # a tensor of its own: an averaged teacher is no view of the student
    if case.suite == "linear":
        return {**made, "teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight}
    rows = (teacher_hidden[b] @ teacher_weight.t() for b in blocks(case.n, 4 * case.v))
    return {**made, **_listed(case, rows)}


def _listed(case: Case, logit_blocks: Iterator[Tensor]) -> dict[str, Tensor]:
    """The k likeliest ids of a teacher and their log-probabilities."""
    found = []
    for z in logit_blocks:
        z = z.float() if case.softcap is None else case.softcap * torch.tanh(z.float() / case.softcap)
        found.append(z.log_softmax(-1).topk(min(LISTED, case.v // 2), dim=-1))
    return {
        "teacher_ids": torch.cat([f.indices for f in found]),
        "teacher_logprobs": torch.cat([f.values for f in found]),
    }
