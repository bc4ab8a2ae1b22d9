"""The distillation loss with all that the released CaOPD trainer computes around it, in words of our own.

The trainer (SalesforceAIResearch/CaOPD, ``distil_trainer.py``) calls both models for the logits of the completion,
takes log-probabilities of the sampled tokens, all log-probabilities and entropies of both (each with a softmax of its
own), the divergence elementwise, and a masked mean. Its ``alpha`` is ``beta`` here. Logits are float32, as mixed
precision hands them to a loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.inputs import Inputs
from benchmarks.peers import plain
from benchmarks.peers.peer import Loss, Peer


def statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each label, all log-probabilities and the entropy of [N, V] logits."""
    chosen = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) - torch.logsumexp(logits, dim=-1)
    log_p = F.log_softmax(logits, dim=-1)
    entropy = torch.logsumexp(logits, dim=-1) - (F.softmax(logits, dim=-1) * logits).sum(-1)
    return chosen, log_p, entropy


def loss(student: Tensor, teacher: Tensor, labels: Tensor, beta: float) -> tuple[Tensor, ...]:
    """Masked mean of the divergence, and per token both log-probabilities and both entropies."""
    student_logprob, student_all, student_entropy = statistics(student, labels)
    with torch.no_grad():
        teacher_logprob, teacher_all, teacher_entropy = statistics(teacher, labels)
    mask = (labels != -100).to(student.dtype)
    per_token = plain.between(student_all, teacher_all, beta)
    mean = (per_token * mask).sum() / mask.sum()
    return mean, student_logprob, teacher_logprob, student_entropy, teacher_entropy


def build(case: Case, *, compiled: bool = False) -> Loss:
    """``loss`` on logits, or behind both projections."""

    def run(i: Inputs) -> tuple[Tensor, ...]:
        if not case.linear:
            student, teacher = i.student, i.teacher
        else:
            with torch.no_grad():
                teacher = i.teacher_hidden @ i.teacher_weight.t()
            student = i.hidden @ i.weight.t()
        return loss(plain.capped(student, case.softcap), plain.capped(teacher, case.softcap), i.labels, case.beta)

    return plain.first(run, compiled)


PEERS = (
    Peer("official", ("logits", "linear"), build, gives="loss, both log-probabilities, both entropies"),
    Peer(
        "official-compiled",
        ("logits", "linear"),
        lambda case: build(case, compiled=True),
        gives="loss, both log-probabilities, both entropies",
    ),
)
