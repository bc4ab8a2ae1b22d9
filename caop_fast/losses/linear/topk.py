"""The distillation loss against a sparse teacher, from the student's hidden states and output head.

``linear_topk_distillation_loss`` calls the operator ``caop_fast::linear_topk``, which computes the gradients in the
forward pass. With a sharded vocabulary the logits of a chunk are gathered on every rank: the listed ids of a token may
lie anywhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from caop_fast.losses import checks
from caop_fast.losses.backends.masked_rows import UnmaskedRows
from caop_fast.losses.backends.resolve import get_backend
from caop_fast.losses.backends.row_blocks import take
from caop_fast.losses.batches import DistillationGrads, SavedTopK, TopKBatch, TopKRows
from caop_fast.losses.linear.config import LinearConfig, check_reduction, prepare, statistics_dtype
from caop_fast.losses.linear.distributed import VocabularyShards
from caop_fast.losses.linear.gradients import (
    LossWithGradients,
    WeightedRows,
    compute_with_gradients,
    differentiate_loss,
    fake_with_gradients,
)
from caop_fast.losses.linear.lm_head import LMHead, ProjectedSide
from caop_fast.losses.linear.sides import unmask_sides
from caop_fast.losses.operator import Operator
from caop_fast.losses.options import TopKOptions
from caop_fast.losses.outputs import DistillationOutput
from caop_fast.losses.topk import check_listed, check_values
from caop_kernels.constants import TAILS
from caop_kernels.listed_ids import sort_ids


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

    Only ``loss`` is differentiable, with respect to hidden states, weight and bias, once; the gradients are computed in
    the forward pass, chunk of tokens by chunk of tokens: 3 units of 2 N V H operations (2 where the head is frozen, 1
    where nothing needs a gradient). With ``process_group`` each rank holds consecutive rows of the head and gathers the
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
    call = prepare(
        {"student_": ProjectedSide(student_hidden, LMHead(student_weight, student_bias, student_scale))},
        {
            "teacher_ids": teacher_ids,
            "teacher_logprobs": teacher_logprobs,
            "labels": labels,
            "weights": weights,
            "beta": beta,
        },
        vocab_size=vocab_size,
        logits_dtype=logits_dtype,
        chunk_size=chunk_size,
        process_group=process_group,
        backend=backend,
        validate=validate,
    )
    (student,) = call.sides
    listed = check_listed(teacher_ids, teacher_logprobs, call.lead)
    dtype = _statistics_dtype(student, teacher_logprobs)
    label_ids = checks.label_ids(labels, call.lead)
    options = TopKOptions(
        tail=tail,
        beta=checks.divergence_beta(beta, call.lead, dtype),
        temperature=checks.positive("temperature", temperature),
        softcap=checks.optional_positive("student_softcap", student_softcap),
    )
    inputs = TopKCall(
        student,
        teacher_ids.reshape(-1, listed).to(torch.int64),
        teacher_logprobs.detach().reshape(-1, listed),
        label_ids,
        checks.row_weights(weights, label_ids, call.lead, dtype),
        options,
        reduction,
        call.config,
    )
    return linear_topk(inputs).output(call.lead)


class TopKCall(NamedTuple):
    """Arguments of ``caop_fast::linear_topk``."""

    student: ProjectedSide
    ids: Tensor  # [N, k] int64, -1 for padding
    logprobs: Tensor  # [N, k]
    labels: Tensor | None  # [N] int64
    weights: Tensor | None  # [N] in the dtype of the statistics
    options: TopKOptions
    reduction: str
    config: LinearConfig


def _statistics_dtype(student: ProjectedSide, logprobs: Tensor) -> torch.dtype:
    return torch.promote_types(statistics_dtype(student), checks.statistics_dtype((logprobs,)))


def _loss(call: TopKCall) -> LossWithGradients:
    student, ids, logprobs, labels, weights, options, reduction, config = call
    layout, backend = config.layout, get_backend(config.execution.backend)
    columns = layout.columns
    sorted_ids = sort_ids(ids, columns.total)
    if config.execution.validate:
        check_values(TopKBatch(student.hidden, ids, logprobs, labels, weights), options, columns.total, sorted_ids)
    unmasked = UnmaskedRows.of(weights, student.hidden.shape[0])
    kept_ids, kept_logprobs, kept_labels = unmasked.take(ids), unmasked.take(logprobs), unmasked.take(labels)
    kept_sorted_ids = unmasked.take(sorted_ids)
    mask, beta = unmasked.weights(weights), options.beta
    kept_beta = unmasked.take(beta) if isinstance(beta, Tensor) else beta

    def compute(
        tokens: slice, own: Tensor, teacher: Tensor | None, out: Tensor, grad_divergence: Tensor | None
    ) -> TopKRows:
        logits = layout.gather_columns(own)
        batch = TopKBatch(
            logits, kept_ids[tokens], kept_logprobs[tokens], take(kept_labels, tokens), take(mask, tokens)
        )
        some = options._replace(beta=kept_beta[tokens] if isinstance(kept_beta, Tensor) else kept_beta)
        rows = backend.topk_rows(batch, some, columns.total, kept_sorted_ids[tokens])
        if grad_divergence is not None:
            saved, grads = SavedTopK(rows.saved_statistics, rows.student_entropy), DistillationGrads(grad_divergence)
            gradient = backend.topk_gradient(
                batch, some, columns.total, saved, grads, logits if layout.is_sharded else out
            )
            if layout.is_sharded:
                out.copy_(columns.of(gradient))
        return rows

    weighted = WeightedRows(
        unmasked, weights, reduction, labelled=labels is not None, dtype=_statistics_dtype(student, logprobs)
    )
    return compute_with_gradients(unmask_sides(student, None, unmasked, config), compute, weighted, config)


def _fake_loss(call: TopKCall) -> LossWithGradients:
    dtype = _statistics_dtype(call.student, call.logprobs)
    return fake_with_gradients(call.student, call.config, labelled=call.labels is not None, dtype=dtype)


linear_topk = Operator("linear_topk", TopKCall, LossWithGradients, _loss, _fake_loss)
differentiate_loss(linear_topk, lambda call: call.student, "student")
