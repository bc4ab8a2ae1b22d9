"""trl: the chunked divergence of its distillation trainer, and its log-probability and entropy kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.definitions import IGNORE_INDEX
from benchmarks.inputs import Inputs
from benchmarks.peers.peer import Loss, Peer, needs_gpu

VOCABULARY_CHUNK = 32768  # as in trl's trainers


def chunked(case: Case) -> Loss:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def run(i: Inputs) -> Tensor:
        hidden, teacher = i.unmasked("hidden", "teacher_hidden")
        per_token, _ = ChunkedDivergenceFunction.apply(
            hidden, i["weight"], None, teacher, i["teacher_weight"], None, case.beta, 1.0, 1.0, case.softcap, 1.0,
            case.softcap,
        )  # fmt: skip
        return per_token.mean()

    return run


def linear_tokens(case: Case) -> Loss:
    from trl.kernels import ChunkedLogProbFunction

    def run(i: Inputs) -> Tensor:
        hidden, labels = i.unmasked("hidden", "labels")
        logprob, *_ = ChunkedLogProbFunction.apply(
            hidden, i["weight"], None, labels, 1.0, VOCABULARY_CHUNK, case.softcap, 1.0, ("entropy",)
        )
        return -logprob.mean()

    return run


def tokens(case: Case) -> Loss:
    from trl.kernels import selective_log_softmax_and_entropy

    def run(i: Inputs) -> Tensor:
        mask = i["labels"] != IGNORE_INDEX if "keep" in i.tensors else None
        logprob, _ = selective_log_softmax_and_entropy(i["student"], i["labels"].clamp(min=0), 1.0, mask)
        return -logprob.sum() / i.count

    return run


def _tokens(case: Case, device: torch.device) -> str | None:
    return needs_gpu(case, device) or ("has no softcap" if case.softcap is not None else None)


PEERS = (
    Peer("trl-chunked", ("linear",), chunked, gives="loss, student entropy", package="trl"),
    Peer("trl-chunked-logprob", ("linear-tokens",), linear_tokens, gives="log-probability, entropy", package="trl"),
    Peer(
        "trl-logprob-entropy",
        ("tokens",),
        tokens,
        gives="log-probability, entropy",
        refuses=_tokens,
        package="trl",
    ),
)
