"""Per-token statistics of two models from hidden states and output heads, differentiable in any mix.

``linear_distillation_rows`` calls the operator of the same name. Its forward keeps nothing but a few numbers per token;
its backward recomputes the logits in vocabulary blocks, for any upstream gradients. With ``low_memory`` the forward
goes over vocabulary blocks as well: 2 more projections for an interior beta, whose mixture needs the partition sums of
whole rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from caop_fast.losses import checks
from caop_fast.losses.backends.masked_rows import UnmaskedRows
from caop_fast.losses.backends.row_blocks import take
from caop_fast.losses.batches import DistillationBatch, DistillationGrads, DistillationRows, SavedDistillation
from caop_fast.losses.distillation import (
    DIFFERENTIABLE,
    ONCE,
    check_row_values,
    distillation_output,
    fake_distillation_rows,
)
from caop_fast.losses.linear.chunking import (
    NO_GRADIENT,
    ProjectionGrads,
    over_token_chunks,
    over_vocabulary_blocks,
    spread_rows,
    write_rows,
)
from caop_fast.losses.linear.config import LinearConfig, PreparedCall, prepare, statistics_dtype
from caop_fast.losses.linear.distributed import ShardedBackend, VocabularyShards
from caop_fast.losses.linear.gradients import fake_gradients, finish_gradients, gradient_inputs, prepare_upstream
from caop_fast.losses.linear.lm_head import LMHead, ProjectedSide
from caop_fast.losses.linear.sides import ProjectedSides, unmask_sides
from caop_fast.losses.operator import Operator
from caop_fast.losses.options import DivergenceOptions
from caop_fast.losses.outputs import DistillationOutput


def linear_distillation_rows(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    beta: float | Tensor = 0.0,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    vocab_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    process_group: torch.distributed.ProcessGroup | VocabularyShards | None = None,
    backend: str = "auto",
    validate: bool | None = None,
) -> DistillationOutput:
    """Per-token divergences, log-probabilities and entropies from hidden states, differentiable in any mix.

    For losses whose weights follow from the statistics themselves: importance ratios, clipping, entropy masks.
    ``divergence``, ``student_logprob`` and ``student_entropy`` are differentiable with respect to the student's hidden
    states, weight and bias, once. The backward recomputes the logits in vocabulary blocks: 2 U forward and 4 U backward
    in units of U = 2 N V H operations (3 U where only one of hidden states and weight needs a gradient).

    Args:
        weights: [...], finite, >= 0; they only mask: a token of weight 0 reports 0 everywhere, gets gradient 0, and may
            hold anything. None masks the tokens whose label is -100.
        chunk_size: most tokens per chunk of the forward; None chooses by memory.
        student_hidden, student_weight, teacher_hidden, teacher_weight, labels, student_bias, teacher_bias,
            student_scale, teacher_scale, student_softcap, teacher_softcap, beta, temperature, vocab_size, logits_dtype,
            process_group, backend, validate: as in ``linear_distillation_loss``.

    Returns:
        DistillationOutput in float32 (float64 when an input is), each field with the leading shape; ``loss`` is None.

    Raises:
        TypeError, ValueError: on bad arguments, naming the argument, what it got and what it takes.
        RuntimeError: on a second derivative.
    """
    call = prepare(
        {
            "student_": ProjectedSide(student_hidden, LMHead(student_weight, student_bias, student_scale)),
            "teacher_": ProjectedSide(teacher_hidden, LMHead(teacher_weight, teacher_bias, teacher_scale)),
        },
        {"labels": labels, "weights": weights, "beta": beta},
        vocab_size=vocab_size,
        logits_dtype=logits_dtype,
        chunk_size=chunk_size,
        process_group=process_group,
        backend=backend,
        validate=validate,
    )
    options = DivergenceOptions(beta, temperature, student_softcap, teacher_softcap)
    rows = linear_rows(check_call(call, labels, weights, options))
    return distillation_output(None, rows, call.lead)


class DistillationCall(NamedTuple):
    """Arguments of ``caop_fast::linear_distillation_rows``."""

    student: ProjectedSide
    teacher: ProjectedSide
    labels: Tensor | None  # [N] int64
    weights: Tensor | None  # [N] in the dtype of the statistics
    options: DivergenceOptions
    config: LinearConfig


class BackwardInputs(NamedTuple):
    """Arguments of ``caop_fast::linear_distillation_rows_backward``."""

    call: DistillationCall
    saved: SavedDistillation
    grads: DistillationGrads


def check_call(
    call: PreparedCall, labels: Tensor | None, weights: Tensor | None, options: DivergenceOptions
) -> DistillationCall:
    """What the operators of two models take, with labels, weights and options checked."""
    student, teacher = call.sides
    label_ids = checks.label_ids(labels, call.lead)
    checked = DivergenceOptions(
        beta=checks.divergence_beta(options.beta, call.lead, call.dtype),
        temperature=checks.positive("temperature", options.temperature),
        student_softcap=checks.optional_positive("student_softcap", options.student_softcap),
        teacher_softcap=checks.optional_positive("teacher_softcap", options.teacher_softcap),
    )
    row_weights = checks.row_weights(weights, label_ids, call.lead, call.dtype)
    return DistillationCall(student, teacher, label_ids, row_weights, checked, call.config)


class UnmaskedCall(NamedTuple):
    """What computes the rows of a call that have weight, and what of."""

    backend: ShardedBackend
    unmasked: UnmaskedRows
    sides: ProjectedSides
    labels: Tensor | None
    weights: Tensor | None
    options: DivergenceOptions

    def batch(self, student: Tensor, teacher: Tensor | None, tokens: slice) -> DistillationBatch:
        """Logits of some tokens. A gradient that does not read the teacher's takes the student's in their place."""
        teacher = student if teacher is None else teacher
        return DistillationBatch(student, teacher, take(self.labels, tokens), take(self.weights, tokens))


def validate_call(call: DistillationCall) -> None:
    """Check values where asked for."""
    if call.config.execution.validate:
        check_row_values(call.labels, call.weights, call.options, call.config.layout.columns.total)


def unmask_call(call: DistillationCall) -> UnmaskedCall:
    """Inside of an operator: take the rows that have weight, and the ids of this rank."""
    student, teacher, labels, weights, options, config = call
    unmasked = UnmaskedRows.of(weights, student.hidden.shape[0])
    return UnmaskedCall(
        config.backend(statistics_dtype(student, teacher)),
        unmasked,
        unmask_sides(student, teacher, unmasked, config),
        unmasked.take(labels),
        unmasked.weights(weights),
        unmasked.take_options(options),
    )


def _rows(call: DistillationCall) -> DistillationRows:
    validate_call(call)
    work = unmask_call(call)
    if call.config.low_memory:
        rows = _rows_over_vocabulary_blocks(work, call.config)
    else:
        rows = _rows_over_token_chunks(work, call.config)
    return spread_rows(rows, work.unmasked)


def _rows_over_token_chunks(work: UnmaskedCall, config: LinearConfig) -> DistillationRows:
    rows = fake_distillation_rows(work.sides.student.hidden, work.labels, work.backend.dtype)

    def visit(tokens: slice, student: Tensor, teacher: Tensor | None, out: Tensor) -> None:
        batch = work.batch(student, teacher, tokens)
        write_rows(rows, tokens, work.backend.distillation_rows(batch, work.options.rows(tokens)))

    over_token_chunks(work.sides, visit, config, NO_GRADIENT)
    return rows


def _rows_over_vocabulary_blocks(work: UnmaskedCall, config: LinearConfig) -> DistillationRows:
    backend, options, everything = work.backend, work.options, slice(None)
    empty = work.sides.student.hidden.new_empty(work.unmasked.n_kept, 0)
    no_ids = work.batch(empty, empty, everything)
    states: list[Tensor] = []
    sums: list[Tensor] = []

    def visit(ids: slice, student: Tensor, teacher: Tensor | None, out: Tensor) -> None:
        batch = work.batch(student, teacher, everything)
        states.append(backend.state(batch, options, config.layout.columns.within(ids)))

    over_vocabulary_blocks(work.sides, visit, config, ProjectionGrads())
    if not states:  # a rank without ids
        states.append(backend.state(no_ids, options, config.layout.columns))
    rows = backend.finish(states, work.labels, options)
    if not options.interior:
        return rows

    def visit_again(ids: slice, student: Tensor, teacher: Tensor | None, out: Tensor) -> None:
        sums.append(backend.mixture_sums(work.batch(student, teacher, everything), options, rows))

    over_vocabulary_blocks(work.sides, visit_again, config, ProjectionGrads())
    if not sums:
        sums.append(backend.mixture_sums(no_ids, options, rows))
    return backend.finish_mixture(rows, sums, options)


def _fake_rows(call: DistillationCall) -> DistillationRows:
    dtype = statistics_dtype(call.student, call.teacher)
    return fake_distillation_rows(call.student.hidden, call.labels, dtype)


def _run_backward(inputs: BackwardInputs) -> ProjectionGrads:
    call, saved, grads = inputs
    work = unmask_call(call)
    backend, unmasked, kept = work.backend, work.unmasked, work.unmasked.kept
    if kept is not None:
        saved = SavedDistillation(saved.statistics[:, kept], saved.student_entropy[kept], None)
    upstream, factor = prepare_upstream(grads, call.student.head, backend.dtype, unmasked)
    sides = work.sides if grads.divergence is not None else work.sides._replace(teacher=None)

    def visit(ids: slice, student: Tensor, teacher: Tensor | None, out: Tensor) -> None:
        batch = work.batch(student, teacher, slice(None))
        columns = call.config.layout.columns.within(ids)
        backend.local.distillation_gradient(batch, work.options, columns, saved, upstream, out)

    gradients = ProjectionGrads.like(call.student.head, sides, call.config.needs_grad)
    over_vocabulary_blocks(sides, visit, call.config, gradients, factor)
    return finish_gradients(gradients, call.student, unmasked, call.config.layout)


def _backward(call: DistillationCall, rows: DistillationRows, grads: DistillationRows) -> ProjectionGrads:
    upstream = DistillationGrads(grads.divergence, grads.student_logprob, grads.student_entropy)
    return linear_rows_backward(BackwardInputs(call, rows.saved, upstream))


linear_rows = Operator("linear_distillation_rows", DistillationCall, DistillationRows, _rows, _fake_rows)
linear_rows_backward = Operator(
    "linear_distillation_rows_backward",
    BackwardInputs,
    ProjectionGrads,
    _run_backward,
    lambda inputs: fake_gradients(inputs.call.student, inputs.call.config),
    once=ONCE,
)
linear_rows.register_autograd(
    _backward,
    inputs=gradient_inputs("student"),
    outputs=DIFFERENTIABLE,
    saved=["student_entropy", "saved_statistics"],
)
