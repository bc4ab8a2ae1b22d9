"""The inputs of a case, and what is right for them: the loss and rows of its gradients in float64.

Student logits are peaked and a teacher is near them, as in self-distillation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import CANDIDATES, TOP_K, Case

IGNORE_INDEX = -100
SPREAD = 2.5  # standard deviation of the logits
GAP = 0.05  # between teacher and student, as a share of SPREAD: a divergence near 0.004
ODDS = (-4.0, 6.0)  # log odds of one id of each token: as after training, some tokens are nearly certain
BLOCK_BYTES = 1 << 28  # of temporary memory while inputs and references are made
SHARED = ("weight", "teacher_weight", "candidate_ids", "candidate_values")  # have no row for each token


@dataclass(frozen=True)
class Inputs:
    """Tensors of one case by name; those with ``requires_grad`` get a gradient.

    "labels" [N] int64, -100 where a token is masked, and "keep" [M] int64, the tokens that are not, if some are;
    "student" and "teacher" [N, V], or "hidden" [N, H], "weight" [V, H], "teacher_hidden" and "teacher_weight"; of a
    sparse teacher "teacher_ids" int64 and "teacher_logprobs" float32 [N, k]; of confidence losses "candidate_ids" [C]
    int64, "candidate_values" [C] and "target" [N] float32.
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
        keep = self.tensors.get("keep")
        return tuple(self[n] if keep is None or n in SHARED else self[n].index_select(0, keep) for n in names)

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


@dataclass(frozen=True)
class Reference:
    """The loss of all tokens in float64, and some rows of its gradients by the name of the input."""

    loss: Tensor
    rows: dict[str, Tensor]  # evenly spaced tokens or ids from the first to the last
    gradients: dict[str, Tensor]

    def errors(self, loss: Tensor, gradients: dict[str, Tensor]) -> dict[str, float]:
        """|value - right| / |right| (Euclidean norms) of the "loss" and each gradient; ``inf`` where one is missing."""
        found = {"loss": _relative(loss, self.loss)}
        for name, right in self.gradients.items():
            there = gradients.get(name)
            found[name] = math.inf if there is None else _relative(there[self.rows[name]], right)
        return found


def reference(inputs: Inputs, n: int | None = None) -> Reference:
    """The reference of ``n`` rows of each gradient (None for all), computed in blocks of tokens."""
    case, labels, per_token = inputs.case, inputs["labels"], "hidden" if inputs.case.linear else "student"
    unmasked = inputs.tensors.get("keep", torch.arange(case.n, device=labels.device))
    tokens, ids = (_spread(count, n).to(labels.device) for count in (case.n, case.v))
    counted = torch.isin(tokens, unmasked)  # the gradient of the others is 0
    loss = torch.zeros((), dtype=torch.float64, device=labels.device)
    found: list[Tensor] = []
    grad_weight = torch.zeros(len(ids), case.h, dtype=torch.float64, device=labels.device)
    for block in blocks(unmasked.shape[0], 8 * case.v):
        part = inputs.rows(unmasked[block])
        logits = _logits_of(part, "hidden", "weight") if case.linear else part["student"].detach().double()
        logits.requires_grad_()
        value = _per_token(_log_p(case, logits), part).sum() / unmasked.shape[0]
        (grad,) = torch.autograd.grad(value, logits)
        loss += value.detach()
        chosen = grad[torch.isin(unmasked[block], tokens)]
        found.append(_times_head(chosen, part["weight"]) if case.linear else chosen)
        if "weight" in inputs.leaves():
            grad_weight += grad[:, ids].t() @ part["hidden"].detach().double()
    values = torch.cat(found)
    gradient = values.new_zeros(len(tokens), values.shape[1])
    gradient[counted] = values
    rows, gradients = {per_token: tokens}, {per_token: gradient}
    if "weight" in inputs.leaves():
        rows["weight"], gradients["weight"] = ids, grad_weight
    return Reference(loss, rows, gradients)


def _spread(of: int, n: int | None) -> Tensor:
    """``n`` evenly spaced indices from the first to the last, or all there are."""
    return torch.linspace(0, of - 1, of if n is None else min(n, of), dtype=torch.float64).round().long().unique()


def _relative(value: Tensor, right: Tensor) -> float:
    return float((value.detach().double() - right).norm() / right.norm())


def _logits_of(inputs: Inputs, hidden: str, weight: str) -> Tensor:
    """``hidden @ weight.T`` in float64; the head is converted in blocks."""
    wide, head = inputs[hidden].detach().double(), inputs[weight].detach()
    return torch.cat([wide @ head[ids].double().t() for ids in blocks(head.shape[0], 8 * head.shape[1])], dim=-1)


def _times_head(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of hidden states for that of their logits."""
    total = grad.new_zeros(grad.shape[0], weight.shape[1])
    for ids in blocks(weight.shape[0], 8 * weight.shape[1]):
        total += grad[:, ids] @ weight.detach()[ids].double()
    return total


def _log_p(case: Case, logits: Tensor) -> Tensor:
    capped = logits if case.softcap is None else case.softcap * torch.tanh(logits / case.softcap)
    return capped.log_softmax(-1)


def _per_token(log_p: Tensor, inputs: Inputs) -> Tensor:
    """The loss of each token from its definition, for the student's log-probabilities [N, V]."""
    case = inputs.case
    if case.kind == "tokens":
        return -log_p.gather(-1, inputs["labels"].unsqueeze(-1)).squeeze(-1)
    if case.kind == "confidence":
        return _score(log_p[:, inputs["candidate_ids"]], inputs["candidate_values"].double(), inputs["target"].double())
    if case.kind == "topk":  # the listed ids, and all others as one more outcome
        ids, listed = inputs["teacher_ids"], inputs["teacher_logprobs"].double()
        other = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        log_t = torch.cat([listed, torch.log1p(-listed.exp().sum(-1, keepdim=True))], -1)
        return divergence(torch.cat([log_p.gather(-1, ids), other], -1), log_t, case.beta)
    teacher = _logits_of(inputs, "teacher_hidden", "teacher_weight") if case.linear else inputs["teacher"].double()
    return divergence(log_p, _log_p(case, teacher), case.beta)


def divergence(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    """KL(t||s) for beta 0, KL(s||t) for 1, between them beta KL(t||m) + (1 - beta) KL(s||m) (last dimension)."""
    if beta in (0, 1):
        return _kl(log_s, log_t) if beta else _kl(log_t, log_s)
    log_m = torch.logaddexp(math.log(beta) + log_t, math.log(1 - beta) + log_s)
    return beta * _kl(log_t, log_m) + (1 - beta) * _kl(log_s, log_m)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _score(log_p: Tensor, values: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of the candidates to a target between two of them, minus the log of the mass on all candidates."""
    position = target * (len(values) - 1)  # the values are evenly spaced over [0, 1]
    mass = (1 - (position.unsqueeze(-1) - torch.arange(len(values), device=values.device)).abs()).clamp(min=0)
    inside = log_p.logsumexp(-1, keepdim=True)
    return -(mass * (log_p - inside)).sum(-1) - inside.squeeze(-1)
