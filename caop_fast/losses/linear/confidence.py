"""The calibration loss on confidence tokens, from hidden states and the output head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from caop_fast.losses import checks
from caop_fast.losses.confidence import check_score, confidence_candidates
from caop_fast.losses.distillation import reduce_rows
from caop_fast.losses.linear.arguments import Model, check_model, prepare
from caop_fast.losses.linear.shards import VocabularyShards
from caop_fast.losses.ops.linear_confidence import linear_confidence
from caop_fast.losses.outputs import ConfidenceOutput


def linear_confidence_loss(
    hidden: Tensor,
    weight: Tensor,
    candidate_ids: Tensor | Sequence[int],
    candidate_values: Tensor | Sequence[float],
    target: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    kind: str = "cross_entropy",
    outside_weight: float = 1.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
    temperature: float = 1.0,
    vocab_size: int | None = None,
    eps: float = 1e-6,
    logits_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    process_group: torch.distributed.ProcessGroup | VocabularyShards | None = None,
    backend: str = "auto",
    validate: bool | None = None,
) -> ConfidenceOutput:
    """``confidence_loss`` of ``logits = softcap(scale * (hidden W^T + bias))``, without ever holding [N, V] logits.

    Every output is differentiable with respect to hidden states, weight and bias, in any mix, once. The backward makes
    the logits again: pass only the positions that predict a confidence token. With ``process_group`` each rank holds
    consecutive rows of the head and gathers the logits of a chunk from the others. Works under
    ``torch.compile(fullgraph=True)`` and ``torch.autocast``.

    Args:
        hidden: [..., H] float32, bfloat16, float16 or float64, at the positions that predict the confidence token.
        weight: [V, H].
        candidate_ids, candidate_values, target, kind, outside_weight, weights, reduction, temperature, eps, backend,
            validate: as in ``confidence_loss``; ids are those of the whole vocabulary.
        bias: [V] or None.
        scale, softcap, logits_dtype, process_group: as in ``linear_distillation_loss``.
        vocab_size: the softmax runs over the first ids (of all ranks) only; None for all.
        chunk_size: most tokens per chunk; None chooses by memory.

    Returns:
        ConfidenceOutput in float32 (float64 when an input is), with the shape of ``target``.

    Raises:
        TypeError, ValueError: on bad arguments, naming the argument, what it got and what it takes.
        RuntimeError: on a second derivative.
    """
    model = check_model(Model("", hidden, weight, bias, scale, softcap), sharded=process_group is not None)
    others = {
        "candidate_ids": candidate_ids,
        "candidate_values": candidate_values,
        "target": target,
        "weights": weights,
    }
    call = prepare(
        (model,), others, vocab_size=vocab_size, logits_dtype=logits_dtype, chunk_size=chunk_size, small=False,
        process_group=process_group, backend=backend, validate=validate,
    )  # fmt: skip
    ids, values = confidence_candidates(candidate_ids, candidate_values, call.device, call.dtype)
    score = check_score(target, call.lead, call.dtype, kind, outside_weight, weights, reduction, eps)
    loss, *found, _ = linear_confidence(
        *call.sides,
        ids,
        values,
        score.target,
        score.weights,
        kind,
        score.outside_weight,
        score.eps,
        checks.positive("temperature", temperature),
        *call.setting,
    )
    loss = reduce_rows(loss, score.weights, reduction, call.lead)
    return ConfidenceOutput(loss, *(column.view(call.lead) for column in found))
