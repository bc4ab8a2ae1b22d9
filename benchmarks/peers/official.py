"""The distillation loss and the statistics that the released CaOPD trainer computes with it, reimplemented.

The trainer (SalesforceAIResearch/CaOPD, ``distil_trainer.py``) calls both models for the logits of the completion,
computes log-probabilities of the sampled tokens, all log-probabilities and the entropies of both (each with its own
softmax), the divergence elementwise, and a masked mean. Its ``alpha`` is ``beta`` here. Logits are float32, as a loss
gets them under mixed precision.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.definitions import IGNORE_INDEX
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
    mask = (labels != IGNORE_INDEX).to(student_all.dtype)
    per_token = plain.between(student_all, teacher_all, beta)
    mean = (per_token * mask).sum() / mask.sum()
    return mean, student_logprob, teacher_logprob, student_entropy, teacher_entropy


def build(case: Case, *, compiled: bool = False) -> Loss:
    """``loss`` on logits, or after both projections."""

    def student(i: Inputs) -> Tensor:
        return plain.capped(i["hidden"] @ i["weight"].t() if case.linear else i["student"], case.softcap)

    @torch.no_grad()
    def teacher(i: Inputs) -> Tensor:
        logits = i["teacher_hidden"] @ i["teacher_weight"].t() if case.linear else i["teacher"]
        return plain.capped(logits, case.softcap)

    def run(i: Inputs) -> tuple[Tensor, ...]:  # no variable for the logits, which would keep them alive
        return loss(student(i), teacher(i), i["labels"], case.beta)

    return plain.first(run, compiled)


def _one_size(case: Case, device: torch.device) -> str | None:
    """Compilation takes longest of all; ``plain-compiled``, which computes less, is measured everywhere."""
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
