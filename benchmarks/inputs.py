"""The inputs of a case: peaked student logits and a teacher near them, as in self-distillation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import CANDIDATES, TOP_K, Case
from benchmarks.definitions import IGNORE_INDEX

SPREAD = 2.5  # standard deviation of the logits
GAP = 0.05  # between teacher and student, as a share of SPREAD: a divergence near 0.004
ODDS = (-4.0, 6.0)  # log odds of one id of each token: as after training, some tokens are nearly certain
BLOCK_BYTES = 1 << 28  # of temporary memory while inputs are made
SHARED = ("weight", "teacher_weight", "candidate_ids", "candidate_values")  # have no row for each token


@dataclass(frozen=True)
class Inputs:
    """Tensors of one case by name; those with ``requires_grad`` get a gradient.

    * all: "labels" [N] int64, -100 where a token is masked; "keep" [M] int64, the tokens that are not, if some are.
    * losses on logits: "student" [N, V], and "teacher" [N, V] where the teacher is dense.
    * linear losses: "hidden" [N, H] and "weight" [V, H], and "teacher_hidden", "teacher_weight" alike.
    * sparse teachers: "teacher_ids" int64 and "teacher_logprobs" float32, [N, k].
    * confidence losses: "candidate_ids" [C] int64, "candidate_values" [C] and "target" [N] float32.
    """

    case: Case
    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def leaves(self) -> dict[str, Tensor]:
        """Those that get a gradient."""
        return {name: value for name, value in self.tensors.items() if value.requires_grad}

    def clear(self) -> None:
        """Drop the gradients."""
        for leaf in self.leaves().values():
            leaf.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """The gradients that there are, by the name of the input."""
        return {name: leaf.grad for name, leaf in self.leaves().items() if leaf.grad is not None}

    def unmasked(self, *names: str) -> tuple[Tensor, ...]:
        """The rows that are not masked; which they are is known on the host, as in a trainer, so nothing waits."""
        found = tuple(self.tensors[name] for name in names)
        if "keep" not in self.tensors:
            return found
        return tuple(t.index_select(0, self.tensors["keep"]) for t in found)

    @property
    def count(self) -> int:
        """Number of tokens that are not masked."""
        return self.tensors["keep"].shape[0] if "keep" in self.tensors else self.case.n

    def bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def copy(self) -> Inputs:
        """The same values in other memory."""
        made = {name: t.detach().clone().requires_grad_(t.requires_grad) for name, t in self.tensors.items()}
        return Inputs(self.case, made)

    def first(self, n: int) -> Inputs:
        """The first ``n`` tokens."""
        return self.rows(torch.arange(min(n, self.case.n), device=self["labels"].device))

    def rows(self, index: Tensor) -> Inputs:
        """The tokens at ``index`` [M], with gradients of their own; heads and candidates share their memory."""
        made = {}
        for name, tensor in self.tensors.items():
            part = tensor.detach() if name in SHARED else tensor.detach()[index] if name != "keep" else None
            if part is not None:
                made[name] = part.requires_grad_(tensor.requires_grad)
        if "keep" in self.tensors:
            made["keep"] = (made["labels"] != IGNORE_INDEX).nonzero().squeeze(1)
        return Inputs(dataclasses.replace(self.case, n=index.shape[0]), made)


def make(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Inputs of ``case`` on ``device``, the same for equal seeds."""
    generator = torch.Generator(device=device).manual_seed(seed)
    draw = _Draw(device, generator)
    made = {"labels": torch.randint(0, case.v, (case.n,), device=device, generator=generator)}
    if case.masked:
        counts = torch.rand(case.n, device=device, generator=generator) >= case.masked
        counts[0] = True  # at least one
        made["labels"].masked_fill_(~counts, IGNORE_INDEX)
        made["keep"] = counts.nonzero().squeeze(1)
    made |= _linear(case, draw) if case.linear else _logits(case, draw)
    if case.kind == "confidence":
        ids = torch.randperm(case.v, device=device, generator=generator)[:CANDIDATES]
        made["candidate_ids"] = ids.sort().values
        made["candidate_values"] = torch.linspace(0, 1, CANDIDATES, device=device)
        made["target"] = torch.rand(case.n, device=device, generator=generator)
    return Inputs(case, made)


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
        """[N] ids and the logit of each: the log-sum-exp of all others, about, plus the log odds."""
        ids = torch.randint(0, case.v, (case.n,), device=self.device, generator=self.generator)
        odds = torch.empty(case.n, device=self.device).uniform_(*ODDS, generator=self.generator)
        return ids, math.log(case.v) + SPREAD**2 / 2 + odds


def blocks(rows: int, bytes_per_row: int) -> Iterator[slice]:
    """Slices of rows of at most ``BLOCK_BYTES`` each."""
    step = max(1, BLOCK_BYTES // max(1, bytes_per_row))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _logits(case: Case, draw: _Draw) -> dict[str, Tensor]:
    dtype = getattr(torch, case.dtype)
    student = draw.normal(case.n, case.v, SPREAD, dtype)
    ids, heights = draw.peaks(case)
    student.scatter_(1, ids.unsqueeze(1), heights.unsqueeze(1).to(dtype))
    if case.kind not in ("logits", "topk"):
        return {"student": student.requires_grad_()}
    teacher = student.clone()
    for block in blocks(case.n, 4 * case.v):
        noise = torch.randn(teacher[block].shape, device=draw.device, generator=draw.generator)
        teacher[block] += (noise * (GAP * SPREAD)).to(dtype)
    if case.suite == "logits":
        return {"student": student.requires_grad_(), "teacher": teacher}
    return {"student": student.requires_grad_(), **_top_k(case, (teacher[b] for b in blocks(case.n, 4 * case.v)))}


def _linear(case: Case, draw: _Draw) -> dict[str, Tensor]:
    dtype = getattr(torch, case.dtype)
    hidden = draw.normal(case.n, case.h, 1.0, dtype)
    weight = draw.normal(case.v, case.h, SPREAD / case.h**0.5, dtype)
    ids, heights = draw.peaks(case)
    for block in blocks(case.n, 8 * case.h):  # moved along the id's row of the head until its logit is the chosen one
        row = weight[ids[block]].float()
        missing = heights[block] - (row * hidden[block]).sum(1)
        hidden[block] += ((missing / row.square().sum(1)).unsqueeze(1) * row).to(dtype)
    made = {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_(case.head_trained)}
    if case.kind not in ("logits", "topk"):
        return made
    teacher_hidden = hidden.detach() + draw.normal(case.n, case.h, GAP, dtype)
    teacher_weight = weight.detach().clone()  # a tensor of its own, as the weights of an averaged teacher are
    if case.suite == "linear":
        return {**made, "teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight}
    rows = (teacher_hidden[b] @ teacher_weight.t() for b in blocks(case.n, 4 * case.v))
    return {**made, **_top_k(case, rows)}


def _top_k(case: Case, logit_blocks: Iterator[Tensor]) -> dict[str, Tensor]:
    """The k most likely ids of a teacher and their log-probabilities."""
    found = []
    for z in logit_blocks:
        z = z.float() if case.softcap is None else case.softcap * torch.tanh(z.float() / case.softcap)
        found.append(z.log_softmax(-1).topk(min(TOP_K, case.v // 2), dim=-1))
    return {
        "teacher_ids": torch.cat([f.indices for f in found]),
        "teacher_logprobs": torch.cat([f.values for f in found]),
    }
