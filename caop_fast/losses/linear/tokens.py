"""Statistics of one model's tokens, from its hidden states and output head."""

from __future__ import annotations

import torch
from torch import Tensor

from caop_fast.losses import checks
from caop_fast.losses.linear.arguments import Model, check_model, prepare
from caop_fast.losses.linear.shards import VocabularyShards
from caop_fast.losses.ops.linear_tokens import linear_tokens
from caop_fast.losses.outputs import TokenStatistics


def linear_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    weights: Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    process_group: torch.distributed.ProcessGroup | VocabularyShards | None = None,
    backend: str = "auto",
    validate: bool | None = None,
) -> TokenStatistics:
    """``token_statistics`` of ``logits = softcap(scale * (hidden W^T + bias))``, without ever holding [N, V] logits.

    Log-probability, entropy and log-sum-exp are differentiable with respect to hidden states, weight and bias, in any
    mix, once. The backward makes the logits again, block of ids by block of ids: 1 unit of 2 N V H operations forward
    and 3 backward. Works under ``torch.compile(fullgraph=True)`` and ``torch.autocast``.

    Args:
        hidden: [..., H] float32, bfloat16, float16 or float64; N tokens in all.
        weight: [V, H].
        labels, temperature, vocab_size, weights, backend, validate: as in ``token_statistics``.
        bias: [V] or None.
        scale, softcap, logits_dtype, process_group: as in ``linear_distillation_loss``.
        chunk_size: most tokens per chunk of the forward; None chooses by memory.

    Returns:
        TokenStatistics in float32 (float64 when an input is), with the leading shape of ``hidden``.

    Raises:
        TypeError, ValueError: on bad arguments, naming the argument, what it got and what it takes.
        RuntimeError: on a second derivative.
    """
    model = check_model(Model("", hidden, weight, bias, scale, softcap), sharded=process_group is not None)
    call = prepare(
        (model,), {"labels": labels, "weights": weights}, vocab_size=vocab_size, logits_dtype=logits_dtype,
        chunk_size=chunk_size, small=False, process_group=process_group, backend=backend, validate=validate,
    )  # fmt: skip
    label_ids = checks.label_ids(labels, call.lead, call.setting.columns.total, values=False)
    row_weights = checks.row_weights(weights, label_ids, call.lead, call.dtype, values=False)
    temperature = checks.positive("temperature", temperature)
    logprob, entropy, lse, _ = linear_tokens(*call.sides, label_ids, row_weights, temperature, *call.setting)
    return TokenStatistics(
        None if labels is None else logprob.view(call.lead), entropy.view(call.lead), lse.view(call.lead)
    )
