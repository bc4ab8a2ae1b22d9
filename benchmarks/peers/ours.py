"""caop_fast, and its variants."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

import caop_fast
from benchmarks.cases import Case
from benchmarks.inputs import Inputs
from benchmarks.peers.peer import Loss, Peer, interpreted

if TYPE_CHECKING:
    from typing_extensions import Unpack

STATISTICS = "loss, both log-probabilities, both entropies"
GIVES = {
    **dict.fromkeys(("logits", "topk"), STATISTICS),
    "confidence": "loss, expected value, variance, mass outside",
    "tokens": "log-probability, entropy, log-sum-exp",
}


def backend() -> str:
    """Triton if the process runs its interpreter, else what a user gets."""
    return "triton" if interpreted() else "auto"


class Options(TypedDict, total=False):
    """Of the linear distillation loss: what the variants change."""

    memory: str
    logits_dtype: torch.dtype


def build(case: Case, **options: Unpack[Options]) -> Loss:
    """The loss of ``case``; ``options`` are passed to ``linear_distillation_loss``."""
    cap, beta, engine = case.softcap, case.beta, backend()

    def logits(i: Inputs) -> Tensor:
        return required(
            caop_fast.distillation_loss(
                i["student"], i["teacher"], i["labels"], student_softcap=cap, teacher_softcap=cap, beta=beta,
                backend=engine,
            ).loss
        )  # fmt: skip

    def linear(i: Inputs) -> Tensor:
        hidden, teacher, labels = i.unmasked("hidden", "teacher_hidden", "labels")
        return required(
            caop_fast.linear_distillation_loss(
                hidden, i["weight"], teacher, i["teacher_weight"], labels, student_softcap=cap, teacher_softcap=cap,
                beta=beta, backend=engine, **options,
            ).loss
        )  # fmt: skip

    def topk(i: Inputs) -> Tensor:
        return required(
            caop_fast.topk_distillation_loss(
                i["student"], i["teacher_ids"], i["teacher_logprobs"], i["labels"], student_softcap=cap, beta=beta,
                backend=engine,
            ).loss
        )  # fmt: skip

    def linear_topk(i: Inputs) -> Tensor:
        hidden, ids, logprobs, labels = i.unmasked("hidden", "teacher_ids", "teacher_logprobs", "labels")
        return required(
            caop_fast.linear_topk_distillation_loss(
                hidden, i["weight"], ids, logprobs, labels, student_softcap=cap, beta=beta, backend=engine
            ).loss
        )

    def confidence(i: Inputs) -> Tensor:
        candidates = i["candidate_ids"], i["candidate_values"], i["target"]
        return caop_fast.confidence_loss(i["student"], *candidates, softcap=cap, backend=engine).loss

    def linear_confidence(i: Inputs) -> Tensor:
        candidates = i["candidate_ids"], i["candidate_values"], i["target"]
        return caop_fast.linear_confidence_loss(i["hidden"], i["weight"], *candidates, softcap=cap, backend=engine).loss

    def tokens(i: Inputs) -> Tensor:
        found = caop_fast.token_statistics(i["student"], i["labels"], softcap=cap, backend=engine)
        return -required(found.logprob).sum() / i.count

    def linear_tokens(i: Inputs) -> Tensor:
        hidden, labels = i.unmasked("hidden", "labels")
        found = caop_fast.linear_token_statistics(hidden, i["weight"], labels, softcap=cap, backend=engine)
        return -required(found.logprob).mean()

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


def required(output: Tensor | None) -> Tensor:
    """An output that is not None with these arguments."""
    assert output is not None
    return output


def build_rows(case: Case) -> Loss:
    """``linear_distillation_rows``, for weights that depend on the statistics."""

    def linear(i: Inputs) -> Tensor:
        hidden, teacher, labels = i.unmasked("hidden", "teacher_hidden", "labels")
        found = caop_fast.linear_distillation_rows(
            hidden, i["weight"], teacher, i["teacher_weight"], labels, student_softcap=case.softcap,
            teacher_softcap=case.softcap, beta=case.beta, backend=backend(),
        )  # fmt: skip
        return found.divergence.mean()

    return linear


def traffic(case: Case, rows: int) -> int | None:
    """Bytes of logits that the kernels read and write: for the statistics (twice for a JSD) and for the gradient."""
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
