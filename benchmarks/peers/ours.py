"""caop_fast, and its variants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import caop_fast
from benchmarks.cases import Case
from benchmarks.inputs import Inputs
from benchmarks.peers.peer import Loss, Peer, interpreted

STATISTICS = "loss, both log-probabilities, both entropies"
GIVES = {
    **dict.fromkeys(("linear", "logits", "topk"), STATISTICS),
    "confidence": "loss, expected value, variance, mass outside",
    "tokens": "log-probability, entropy, log-sum-exp",
}


def backend() -> str:
    """Triton's interpreter where the process runs it, else what a user gets."""
    return "triton" if interpreted() else "auto"


def build(case: Case, **options: Any) -> Loss:
    """The loss of ``case``; ``options`` go to the function."""
    both = {"student_softcap": case.softcap, "teacher_softcap": case.softcap, "beta": case.beta}
    student = {"student_softcap": case.softcap, "beta": case.beta}
    one = {"softcap": case.softcap}
    common = {"backend": backend(), **options}

    def logits(i: Inputs) -> Tensor:
        return caop_fast.distillation_loss(i.student, i.teacher, i.labels, **both, **common).loss

    def linear(i: Inputs) -> Tensor:
        hidden, teacher, labels = i.counting(i.hidden, i.teacher_hidden, i.labels)
        return caop_fast.linear_distillation_loss(
            hidden, i.weight, teacher, i.teacher_weight, labels, **both, **common
        ).loss

    def topk(i: Inputs) -> Tensor:
        return caop_fast.topk_distillation_loss(
            i.student, i.teacher_ids, i.teacher_logprobs, i.labels, **student, **common
        ).loss

    def linear_topk(i: Inputs) -> Tensor:
        hidden, ids, logprobs, labels = i.counting(i.hidden, i.teacher_ids, i.teacher_logprobs, i.labels)
        return caop_fast.linear_topk_distillation_loss(
            hidden, i.weight, ids, logprobs, labels, **student, **common
        ).loss

    def confidence(i: Inputs) -> Tensor:
        return caop_fast.confidence_loss(i.student, i.candidate_ids, i.candidate_values, i.target, **one, **common).loss

    def linear_confidence(i: Inputs) -> Tensor:
        return caop_fast.linear_confidence_loss(
            i.hidden, i.weight, i.candidate_ids, i.candidate_values, i.target, **one, **common
        ).loss

    def tokens(i: Inputs) -> Tensor:
        out = caop_fast.token_statistics(i.student, i.labels, **one, **common)
        return -out.logprob.sum() / i.count

    def linear_tokens(i: Inputs) -> Tensor:
        hidden, labels = i.counting(i.hidden, i.labels)
        return -caop_fast.linear_token_statistics(hidden, i.weight, labels, **one, **common).logprob.mean()

    return {
        "logits": logits,
        "linear": linear,
        "topk": topk,
        "linear-topk": linear_topk,
        "confidence": confidence,
        "linear-confidence": linear_confidence,
        "tokens": tokens,
        "linear-tokens": linear_tokens,
    }[case.suite]


def build_rows(case: Case) -> Loss:
    """``linear_distillation_rows``, for weights that follow from the statistics."""

    def linear(i: Inputs) -> Tensor:
        hidden, teacher, labels = i.counting(i.hidden, i.teacher_hidden, i.labels)
        out = caop_fast.linear_distillation_rows(
            hidden, i.weight, teacher, i.teacher_weight, labels, student_softcap=case.softcap,
            teacher_softcap=case.softcap, beta=case.beta, backend=backend(),
        )  # fmt: skip
        return out.divergence.mean()

    return linear


def traffic(case: Case, rows: int) -> int | None:
    """Bytes of logits the kernels read and write: statistics, for a mixture once more, and the gradient."""
    width = getattr(torch, case.dtype).itemsize
    if case.suite == "logits":
        reads = 2 if case.beta in (0.0, 1.0) else 3
        return (2 * reads * rows + case.n) * case.v * width
    if case.suite == "tokens":
        return (2 * rows + case.n) * case.v * width
    return None


PEERS = (
    Peer(
        "caop_fast",
        ("logits", "linear", "topk", "linear-topk", "confidence", "linear-confidence", "tokens", "linear-tokens"),
        build,
        gives=GIVES,
        traffic=traffic,
    ),
    Peer("caop_fast-min", ("linear",), lambda case: build(case, memory="min"), gives=STATISTICS),
    Peer("caop_fast-rows", ("linear",), build_rows, gives=f"{STATISTICS}, differentiable per token"),
    Peer(
        "caop_fast-bf16-logits",
        ("linear",),
        lambda case: build(case, logits_dtype=torch.bfloat16),
        gives=STATISTICS,
        rounding=True,
        refuses=lambda case, device: None if case.dtype == "bfloat16" else "for bfloat16 heads",
    ),
)
