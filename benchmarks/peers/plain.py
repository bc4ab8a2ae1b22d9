"""Each loss as it is usually written in PyTorch, on whole [N, V] tensors in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import SUITES, Case
from benchmarks.inputs import Inputs
from benchmarks.peers.peer import Loss, Peer


def distillation(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Mean forward KL, and per token the KL, both log-probabilities of the label and both entropies."""
    return divergence(student_logits.float(), teacher_logits.float(), labels, 0.0)


def linear_distillation(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor
) -> tuple[Tensor, ...]:
    """The same from hidden states and heads."""

    @torch.no_grad()
    def theirs() -> Tensor:
        return (teacher_hidden @ teacher_weight.t()).float()

    return divergence((student_hidden @ student_weight.t()).float(), theirs(), labels, 0.0)  # no name holds logits


def divergence(student: Tensor, teacher: Tensor, labels: Tensor, beta: float) -> tuple[Tensor, ...]:
    """Of float32 logits: the mean divergence, and per token what ``distillation`` gives."""
    student = F.log_softmax(student, dim=-1)  # one after the other: the logits are let go in between
    teacher = F.log_softmax(teacher, dim=-1)
    per_token = between(student, teacher, beta)
    column = labels.unsqueeze(-1)
    student_logprob = student.gather(-1, column).squeeze(-1)
    teacher_logprob = teacher.gather(-1, column).squeeze(-1)
    with torch.no_grad():
        student_entropy = -(student.exp() * student).sum(-1)
        teacher_entropy = -(teacher.exp() * teacher).sum(-1)
    return per_token.mean(), per_token, student_logprob, teacher_logprob, student_entropy, teacher_entropy


def between(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Divergence [N] of log-probabilities [N, V]: 0 forward KL, 1 reverse KL, between the mixture (GKD)."""
    if beta == 0:
        return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    if beta == 1:
        return F.kl_div(teacher, student, reduction="none", log_target=True).sum(-1)
    shares = torch.tensor([1 - beta, beta], dtype=student.dtype, device=student.device).log()
    mixture = torch.logsumexp(torch.stack([student + shares[0], teacher + shares[1]]), dim=0)
    to_teacher = F.kl_div(mixture, teacher, reduction="none", log_target=True).sum(-1)
    return beta * to_teacher + (1 - beta) * F.kl_div(mixture, student, reduction="none", log_target=True).sum(-1)


def sparse(student: Tensor, ids: Tensor, logprobs: Tensor, labels: Tensor, beta: float) -> tuple[Tensor, ...]:
    """Against k listed ids and a bucket for all else; the log-probability of the label and the entropy with it."""
    student = F.log_softmax(student, dim=-1)
    listed = student.gather(-1, ids)
    sides = []
    for side in (listed, logprobs):
        inside = torch.logsumexp(side, dim=-1, keepdim=True).clamp(max=-1e-7)
        sides.append(torch.cat([side, torch.log(-torch.expm1(inside))], dim=-1))
    per_token = between(*sides, beta)
    with torch.no_grad():
        entropy = -(student.exp() * student).sum(-1)
    return per_token.mean(), student.gather(-1, labels.unsqueeze(-1)).squeeze(-1), entropy


def score(logits: Tensor, ids: Tensor, values: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Cross-entropy of the candidates to the target, split between its neighbours, and the mass off the candidates.

    With it the expected value, its variance and the mass outside, per token.
    """
    candidates = F.log_softmax(logits, dim=-1)[:, ids]
    inside = torch.logsumexp(candidates, dim=-1)
    above = torch.searchsorted(values, target).clamp(1, values.shape[0] - 1)
    low, high = values[above - 1], values[above]
    share = ((target - low) / (high - low)).clamp(0, 1).unsqueeze(-1)
    log_q = candidates - inside.unsqueeze(-1)
    picked = (1 - share) * log_q.gather(-1, above.unsqueeze(-1) - 1) + share * log_q.gather(-1, above.unsqueeze(-1))
    with torch.no_grad():
        q = log_q.exp()
        expected = (q * values).sum(-1)
        variance = (q * (values - expected.unsqueeze(-1)).square()).sum(-1)
    return -(picked.squeeze(-1) + inside).mean(), expected, variance, -torch.expm1(inside.detach())


def tokens(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean negative log-probability of the labels, and the entropies."""
    log_p = F.log_softmax(logits, dim=-1)
    del logits
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1)
    return -log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1).mean(), entropy


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Float32 logits after the softcap."""
    logits = logits.float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def first(run: Callable[[Inputs], tuple[Tensor, ...]], compiled: bool) -> Loss:
    """The loss of ``run``; compiled with all that ``run`` returns, or the compiler would leave the statistics out."""
    whole = torch.compile(run, dynamic=False) if compiled else run
    return lambda i: whole(i)[0]


def build(case: Case, *, compiled: bool = False) -> Loss:
    """The loss of ``case`` on the tokens that count; ``compiled`` by ``torch.compile`` as a whole."""

    def student_logits(i: Inputs) -> Tensor:
        if not case.linear:
            return capped(i.counting(i.student)[0], case.softcap)
        return capped(i.counting(i.hidden)[0] @ i.weight.t(), case.softcap)

    def teacher_logits(i: Inputs) -> Tensor:
        with torch.no_grad():
            if not case.linear:
                return capped(i.counting(i.teacher)[0], case.softcap)
            return capped(i.counting(i.teacher_hidden)[0] @ i.teacher_weight.t(), case.softcap)

    def dense(i: Inputs) -> tuple[Tensor, ...]:
        (labels,) = i.counting(i.labels)  # a starred argument, or a name for the logits, would hold them
        return divergence(student_logits(i), teacher_logits(i), labels, case.beta)

    def listed(i: Inputs) -> tuple[Tensor, ...]:
        ids, logprobs, labels = i.counting(i.teacher_ids, i.teacher_logprobs, i.labels)
        return sparse(student_logits(i), ids, logprobs, labels, case.beta)

    def confidence(i: Inputs) -> tuple[Tensor, ...]:
        return score(student_logits(i), i.candidate_ids, i.candidate_values, i.target)

    def one_model(i: Inputs) -> tuple[Tensor, ...]:
        (labels,) = i.counting(i.labels)
        return tokens(student_logits(i), labels)

    kind = case.suite.removeprefix("linear-")
    return first({"topk": listed, "confidence": confidence, "tokens": one_model}.get(kind, dense), compiled)


GIVES = {
    **dict.fromkeys(("linear", "logits"), "loss, both log-probabilities, both entropies"),
    "topk": "loss, log-probability, entropy",
    "confidence": "loss, expected value, variance, mass outside",
    "tokens": "log-probability, entropy",
}

PEERS = (
    Peer("plain", SUITES, build, gives=GIVES, rounding=True),
    Peer("plain-compiled", SUITES, lambda case: build(case, compiled=True), gives=GIVES, rounding=True),
)
