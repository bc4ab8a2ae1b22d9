"""The calibration loss on confidence tokens, from hidden states and the output head.

``linear_confidence_loss`` calls the operator ``caop_fast::linear_confidence``, whose backward recomputes the logits of
a chunk of tokens at a time: there is one such token per answer, so their projection is a small part of a step, and
every output stays differentiable. With a sharded vocabulary the logits of a chunk are gathered on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from caop_fast.losses import checks
from caop_fast.losses.backends.masked_rows import UnmaskedRows
from caop_fast.losses.backends.resolve import get_backend
from caop_fast.losses.backends.row_blocks import take
from caop_fast.losses.batches import ConfidenceBatch, ConfidenceGrads, ConfidenceRows
from caop_fast.losses.confidence import (
    DIFFERENTIABLE,
    ONCE,
    check_score,
    check_values,
    confidence_candidates,
    confidence_options,
    confidence_output,
    fake_confidence_rows,
    saves_confidence,
)
from caop_fast.losses.linear.chunking import (
    NO_GRADIENT,
    ProjectionGrads,
    over_token_chunks,
    spread_rows,
    write_rows,
)
from caop_fast.losses.linear.config import LinearConfig, prepare
from caop_fast.losses.linear.distributed import VocabularyShards
from caop_fast.losses.linear.gradients import fake_gradients, finish_gradients, gradient_inputs, prepare_upstream
from caop_fast.losses.linear.lm_head import LMHead, ProjectedSide
from caop_fast.losses.linear.sides import ProjectedSides, unmask_sides
from caop_fast.losses.operator import Operator
from caop_fast.losses.options import ConfidenceOptions
from caop_fast.losses.outputs import ConfidenceOutput
from caop_kernels.constants import CONFIDENCE_SAVED_FIELDS


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

    Every output is differentiable with respect to hidden states, weight and bias, in any mix, once. The backward
    recomputes the logits: pass only the positions that predict a confidence token. With ``process_group`` each rank
    holds consecutive rows of the head and gathers the logits of a chunk from the others. Works under
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
    call = prepare(
        {"": ProjectedSide(hidden, LMHead(weight, bias, scale))},
        {
            "candidate_ids": candidate_ids,
            "candidate_values": candidate_values,
            "target": target,
            "weights": weights,
        },
        vocab_size=vocab_size,
        logits_dtype=logits_dtype,
        chunk_size=chunk_size,
        process_group=process_group,
        backend=backend,
        validate=validate,
    )
    ids, values = confidence_candidates(candidate_ids, candidate_values, call.device, call.dtype)
    options = confidence_options(
        kind,
        outside_weight,
        eps,
        temperature=checks.positive("temperature", temperature),
        softcap=checks.optional_positive("softcap", softcap),
    )
    score = check_score(target, weights, reduction, call.lead, call.dtype)
    scores = linear_confidence(
        ConfidenceCall(call.sides[0], ids, values, score.target, score.weights, options, call.config)
    )
    return confidence_output(scores, score.weights, reduction, call.lead)


class ConfidenceCall(NamedTuple):
    """Arguments of ``caop_fast::linear_confidence``."""

    student: ProjectedSide
    ids: Tensor  # [C] int64
    values: Tensor  # [C] in the dtype of the statistics
    target: Tensor  # [N] likewise
    weights: Tensor | None  # [N] likewise
    options: ConfidenceOptions
    config: LinearConfig


class BackwardInputs(NamedTuple):
    """Arguments of ``caop_fast::linear_confidence_backward``."""

    call: ConfidenceCall
    saved_statistics: Tensor | None
    grads: ConfidenceGrads


class UnmaskedCall(NamedTuple):
    """The rows of a call that have weight; scores are computed in the dtype that the logits imply."""

    unmasked: UnmaskedRows
    sides: ProjectedSides
    ids: Tensor
    values: Tensor
    target: Tensor
    weights: Tensor | None
    config: LinearConfig

    def batch(self, logits: Tensor, tokens: slice) -> ConfidenceBatch:
        """This rank's logits of some tokens, with those of the other ranks."""
        logits = self.config.layout.gather_columns(logits)
        return ConfidenceBatch(logits, self.ids, self.values, self.target[tokens], take(self.weights, tokens))


def unmask_call(call: ConfidenceCall) -> UnmaskedCall:
    student, ids, values, target, weights, _, config = call
    unmasked, dtype = UnmaskedRows.of(weights, student.hidden.shape[0]), student.head.accumulator_dtype
    return UnmaskedCall(
        unmasked,
        unmask_sides(student, None, unmasked, config),
        ids,
        values.to(dtype),
        unmasked.take(target).to(dtype),
        unmasked.weights(weights),
        config,
    )


def _rows(call: ConfidenceCall) -> ConfidenceRows:
    config, vocab = call.config, call.config.layout.columns.total
    if config.execution.validate:
        batch = ConfidenceBatch(call.student.hidden, call.ids, call.values, call.target, call.weights)
        check_values(batch, vocab)
    work, backend = unmask_call(call), get_backend(config.execution.backend)
    rows = _empty_rows(work.sides.student, call)

    def visit(tokens: slice, logits: Tensor, teacher: Tensor | None, out: Tensor) -> None:
        write_rows(rows, tokens, backend.confidence_rows(work.batch(logits, tokens), call.options, vocab))

    over_token_chunks(work.sides, visit, config, NO_GRADIENT, gathers_logits=True)
    return spread_rows(rows, work.unmasked)


def _empty_rows(student: ProjectedSide, call: ConfidenceCall) -> ConfidenceRows:
    """Scores of ``student``'s rows, without values."""
    rows = fake_confidence_rows(student.hidden, call.values.dtype, saves=False)
    if not saves_confidence(call.config.execution):
        return rows
    shape, dtype = (CONFIDENCE_SAVED_FIELDS, student.hidden.shape[0]), student.head.accumulator_dtype
    return rows._replace(saved_statistics=student.hidden.new_empty(shape, dtype=dtype))


def _run_backward(inputs: BackwardInputs) -> ProjectionGrads:
    call, saved, grads = inputs
    student, config, layout = call.student, call.config, call.config.layout
    work, backend = unmask_call(call), get_backend(config.execution.backend)
    if saved is not None and work.unmasked.kept is not None:
        saved = saved[:, work.unmasked.kept]
    upstream, factor = prepare_upstream(grads, student.head, work.values.dtype, work.unmasked)

    def visit(tokens: slice, logits: Tensor, teacher: Tensor | None, out: Tensor) -> None:
        batch = work.batch(logits, tokens)
        gradient = backend.confidence_gradient(
            batch,
            call.options,
            layout.columns.total,
            None if saved is None else saved[:, tokens].contiguous(),
            ConfidenceGrads(*(take(grad, tokens) for grad in upstream)),
            batch.source.new_empty(batch.source.shape, dtype=out.dtype) if layout.is_sharded else out,
        )
        if layout.is_sharded:
            out.copy_(layout.columns.of(gradient))

    gradients = over_token_chunks(work.sides, visit, config, config.needs_grad, gathers_logits=True, overwrites=False)
    if factor is not None:
        for part in gradients:
            if part is not None:
                part.mul_(factor)
    return finish_gradients(gradients, student, work.unmasked, layout)


def _backward(call: ConfidenceCall, scores: ConfidenceRows, grads: ConfidenceRows) -> ProjectionGrads:
    upstream = ConfidenceGrads(grads.loss, grads.expected, grads.variance, grads.outside_mass)
    return linear_confidence_backward(BackwardInputs(call, scores.saved_statistics, upstream))


linear_confidence = Operator(
    "linear_confidence", ConfidenceCall, ConfidenceRows, _rows, lambda call: _empty_rows(call.student, call)
)
linear_confidence_backward = Operator(
    "linear_confidence_backward",
    BackwardInputs,
    ProjectionGrads,
    _run_backward,
    lambda inputs: fake_gradients(inputs.call.student, inputs.call.config),
    once=ONCE,
)
linear_confidence.register_autograd(
    _backward,
    inputs=gradient_inputs("student"),
    outputs=DIFFERENTIABLE,
    saved=["saved_statistics"],
)
