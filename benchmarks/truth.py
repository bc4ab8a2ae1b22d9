"""Loss and gradients in float64, from the definitions and torch's own autograd: what every contender is held to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.inputs import BLOCK_BYTES, Inputs


@dataclass(frozen=True)
class Truth:
    """What the loss and its gradients are.

    Attributes:
        inputs: the tokens it is the truth of.
        loss: float64 scalar, mean over the tokens that count.
        dlogits: float64 [N, V], the gradient with respect to the student's logits (before softcap).
    """

    inputs: Inputs
    loss: Tensor
    dlogits: Tensor

    def loss_error(self, loss: Tensor) -> float:
        """|loss - truth| / |truth|."""
        return float((loss.detach().double() - self.loss).abs() / self.loss.abs())

    def gradient_errors(self, gradients: dict[str, Tensor]) -> dict[str, float]:
        """|g - truth| / |truth| in Euclidean norms, by the name of the input; ``inf`` where a gradient is missing."""
        return {name: self._error(name, gradients.get(name)) for name in self.inputs.leaves()}

    def rows(self, mine: Tensor) -> Tensor:
        """Float64 gradient of hidden states, or of logits, for the tokens of the mask ``mine`` [N]."""
        if not self.inputs.case.linear:
            return self.dlogits[mine]
        weight, part = self.inputs.weight.detach(), self.dlogits[mine]
        total = torch.zeros(part.shape[0], weight.shape[1], dtype=torch.float64, device=weight.device)
        for ids in _ids(weight):
            total += part[:, ids] @ weight[ids].double()
        return total

    def _error(self, name: str, gradient: Tensor | None) -> float:
        if gradient is None:
            return float("inf")
        gradient = gradient.detach()
        wrong = size = torch.zeros((), dtype=torch.float64, device=gradient.device)
        for rows, block in self._gradient(name):
            wrong = wrong + (gradient[rows].double() - block).square().sum()
            size = size + block.square().sum()
        return float((wrong / size).sqrt())

    def _gradient(self, name: str):
        """Blocks (rows, values) of the true gradient; a head's is never held as a whole."""
        if name == "student":
            yield slice(None), self.dlogits
            return
        if name == "hidden":
            yield slice(None), self.rows(torch.ones_like(self.inputs.labels, dtype=torch.bool))
            return
        hidden, weight = self.inputs.hidden.detach().double(), self.inputs.weight
        for ids in _ids(weight):
            yield ids, self.dlogits[:, ids].t() @ hidden


@dataclass(frozen=True)
class Sample:
    """What all tokens together make of the loss, and some rows of its gradients.

    Attributes:
        loss: float64 scalar.
        rows: by the name of the input, which rows: tokens from the first to the last, ids likewise.
        gradients: float64, those rows.
    """

    loss: Tensor
    rows: dict[str, Tensor]
    gradients: dict[str, Tensor]

    def loss_error(self, loss: Tensor) -> float:
        """|loss - truth| / |truth|."""
        return float((loss.detach().double() - self.loss).abs() / self.loss.abs())

    def gradient_errors(self, gradients: dict[str, Tensor]) -> dict[str, float]:
        """|g - truth| / |truth| over the rows, by the name of the input; ``inf`` where a gradient is missing."""
        found = {}
        for name, right in self.gradients.items():
            gradient = gradients.get(name)
            wrong = None if gradient is None else gradient[self.rows[name]].double() - right
            found[name] = float("inf") if wrong is None else float(wrong.norm() / right.norm())
        return found


def sample(inputs: Inputs, n: int) -> Sample:
    """The loss of all tokens of ``inputs`` and ``n`` rows of each gradient, block of tokens by block of tokens."""
    device, per_token = inputs.labels.device, "hidden" if inputs.case.linear else "student"
    counting = torch.arange(inputs.case.n, device=device) if inputs.keep is None else inputs.keep
    rows = {per_token: counting[_spread(counting.shape[0], n).to(device)]}
    gradients = {per_token: []}
    if "weight" in inputs.leaves():
        rows["weight"] = _spread(inputs.case.v, n).to(device)
        gradients["weight"] = torch.zeros(len(rows["weight"]), inputs.case.h, dtype=torch.float64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for block in counting.split(max(1, BLOCK_BYTES // (8 * inputs.case.v))):
        part = truth(inputs.rows(block))
        share = block.shape[0] / counting.shape[0]
        loss += share * part.loss
        mine = torch.isin(block, rows[per_token])
        if bool(mine.any()):
            gradients[per_token].append(share * part.rows(mine))
        if "weight" in rows:
            gradients["weight"] += share * part.dlogits[:, rows["weight"]].t() @ part.inputs.hidden.detach().double()
    return Sample(loss, rows, {**gradients, per_token: torch.cat(gradients[per_token])})


def _spread(of: int, n: int) -> Tensor:
    """``n`` indices, or all there are, from the first to the last."""
    return torch.linspace(0, of - 1, min(n, of), dtype=torch.float64).round().long().unique()


def truth(inputs: Inputs) -> Truth:
    """Loss and gradient of ``inputs`` (few tokens: this holds several float64 [N, V] tensors)."""
    case = inputs.case
    if case.linear:
        logits = _project(inputs.hidden.detach(), inputs.weight.detach())
    else:
        logits = inputs.student.detach().double()
    logits.requires_grad_()
    log_p = _capped(logits, case.softcap).log_softmax(-1)
    kind = case.suite.removeprefix("linear-")
    if kind in ("logits", "linear"):
        per_token = _dense(log_p, inputs)
    else:
        per_token = {"topk": _sparse, "confidence": _confidence, "tokens": _tokens}[kind](log_p, inputs)
    counts = torch.ones_like(per_token) if kind == "confidence" else (inputs.labels != -100).double()
    loss = (per_token * counts).sum() / counts.sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    return Truth(inputs, loss.detach(), gradient)


def _dense(log_s: Tensor, inputs: Inputs) -> Tensor:
    case = inputs.case
    if case.linear:
        teacher = _project(inputs.teacher_hidden, inputs.teacher_weight)
    else:
        teacher = inputs.teacher.double()
    log_t = _capped(teacher, case.softcap).log_softmax(-1)
    return _divergence(log_s, log_t, case.beta)


def _divergence(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    p_s, p_t = log_s.exp(), log_t.exp()
    if beta == 0:
        return (p_t * (log_t - log_s)).sum(-1)
    if beta == 1:
        return (p_s * (log_s - log_t)).sum(-1)
    log_m = (beta * p_t + (1 - beta) * p_s).log()
    return (beta * p_t * (log_t - log_m) + (1 - beta) * p_s * (log_s - log_m)).sum(-1)


def _sparse(log_s: Tensor, inputs: Inputs) -> Tensor:
    """k listed outcomes and everything else as one more."""
    log_t = inputs.teacher_logprobs.double()
    listed = log_s.gather(-1, inputs.teacher_ids)
    elsewhere = torch.ones_like(log_s, dtype=torch.bool).scatter(-1, inputs.teacher_ids, False)
    rest_s = torch.where(elsewhere, log_s, -torch.inf).logsumexp(-1, keepdim=True)
    rest_t = torch.log1p(-log_t.exp().sum(-1, keepdim=True))
    return _divergence(torch.cat([listed, rest_s], -1), torch.cat([log_t, rest_t], -1), inputs.case.beta)


def _confidence(log_p: Tensor, inputs: Inputs) -> Tensor:
    """Cross-entropy to the target, split between the two neighbouring values, and the mass off the candidates."""
    values, target = inputs.candidate_values.double(), inputs.target.double()
    candidates = log_p[:, inputs.candidate_ids]
    inside = candidates.logsumexp(-1)
    above = torch.searchsorted(values, target).clamp(1, len(values) - 1)
    low, high = values[above - 1], values[above]
    share = ((target - low) / (high - low)).clamp(0, 1)
    log_q = candidates - inside.unsqueeze(-1)
    at = torch.arange(len(target), device=target.device)
    return -((1 - share) * log_q[at, above - 1] + share * log_q[at, above]) - inside


def _tokens(log_p: Tensor, inputs: Inputs) -> Tensor:
    """Negative log-likelihood of the labels."""
    return -log_p.gather(-1, inputs.labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _ids(weight: Tensor):
    step = max(1, BLOCK_BYTES // (8 * weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step)


def _project(hidden: Tensor, weight: Tensor) -> Tensor:
    """``hidden @ weight.T`` in float64, the head widened block by block."""
    wide = hidden.double()
    return torch.cat([wide @ weight[ids].double().t() for ids in _ids(weight)], dim=-1)
