"""Gradients of hidden states, weight and bias: computed in the forward pass, or from upstream gradients per row.

A loss whose weights per row are known gets its gradients in the forward pass, chunk of tokens by chunk of tokens: 4
units of GEMM work for two models (two projections, grad_hidden, grad_weight) where recomputing the logits in the
backward takes 6. The weights and the divisor of a mean are part of each row's gradient; the backward multiplies the
results by the upstream gradient of the loss, in new tensors: a second backward finds them unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from caop_fast.losses.backends.masked_rows import UnmaskedRows
from caop_fast.losses.backends.row_blocks import take
from caop_fast.losses.batches import ConfidenceGrads, DistillationGrads, DistillationRows, TokenGrads, TopKRows
from caop_fast.losses.distillation import ONCE, reduce_rows, total_weight
from caop_fast.losses.linear.chunking import ProjectionGrads, over_token_chunks
from caop_fast.losses.linear.config import LinearConfig
from caop_fast.losses.linear.distributed import VocabularyLayout
from caop_fast.losses.linear.lm_head import LMHead, ProjectedSide, even_slices
from caop_fast.losses.linear.sides import ProjectedSides
from caop_fast.losses.operator import Inputs, Operator
from caop_fast.losses.outputs import DistillationOutput

# Gradients of logits, in units of the upstream gradients of their rows, seldom exceed a few hundred:
# p (log p - log q) / T.
FLOAT16_ROOM = 64.0
ROUNDED_ELEMENTS = 1 << 22  # of a gradient that is scaled and rounded on a CPU at a time; elsewhere no block is needed
STATISTICS = ("divergence", "student_logprob", "student_entropy", "teacher_logprob", "teacher_entropy")

Grads = TypeVar("Grads", DistillationGrads, TokenGrads, ConfidenceGrads)


class LossWithGradients(NamedTuple):
    """What an operator returns that computes gradients in the forward pass."""

    loss: Tensor
    divergence: Tensor  # this and the other statistics: [N]
    student_entropy: Tensor
    teacher_entropy: Tensor
    factor: Tensor  # scalar that the gradients must be multiplied by to be those of the loss
    student_logprob: Tensor | None = None  # None without labels
    teacher_logprob: Tensor | None = None
    grad_hidden: Tensor | None = None  # [N, H] in the dtype of accumulation
    grad_weight: Tensor | None = None  # [V, H] of this rank's ids in ``LMHead.kept_dtype``
    grad_bias: Tensor | None = None  # [V] of this rank's ids in the dtype of accumulation

    def output(self, lead: torch.Size) -> DistillationOutput:
        """Loss and statistics with the leading shape of the inputs."""
        return DistillationOutput(
            self.loss,
            self.divergence.view(lead),
            None if self.student_logprob is None else self.student_logprob.view(lead),
            None if self.teacher_logprob is None else self.teacher_logprob.view(lead),
            self.student_entropy.view(lead),
            self.teacher_entropy.view(lead),
        )


class WeightedRows(NamedTuple):
    """The rows whose weighted divergences a loss adds up."""

    unmasked: UnmaskedRows
    weights: Tensor | None  # [N]
    reduction: str  # "mean" or "sum"
    labelled: bool
    dtype: torch.dtype  # of the statistics


# compute(tokens, student's logits, teacher's logits, where the gradient of the student's goes, upstream gradients [R]
# of the tokens' divergence or None) -> statistics of the tokens
ComputeRows = Callable[[slice, Tensor, "Tensor | None", Tensor, "Tensor | None"], "DistillationRows | TopKRows"]


def compute_with_gradients(
    sides: ProjectedSides, compute: ComputeRows, rows: WeightedRows, config: LinearConfig
) -> LossWithGradients:
    """The loss, its statistics, and its gradients but for ``factor``."""
    (hidden, head), unmasked = sides.student, rows.unmasked
    upstream = factor = None
    if any(config.needs_grad):
        ones = hidden.new_ones(unmasked.n_kept, dtype=rows.dtype)
        weights = unmasked.take(rows.weights)
        upstream = ones if weights is None else weights
        if rows.reduction == "mean":
            upstream = upstream / total_weight(rows.weights, upstream)
        upstream, factor = scale_upstream(upstream, head, unmasked.mask)
    columns = {
        name: hidden.new_zeros(unmasked.n_kept, dtype=rows.dtype)
        for name in STATISTICS
        if rows.labelled or not name.endswith("logprob")
    }

    def visit(tokens: slice, student: Tensor, teacher: Tensor | None, out: Tensor) -> None:
        computed = compute(tokens, student, teacher, out, take(upstream, tokens))
        for name, column in columns.items():
            column[tokens] = getattr(computed, name)

    # Against a sparse teacher, whose ids may be any rank's, the logits are gathered.
    grads = over_token_chunks(sides, visit, config, config.needs_grad, gathers_logits=sides.teacher is None)
    if grads.hidden is not None:
        config.layout.all_reduce(grads.hidden)
    statistics = {name: unmasked.spread(column) for name, column in columns.items()}
    divergence = statistics["divergence"]
    loss = reduce_rows(divergence, rows.weights, rows.reduction, divergence.shape)
    return LossWithGradients(
        loss=loss,
        factor=divergence.new_ones(()) if factor is None else factor,
        grad_hidden=None if grads.hidden is None else unmasked.scatter(grads.hidden),
        grad_weight=grads.weight,
        grad_bias=grads.bias,
        **statistics,
    )


def fake_with_gradients(
    student: ProjectedSide, config: LinearConfig, *, labelled: bool, dtype: torch.dtype
) -> LossWithGradients:
    """What ``compute_with_gradients`` returns, without values."""
    (hidden, head), needs = student, config.needs_grad
    (n_rows, n_features), width = hidden.shape, config.layout.columns.width
    new, accumulator = hidden.new_empty, head.accumulator_dtype
    return LossWithGradients(
        loss=new((), dtype=dtype),
        divergence=new(n_rows, dtype=dtype),
        student_entropy=new(n_rows, dtype=dtype),
        teacher_entropy=new(n_rows, dtype=dtype),
        factor=new((), dtype=dtype),
        student_logprob=new(n_rows, dtype=dtype) if labelled else None,
        teacher_logprob=new(n_rows, dtype=dtype) if labelled else None,
        grad_hidden=new((n_rows, n_features), dtype=accumulator) if needs.hidden else None,
        grad_weight=new((width, n_features), dtype=head.kept_dtype) if needs.weight else None,
        grad_bias=new(width, dtype=accumulator) if needs.bias else None,
    )


class ScaledInputs(NamedTuple):
    """Arguments of ``caop_fast::scaled_gradient``."""

    total: Tensor  # [R, ...]
    factor: Tensor  # scalar
    dtype: torch.dtype
    height: int
    anchor: Tensor | None
    """Any tensor that requires grad: with it, a derivative of the result is an error."""


def _scaled(inputs: ScaledInputs) -> Tensor:
    """``total * factor`` rounded once to ``dtype``, in a new tensor of ``height`` rows, 0 beyond those of ``total``."""
    total = inputs.total
    out = _fake_scaled(inputs)
    out[total.shape[0] :] = 0
    # Of one axis: without any, the factor would be rounded to the dtype of ``total``.
    factor = inputs.factor.to(torch.promote_types(total.dtype, torch.float32)).view(1)
    most = max(1, total.shape[0])
    if total.device.type == "cpu" and not inputs.dtype == total.dtype == factor.dtype:
        most = max(1, ROUNDED_ELEMENTS // max(1, total[:1].numel()))
    for rows in even_slices(total.shape[0], most):
        torch.mul(total[rows], factor, out=out[rows])  # a CPU makes the product in the dtype of ``factor`` first
    return out


def _fake_scaled(inputs: ScaledInputs) -> Tensor:
    return inputs.total.new_empty((inputs.height, *inputs.total.shape[1:]), dtype=inputs.dtype)


scaled_gradient = Operator("scaled_gradient", ScaledInputs, Tensor, _scaled, _fake_scaled, once=ONCE)


def differentiate_loss(
    operator: Operator[Inputs, LossWithGradients], student: Callable[[Inputs], ProjectedSide], name: str
) -> None:
    """Give an operator the derivative of its loss that it computed in the forward pass; its inputs are not kept.

    Args:
        student: finds the student among the operator's inputs.
        name: what the flattened names of its fields start with.
    """

    def backward(inputs: Inputs, computed: LossWithGradients, upstream: LossWithGradients) -> list[Tensor | None]:
        hidden, head = student(inputs)  # shapes and dtypes
        # Under create_graph=True going on from these gradients must be an error, not a derivative of 0.
        anchor = torch.zeros((), requires_grad=True) if torch.is_grad_enabled() else None
        factor = upstream.loss * computed.factor

        def scaled(total: Tensor | None, like: Tensor | None) -> Tensor | None:
            if total is None or like is None:
                return None
            return scaled_gradient(ScaledInputs(total, factor, like.dtype, like.shape[0], anchor))

        return [
            scaled(computed.grad_hidden, hidden),
            scaled(computed.grad_weight, head.weight),
            scaled(computed.grad_bias, head.bias),
        ]

    operator.register_autograd(
        backward,
        inputs=gradient_inputs(name),
        outputs=["loss"],
        saved=["factor", "grad_hidden", "grad_weight", "grad_bias"],
        save_inputs=False,
    )


def gradient_inputs(student: str) -> list[str]:
    """Flattened names of the student's tensors, in the order of ``ProjectionGrads``."""
    return [f"{student}_hidden", f"{student}_head_weight", f"{student}_head_bias"]


def scale_upstream(upstream: Tensor, head: LMHead, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Upstream gradients [..., R] of rows of hidden W^T, given those of the logits, and a factor for what they lead to.

    float16 GEMM operands have their full precision above 6e-5 only, which probabilities times weights divided by a
    token count seldom reach: there the rows are brought to magnitudes up to FLOAT16_ROOM, and the resulting gradients
    must be multiplied by the factor. Masked rows have no say in that, nor have infinite ones.
    """
    upstream = upstream * head.scale
    if mask is not None:
        upstream = upstream.masked_fill(mask, 0)
    if head.operand_dtype != torch.float16 or upstream.numel() == 0:
        return upstream, None
    largest = torch.where(upstream.isfinite(), upstream.abs(), 0.0).amax()
    factor = torch.where(largest > 0, largest / FLOAT16_ROOM, 1.0)
    return upstream / factor, factor


def prepare_upstream(
    grads: Grads, head: LMHead, dtype: torch.dtype, unmasked: UnmaskedRows
) -> tuple[Grads, Tensor | None]:
    """``scale_upstream`` of several upstream gradients [N] (one at least) of the rows that are computed."""
    present = torch.stack([unmasked.take(grad).to(dtype) for grad in grads if grad is not None])
    scaled, factor = scale_upstream(present, head, unmasked.mask)
    rest = iter(scaled)
    return type(grads)._make(None if grad is None else next(rest) for grad in grads), factor


def finish_gradients(
    grads: ProjectionGrads, student: ProjectedSide, unmasked: UnmaskedRows, layout: VocabularyLayout
) -> ProjectionGrads:
    """Gradients summed over the ranks, for all rows and ids, in the dtypes of hidden states, weight and bias."""
    hidden = grads.hidden
    if hidden is not None:
        hidden = unmasked.scatter(layout.all_reduce(hidden).to(student.hidden.dtype))
    return ProjectionGrads(hidden, _padded(grads.weight, student.head.weight), _padded(grads.bias, student.head.bias))


def fake_gradients(student: ProjectedSide, config: LinearConfig) -> ProjectionGrads:
    """What ``finish_gradients`` returns, without values."""
    (hidden, head), needs = student, config.needs_grad
    return ProjectionGrads(
        hidden.new_empty(hidden.shape) if needs.hidden else None,
        head.weight.new_empty(head.weight.shape) if needs.weight else None,
        head.bias.new_empty(head.bias.shape) if needs.bias and head.bias is not None else None,
    )


def _padded(part: Tensor | None, like: Tensor | None) -> Tensor | None:
    """A gradient of the first ids as one of all rows of ``like``, 0 in the others, in its dtype."""
    if part is None or like is None:
        return None
    if part.shape == like.shape:
        return part.to(like.dtype)
    out = part.new_zeros(like.shape, dtype=like.dtype)
    out[: part.shape[0]] = part
    return out
