"""The distillation loss against a sparse teacher, from the student's hidden states and output head."""

from __future__ import annotations

import torch
from torch import Tensor

from caop_fast.losses import checks
from caop_fast.losses.linear.arguments import Model, check_model, prepare
from caop_fast.losses.linear.distillation import check_reduction, output
from caop_fast.losses.linear.shards import VocabularyShards
from caop_fast.losses.ops.linear_topk import linear_topk
from caop_fast.losses.outputs import DistillationOutput
from caop_fast.losses.reference.topk import TAILS
from caop_fast.losses.topk import check_listed


def linear_topk_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    student_scale: float = 1.0,
    student_softcap: float | None = None,
    tail: str = "bucket",
    beta: float | Tensor = 0.0,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    vocab_size: int | None = None,
    reduction: str = "mean",
    logits_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    process_group: torch.distributed.ProcessGroup | VocabularyShards | None = None,
    backend: str = "auto",
    validate: bool | None = None,
) -> DistillationOutput:
    """``topk_distillation_loss`` of ``logits = softcap(scale * (hidden W^T + bias))``, without ever holding [N, V].

    Only ``loss`` is differentiable, with respect to hidden states, weight and bias, once; the gradients are made in the
    forward, chunk of tokens by chunk of tokens: 3 units of 2 N V H operations (2 where the head is frozen, 1 where
    nothing needs a gradient). With ``process_group`` each rank holds consecutive rows of the head and gathers the
    logits of a chunk from the others. Works under ``torch.compile(fullgraph=True)`` and ``torch.autocast``.

    Args:
        student_hidden: [..., H] float32, bfloat16, float16 or float64; N tokens in all.
        student_weight: [V, H].
        teacher_ids, teacher_logprobs, labels, tail, beta, temperature, weights, backend, validate: as in
            ``topk_distillation_loss``.
        student_bias: [V] or None.
        student_scale, student_softcap, logits_dtype, process_group: as in ``linear_distillation_loss``.
        vocab_size: take only the first ids (of all ranks) as the vocabulary; None for all.
        reduction: "mean" = sum(w D)/sum(w) or "sum".
        chunk_size: most tokens per chunk; None chooses by memory.

    Returns:
        DistillationOutput, as of ``topk_distillation_loss``; the [N] fields are detached.

    Raises:
        TypeError, ValueError: on bad arguments, naming the argument, what it got and what it takes.
        RuntimeError: on a second derivative.
    """
    check_reduction(reduction, "linear_topk_distillation_loss", "topk_distillation_loss on logits")
    checks.choice("tail", tail, TAILS)
    model = Model("student_", student_hidden, student_weight, student_bias, student_scale, student_softcap)
    model = check_model(model, sharded=process_group is not None)
    listed = check_listed(teacher_ids, teacher_logprobs, model.hidden.shape[:-1])
    others = {
        "teacher_ids": teacher_ids,
        "teacher_logprobs": teacher_logprobs,
        "labels": labels,
        "weights": weights,
        "beta": beta,
    }
    call = prepare(
        (model,), others, vocab_size=vocab_size, logits_dtype=logits_dtype, chunk_size=chunk_size, small=False,
        process_group=process_group, backend=backend, validate=validate,
    )  # fmt: skip
    dtype = checks.statistics_dtype((*model.tensors().values(), teacher_logprobs))
    label_ids = checks.label_ids(labels, call.lead, call.setting.columns.total, values=False)
    row_weights = checks.row_weights(weights, label_ids, call.lead, dtype, values=False)
    beta = checks.divergence_beta(beta, call.lead, dtype, values=False)
    per_row = isinstance(beta, Tensor)
    found = linear_topk(
        *call.sides,
        teacher_ids.reshape(-1, listed).to(torch.int64),
        teacher_logprobs.detach().reshape(-1, listed),
        label_ids,
        row_weights,
        beta if per_row else None,
        tail,
        0.0 if per_row else beta,
        checks.positive("temperature", temperature),
        reduction == "mean",
        *call.setting,
    )
    return output(found[0], found[1:6], call.lead, labels)
