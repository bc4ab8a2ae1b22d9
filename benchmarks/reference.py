"""Reference loss and gradients in float64, from ``definitions`` and autograd."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import definitions
from benchmarks.definitions import IGNORE_INDEX
from benchmarks.inputs import Inputs, blocks


@dataclass(frozen=True)
class Reference:
    """The loss of a few tokens and its gradients as a whole.

    Attributes:
        inputs: the tokens.
        loss: float64 scalar, mean over the tokens that are not masked.
        grad_logits: float64 [N, V], gradient of the student's logits before the softcap.
    """

    inputs: Inputs
    loss: Tensor
    grad_logits: Tensor

    def loss_error(self, loss: Tensor) -> float:
        return relative(loss, self.loss)

    def gradient_errors(self, gradients: dict[str, Tensor]) -> dict[str, float]:
        """Relative errors in Euclidean norms, by the name of the input; ``inf`` where a gradient is missing."""
        return {name: self._error(name, gradients.get(name)) for name in self.inputs.leaves()}

    def rows(self, index: Tensor) -> Tensor:
        """Float64 gradient of hidden states, or of logits, for the tokens that ``index`` selects."""
        part = self.grad_logits[index]
        if not self.inputs.case.linear:
            return part
        weight = self.inputs["weight"].detach()
        total = torch.zeros(part.shape[0], weight.shape[1], dtype=torch.float64, device=weight.device)
        for ids in _id_blocks(weight):
            total += part[:, ids] @ weight[ids].double()
        return total

    def _error(self, name: str, gradient: Tensor | None) -> float:
        if gradient is None:
            return float("inf")
        wrong = size = torch.zeros((), dtype=torch.float64, device=gradient.device)
        for rows, block in self._gradient(name):
            wrong = wrong + (gradient.detach()[rows].double() - block).square().sum()
            size = size + block.square().sum()
        return float((wrong / size).sqrt())

    def _gradient(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """Blocks (rows, values) of the gradient of an input; that of a head is never held as a whole."""
        if name == "weight":
            hidden = self.inputs["hidden"].detach().double()
            for ids in _id_blocks(self.inputs["weight"]):
                yield ids, self.grad_logits[:, ids].t() @ hidden
        else:
            yield slice(None), self.rows(torch.arange(self.inputs.case.n, device=self.grad_logits.device))


@dataclass(frozen=True)
class Sample:
    """The loss of all tokens, and some rows of its gradients.

    Attributes:
        loss: float64 scalar.
        rows: by the name of the input, which rows: evenly spaced tokens or ids from the first to the last.
        gradients: float64, those rows.
    """

    loss: Tensor
    rows: dict[str, Tensor]
    gradients: dict[str, Tensor]

    def loss_error(self, loss: Tensor) -> float:
        return relative(loss, self.loss)

    def gradient_errors(self, gradients: dict[str, Tensor]) -> dict[str, float]:
        """Relative errors of the rows in Euclidean norms, by input; ``inf`` where a gradient is missing."""
        return {
            name: relative(gradients[name][self.rows[name]], right) if name in gradients else float("inf")
            for name, right in self.gradients.items()
        }


def relative(value: Tensor, right: Tensor) -> float:
    """|value - right| / |right| in Euclidean norms."""
    return float((value.detach().double() - right).norm() / right.norm())


def sample(inputs: Inputs, n: int) -> Sample:
    """The loss of all tokens and ``n`` rows of each gradient, computed in blocks of tokens."""
    case, labels, per_token = inputs.case, inputs["labels"], "hidden" if inputs.case.linear else "student"
    unmasked = inputs.tensors.get("keep", torch.arange(case.n, device=labels.device))
    tokens, ids = (_spread(count, n).to(labels.device) for count in (unmasked.shape[0], case.v))
    tokens = unmasked[tokens]
    loss = torch.zeros((), dtype=torch.float64, device=labels.device)
    found: list[Tensor] = []
    grad_weight = torch.zeros(len(ids), case.h, dtype=torch.float64, device=labels.device)
    for block in blocks(unmasked.shape[0], 8 * case.v):
        part = reference(inputs.rows(unmasked[block]))
        share = (block.stop - block.start) / unmasked.shape[0]
        loss += share * part.loss
        found.append(share * part.rows(torch.isin(unmasked[block], tokens)))
        if "weight" in inputs.leaves():
            grad_weight += share * part.grad_logits[:, ids].t() @ part.inputs["hidden"].detach().double()
    rows, gradients = {per_token: tokens}, {per_token: torch.cat(found)}
    if "weight" in inputs.leaves():
        rows["weight"], gradients["weight"] = ids, grad_weight
    return Sample(loss, rows, gradients)


def _spread(of: int, n: int) -> Tensor:
    """``n`` evenly spaced indices from the first to the last, or all there are."""
    return torch.linspace(0, of - 1, min(n, of), dtype=torch.float64).round().long().unique()


def reference(inputs: Inputs) -> Reference:
    """Loss and gradient of ``inputs`` (few tokens: this holds several float64 [N, V] tensors)."""
    case = inputs.case
    if case.linear:
        logits = _project(inputs["hidden"].detach(), inputs["weight"].detach())
    else:
        logits = inputs["student"].detach().double()
    logits.requires_grad_()
    per_token = _per_token(_log_p(inputs, logits), inputs)
    counts = torch.ones_like(per_token) if case.kind == "confidence" else (inputs["labels"] != IGNORE_INDEX).double()
    loss = (per_token * counts).sum() / counts.sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    return Reference(inputs, loss.detach(), gradient)


def _log_p(inputs: Inputs, logits: Tensor) -> Tensor:
    return definitions.log_softmax(definitions.tempered(logits, 1.0, inputs.case.softcap))


def _per_token(log_p: Tensor, inputs: Inputs) -> Tensor:
    """The loss of each token, for the student's log-probabilities [N, V]."""
    case = inputs.case
    if case.kind == "tokens":
        return -definitions.picked(log_p, inputs["labels"])
    if case.kind == "confidence":
        return definitions.confidence(
            log_p[:, inputs["candidate_ids"]], inputs["candidate_values"], inputs["target"], None,
            kind="cross_entropy", outside_weight=1.0, eps=0.0, reduction="none",
        )["loss"]  # fmt: skip
    if case.kind == "topk":
        ids, logprobs = inputs["teacher_ids"], inputs["teacher_logprobs"].double()
        return definitions.divergence(*definitions.outcomes(log_p, ids, logprobs, "bucket"), case.beta)
    teacher = (
        _project(inputs["teacher_hidden"], inputs["teacher_weight"]) if case.linear else inputs["teacher"].double()
    )
    return definitions.divergence(log_p, _log_p(inputs, teacher), case.beta)


def _id_blocks(weight: Tensor) -> Iterator[slice]:
    """Blocks of a head's rows that are small in float64."""
    return blocks(weight.shape[0], 8 * weight.shape[1])


def _project(hidden: Tensor, weight: Tensor) -> Tensor:
    """``hidden @ weight.T`` in float64; the head is converted in blocks."""
    wide = hidden.double()
    return torch.cat([wide @ weight[ids].double().t() for ids in _id_blocks(weight)], dim=-1)
