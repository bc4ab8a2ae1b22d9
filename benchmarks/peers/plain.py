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
    def teacher_logits() -> Tensor:
        return (teacher_hidden @ teacher_weight.t()).float()

    return divergence((student_hidden @ student_weight.t()).float(), teacher_logits(), labels, 0.0)


def divergence(student: Tensor, teacher: Tensor, labels: Tensor, beta: float) -> tuple[Tensor, ...]:
    """Of float32 logits: the mean divergence, and per token what ``distillation`` returns."""
    student = F.log_softmax(student, dim=-1)  # the logits are freed before the next line
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
    """Divergence [N] of log-probabilities [N, V]: beta 0 forward KL, 1 reverse KL, between them that of GKD."""
    if beta == 0:
        return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    if beta == 1:
        return F.kl_div(teacher, student, reduction="none", log_target=True).sum(-1)
    shares = torch.tensor([1 - beta, beta], dtype=student.dtype, device=student.device).log()
    mixture = torch.logsumexp(torch.stack([student + shares[0], teacher + shares[1]]), dim=0)
    to_teacher = F.kl_div(mixture, teacher, reduction="none", log_target=True).sum(-1)
    return beta * to_teacher + (1 - beta) * F.kl_div(mixture, student, reduction="none", log_target=True).sum(-1)


def sparse(student: Tensor, ids: Tensor, logprobs: Tensor, labels: Tensor, beta: float) -> tuple[Tensor, ...]:
    """Against k listed ids and one outcome for all others; also the log-probability of the label and the entropy."""
    student = F.log_softmax(student, dim=-1)
    listed = student.gather(-1, ids)
    per_token = between(with_rest(listed), with_rest(logprobs), beta)
    with torch.no_grad():
        entropy = -(student.exp() * student).sum(-1)
    return per_token.mean(), student.gather(-1, labels.unsqueeze(-1)).squeeze(-1), entropy


def with_rest(log_p: Tensor) -> Tensor:
    """``log_p`` [N, k] and the log-probability of all other ids [N, k + 1]."""
    inside = torch.logsumexp(log_p, dim=-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([log_p, torch.log(-torch.expm1(inside))], dim=-1)


def score(logits: Tensor, ids: Tensor, values: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Cross-entropy of the candidates to the interpolated target, minus the log of the mass on the candidates.

    Also the expected value, its variance and the mass outside, per token.
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
    """The loss that ``run`` returns first; it is compiled as a whole, or the statistics would be eliminated."""
    whole = torch.compile(run, dynamic=False) if compiled else run
    return lambda i: whole(i)[0]


def build(case: Case, *, compiled: bool = False) -> Loss:
    """The loss of ``case`` on the unmasked tokens; ``compiled`` by ``torch.compile`` as a whole."""

    def student_logits(i: Inputs) -> Tensor:
        if not case.linear:
            return capped(i.unmasked("student")[0], case.softcap)
        return capped(i.unmasked("hidden")[0] @ i["weight"].t(), case.softcap)

    def teacher_logits(i: Inputs) -> Tensor:
        with torch.no_grad():
            if not case.linear:
                return capped(i.unmasked("teacher")[0], case.softcap)
            return capped(i.unmasked("teacher_hidden")[0] @ i["teacher_weight"].t(), case.softcap)

    def dense(i: Inputs) -> tuple[Tensor, ...]:
        (labels,) = i.unmasked("labels")  # no variable for the logits, which would keep them alive
        return divergence(student_logits(i), teacher_logits(i), labels, case.beta)

    def listed(i: Inputs) -> tuple[Tensor, ...]:
        ids, logprobs, labels = i.unmasked("teacher_ids", "teacher_logprobs", "labels")
        return sparse(student_logits(i), ids, logprobs, labels, case.beta)

    def confidence(i: Inputs) -> tuple[Tensor, ...]:
        return score(student_logits(i), i["candidate_ids"], i["candidate_values"], i["target"])

    def one_model(i: Inputs) -> tuple[Tensor, ...]:
        (labels,) = i.unmasked("labels")
        return tokens(student_logits(i), labels)

    by_kind = {"logits": dense, "topk": listed, "confidence": confidence, "tokens": one_model}
    return first(by_kind[case.kind], compiled)


GIVES = {
    "logits": "loss, both log-probabilities, both entropies",
    "topk": "loss, log-probability, entropy",
    "confidence": "loss, expected value, variance, mass outside",
    "tokens": "log-probability, entropy",
}

PEERS = (
    Peer("plain", SUITES, build, gives=GIVES, rounding=True),
    Peer("plain-compiled", SUITES, lambda case: build(case, compiled=True), gives=GIVES, rounding=True),
)
