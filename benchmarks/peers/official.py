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

GIVES = "loss, both log-probabilities, both entropies"
COMPILED_AT = 8192  # tokens


def statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each label, all log-probabilities and the entropy of [N, V] logits."""
    chosen = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) - torch.logsumexp(logits, dim=-1)
    log_p = F.log_softmax(logits, dim=-1)
    entropy = torch.logsumexp(logits, dim=-1) - (F.softmax(logits, dim=-1) * logits).sum(-1)
    return chosen, log_p, entropy


def loss(student: Tensor, teacher: Tensor, labels: Tensor, beta: float) -> tuple[Tensor, ...]:
    """Masked mean of the divergence, and per token both log-probabilities and both entropies."""
    with torch.no_grad():
        teacher_logprob, teacher_all, teacher_entropy = statistics(teacher, labels)
    del teacher
    student_logprob, student_all, student_entropy = statistics(student, labels)
    del student
    mask = (labels != -100).to(student_all.dtype)
    per_token = plain.between(student_all, teacher_all, beta)
    mean = (per_token * mask).sum() / mask.sum()
    return mean, student_logprob, teacher_logprob, student_entropy, teacher_entropy


def build(case: Case, *, compiled: bool = False) -> Loss:
    """``loss`` on logits, or behind both projections."""

    def student(i: Inputs) -> Tensor:
        return plain.capped(i.hidden @ i.weight.t() if case.linear else i.student, case.softcap)

    @torch.no_grad()
    def teacher(i: Inputs) -> Tensor:
        return plain.capped(i.teacher_hidden @ i.teacher_weight.t() if case.linear else i.teacher, case.softcap)

    def run(i: Inputs) -> tuple[Tensor, ...]:  # logits have no name here, so that none is held longer than by the loss
        return loss(student(i), teacher(i), i.labels, case.beta)

    return plain.first(run, compiled)


def _one_size(case: Case, device: torch.device) -> str | None:
    """Compiling takes longer than all else, and ``plain-compiled``, which does less, is measured everywhere."""
    return None if case.model == "small" or case.n == COMPILED_AT else f"compiled at N {COMPILED_AT} only"


PEERS = (
    Peer("official", ("logits", "linear"), build, gives=GIVES, rounding=True),
    Peer(
        "official-compiled",
        ("logits", "linear"),
        lambda case: build(case, compiled=True),
        gives=GIVES,
        rounding=True,
        refuses=_one_size,
    ),
)
