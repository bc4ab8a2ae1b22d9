"""Statistics of one model's tokens, from its hidden states and output head.

``linear_token_statistics`` calls the operator ``caop_fast::linear_tokens``, whose backward recomputes the logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from caop_fast.losses import checks
from caop_fast.losses.backends.masked_rows import UnmaskedRows
from caop_fast.losses.backends.row_blocks import take
from caop_fast.losses.batches import SavedTokens, TokenBatch, TokenGrads, TokenRows
from caop_fast.losses.linear.chunking import (
    NO_GRADIENT,
    ProjectionGrads,
    over_token_chunks,
    over_vocabulary_blocks,
    spread_rows,
    write_rows,
)
from caop_fast.losses.linear.config import LinearConfig, prepare, statistics_dtype
from caop_fast.losses.linear.distributed import VocabularyShards
from caop_fast.losses.linear.gradients import fake_gradients, finish_gradients, gradient_inputs, prepare_upstream
from caop_fast.losses.linear.lm_head import LMHead, ProjectedSide
from caop_fast.losses.linear.sides import unmask_sides
from caop_fast.losses.operator import Operator
from caop_fast.losses.options import TokenOptions
from caop_fast.losses.outputs import TokenStatistics
from caop_fast.losses.tokens import DIFFERENTIABLE, ONCE, fake_token_rows, token_output


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
    mix, once. The backward recomputes the logits in vocabulary blocks: 1 unit of 2 N V H operations forward and 3
    backward. Works under ``torch.compile(fullgraph=True)`` and ``torch.autocast``.

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
    call = prepare(
        {"": ProjectedSide(hidden, LMHead(weight, bias, scale))},
        {"labels": labels, "weights": weights},
        vocab_size=vocab_size,
        logits_dtype=logits_dtype,
        chunk_size=chunk_size,
        process_group=process_group,
        backend=backend,
        validate=validate,
    )
    label_ids = checks.label_ids(labels, call.lead)
    row_weights = checks.row_weights(weights, label_ids, call.lead, call.dtype)
    options = TokenOptions(checks.positive("temperature", temperature), checks.optional_positive("softcap", softcap))
    rows = linear_tokens(TokenCall(call.sides[0], label_ids, row_weights, options, call.config))
    return token_output(rows, call.lead)


class TokenCall(NamedTuple):
    """Arguments of ``caop_fast::linear_tokens``."""

    student: ProjectedSide
    labels: Tensor | None  # [N] int64
    weights: Tensor | None  # [N] in the dtype of the statistics
    options: TokenOptions
    config: LinearConfig


class BackwardInputs(NamedTuple):
    """Arguments of ``caop_fast::linear_tokens_backward``."""

    call: TokenCall
    saved: SavedTokens
    grads: TokenGrads


def _rows(call: TokenCall) -> TokenRows:
    student, labels, weights, options, config = call
    if config.execution.validate:
        checks.check_labels(labels, config.layout.columns.total)
        checks.check_weights(weights)
    unmasked = UnmaskedRows.of(weights, student.hidden.shape[0])
    sides = unmask_sides(student, None, unmasked, config)
    labels, weights = unmasked.take(labels), unmasked.weights(weights)
    backend = config.backend(statistics_dtype(student))
    rows = fake_token_rows(sides.student.hidden, labels, backend.dtype, config.execution.backend)

    def visit(tokens: slice, logits: Tensor, teacher: Tensor | None, out: Tensor) -> None:
        batch = TokenBatch(logits, take(labels, tokens), take(weights, tokens))
        write_rows(rows, tokens, backend.token_rows(batch, options))

    over_token_chunks(sides, visit, config, NO_GRADIENT)
    return spread_rows(rows, unmasked)


def _fake_rows(call: TokenCall) -> TokenRows:
    dtype = statistics_dtype(call.student)
    return fake_token_rows(call.student.hidden, call.labels, dtype, call.config.execution.backend)


def _run_backward(inputs: BackwardInputs) -> ProjectionGrads:
    (student, labels, weights, options, config), saved, grads = inputs
    unmasked = UnmaskedRows.of(weights, student.hidden.shape[0])
    sides = unmask_sides(student, None, unmasked, config)
    labels, weights = unmasked.take(labels), unmasked.weights(weights)
    backend = config.backend(statistics_dtype(student))
    if unmasked.kept is not None:
        saved = SavedTokens(saved.statistics[:, unmasked.kept], saved.entropy[unmasked.kept])
    upstream, factor = prepare_upstream(grads, student.head, backend.dtype, unmasked)

    def visit(ids: slice, logits: Tensor, teacher: Tensor | None, out: Tensor) -> None:
        batch, columns = TokenBatch(logits, labels, weights), config.layout.columns.within(ids)
        backend.local.token_gradient(batch, options, columns, saved, upstream, out)

    gradients = ProjectionGrads.like(student.head, sides, config.needs_grad)
    over_vocabulary_blocks(sides, visit, config, gradients, factor)
    return finish_gradients(gradients, student, unmasked, config.layout)


def _backward(call: TokenCall, rows: TokenRows, grads: TokenRows) -> ProjectionGrads:
    saved = SavedTokens(rows.saved_statistics, rows.entropy)
    return linear_tokens_backward(BackwardInputs(call, saved, TokenGrads(grads.logprob, grads.entropy, grads.lse)))


linear_tokens = Operator("linear_tokens", TokenCall, TokenRows, _rows, _fake_rows)
linear_tokens_backward = Operator(
    "linear_tokens_backward",
    BackwardInputs,
    ProjectionGrads,
    _run_backward,
    lambda inputs: fake_gradients(inputs.call.student, inputs.call.config),
    once=ONCE,
)
linear_tokens.register_autograd(
    _backward,
    inputs=gradient_inputs("student"),
    outputs=DIFFERENTIABLE,
    saved=["entropy", "saved_statistics"],
)
