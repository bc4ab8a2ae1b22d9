"""The distillation loss on logits: every statistic of a token from one read, differentiable in any mix.

``distillation_loss`` checks its arguments and calls the operator ``caop_fast::distillation_rows``, whose gradient is
``caop_fast::distillation_gradient``; both run on a backend.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from caop_fast.losses import checks
from caop_fast.losses.backends.resolve import get_backend, resolve_backend
from caop_fast.losses.batches import (
    Columns,
    DistillationBatch,
    DistillationGrads,
    DistillationRows,
    SavedDistillation,
    TopKRows,
)
from caop_fast.losses.operator import GradientOperator, Operator, Overwrites
from caop_fast.losses.options import DivergenceOptions, ExecutionConfig
from caop_fast.losses.outputs import DistillationOutput
from caop_kernels.constants import SAVED_FIELDS

ONCE = "the distillation losses can be differentiated once: double backward through them is not supported"
DIFFERENTIABLE = ("divergence", "student_logprob", "student_entropy")


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    beta: float | Tensor = 0.0,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    vocab_size: int | None = None,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str = "auto",
    validate: bool | None = None,
) -> DistillationOutput:
    """Divergence between student and teacher per token, with log-probabilities and entropies, in nats.

    ``loss``, ``divergence``, ``student_logprob`` and ``student_entropy`` are differentiable with respect to
    ``student_logits``, in any mix, once; the teacher never is. No shift is applied: ``logits[i]`` and ``labels[i]``
    speak of the same token. The memory beyond inputs and the gradient is a few small blocks of rows.

    A token that one side excludes (-inf) and the other allows, however improbable, makes the KL that weighs it by the
    other side +inf; one that both exclude contributes 0. Finite masks such as ``finfo.min`` count as -inf: whatever
    lies 2**64 (log2 units) or more below the other side's logit does, so anything above 2**64 is reported as +inf. A
    reverse KL of +inf has no gradient: NaN throughout its row. NaN or +inf among the logits makes their row NaN.

    Leading axes are flattened, which copies logits such as ``logits[:, :-1]``: keep every position, and give the last
    one the label -100. Works under ``torch.compile(fullgraph=True)``, and ``torch.autocast`` changes nothing.

    Args:
        student_logits: [..., V_s] float32, bfloat16, float16 or float64; any leading shape, N tokens in all.
        teacher_logits: [..., V_t], same leading shape; the dtype may differ.
        labels: [...] integers in [0, V), or -100 for none.
        beta: 0 = forward KL(teacher || student), 1 = reverse KL(student || teacher), between
            ``beta KL(t||m) + (1-beta) KL(s||m)`` with ``m = beta p_t + (1-beta) p_s`` (GKD, arXiv 2306.13649); or a
            tensor [...] of zeros and ones that chooses the KL per token.
        temperature: divides both sides' logits, > 0. There is no factor T**2.
        weights: [...], finite, >= 0, not differentiated. None means 1, and 0 where the label is -100. A row of weight 0
            reports 0 everywhere, gets gradient 0, and may hold anything.
        student_softcap: ``c * tanh(z / c)`` on the logits before the temperature; None for none.
        teacher_softcap: the same for the teacher.
        vocab_size: compare only the first ids; needed where V_s and V_t differ. Columns past it get gradient 0.
        reduction: "mean" = sum(w D)/sum(w) (0 when all weights are 0), "sum", or "none" (w D per token).
        inplace: the backward writes the gradient over ``student_logits`` (not a leaf, nor a view of one, nor expanded);
            a second backward is an error. Under ``torch.compile`` the compiler decides where the gradient goes.
        backend: "torch", "triton", or "auto" (Triton on GPUs where it is installed). With Triton all statistics of a
            row come from one read of both logits (for 0 < beta < 1 from two), the gradient from one more.
        validate: check values of tensors (labels, weights, beta), which makes the host wait for a GPU; None does so
            on the CPU only. Unchecked, a bad label gives NaN in its log-probabilities, a bad beta entry in its
            divergence.

    Returns:
        DistillationOutput; statistics are float32 (float64 when an input is), with the leading shape of the inputs.

    Raises:
        TypeError, ValueError: on bad arguments, naming the argument, what it got and what it takes.
    """
    checks.floating_tensor("student_logits", student_logits, min_ndim=2)
    checks.floating_tensor("teacher_logits", teacher_logits, min_ndim=2)
    lead = student_logits.shape[:-1]
    if teacher_logits.shape[:-1] != lead:
        raise ValueError(
            "teacher_logits must have the leading shape of student_logits, "
            f"{tuple(lead)}, got {tuple(teacher_logits.shape[:-1])}"
        )
    device = checks.one_device(
        {
            "student_logits": student_logits,
            "teacher_logits": teacher_logits,
            "labels": labels,
            "weights": weights,
            "beta": beta,
        }
    )
    vocab = checks.vocabulary(
        vocab_size, student_logits=student_logits.shape[-1], teacher_logits=teacher_logits.shape[-1]
    )
    dtype = checks.statistics_dtype((student_logits, teacher_logits))
    label_ids = checks.label_ids(labels, lead)
    row_weights = checks.row_weights(weights, label_ids, lead, dtype)
    options = DivergenceOptions(
        beta=checks.divergence_beta(beta, lead, dtype),
        temperature=checks.positive("temperature", temperature),
        student_softcap=checks.optional_positive("student_softcap", student_softcap),
        teacher_softcap=checks.optional_positive("teacher_softcap", teacher_softcap),
    )
    checks.choice("reduction", reduction, checks.REDUCTIONS)
    checks.overwritable("student_logits", student_logits, inplace)
    execution = ExecutionConfig(resolve_backend(backend, device), checks.checks_values(validate, device), inplace)
    batch = DistillationBatch(
        student_logits.reshape(-1, student_logits.shape[-1]),
        teacher_logits.detach().reshape(-1, teacher_logits.shape[-1]),
        label_ids,
        row_weights,
    )
    found = distillation_rows(DistillationInputs(batch, options, vocab, execution))
    return distillation_output(reduce_rows(found.divergence, row_weights, reduction, lead), found, lead)


def distillation_output(
    loss: Tensor | None, found: DistillationRows | TopKRows, lead: torch.Size
) -> DistillationOutput:
    """Statistics [N] with the leading shape of the inputs."""
    return DistillationOutput(
        loss,
        found.divergence.view(lead),
        None if found.student_logprob is None else found.student_logprob.view(lead),
        None if found.teacher_logprob is None else found.teacher_logprob.view(lead),
        found.student_entropy.view(lead),
        found.teacher_entropy.view(lead),
    )


def reduce_rows(divergence: Tensor, weights: Tensor | None, reduction: str, lead: torch.Size) -> Tensor:
    """The loss of [N] divergences: sum(w D)/sum(w), sum(w D) or w D. Rows of weight 0 must hold 0."""
    weighted = divergence if weights is None else divergence * weights
    if reduction == "none":
        return weighted.view(lead)
    total = weighted.sum()
    return total if reduction == "sum" else total / total_weight(weights, divergence)


def total_weight(weights: Tensor | None, rows: Tensor) -> Tensor | int:
    """What a mean divides by: sum(w), or 1 where that is 0."""
    if weights is None:
        return max(rows.shape[0], 1)
    total = weights.sum()
    return torch.where(total == 0, 1.0, total)


class DistillationInputs(NamedTuple):
    """Arguments of ``caop_fast::distillation_rows``."""

    batch: DistillationBatch
    options: DivergenceOptions
    vocab: int
    execution: ExecutionConfig


class GradientInputs(NamedTuple):
    """Arguments of ``caop_fast::distillation_gradient``."""

    forward: DistillationInputs
    saved: SavedDistillation
    grads: DistillationGrads


def _rows(inputs: DistillationInputs) -> DistillationRows:
    batch, options, vocab, execution = inputs
    if execution.validate:
        check_row_values(batch.labels, batch.weights, options, vocab)
    dtype = checks.statistics_dtype((batch.student, batch.teacher))
    return get_backend(execution.backend).distillation_rows(batch, options, vocab, dtype)


def check_row_values(labels: Tensor | None, weights: Tensor | None, options: DivergenceOptions, vocab: int) -> None:
    """ValueError on labels, weights or a beta per row that make no sense. Reads values."""
    checks.check_labels(labels, vocab)
    checks.check_weights(weights)
    checks.check_beta(options.beta)


def _fake_rows(inputs: DistillationInputs) -> DistillationRows:
    batch, execution = inputs.batch, inputs.execution
    dtype = checks.statistics_dtype((batch.student, batch.teacher))
    found = fake_distillation_rows(batch.student, batch.labels, dtype)
    if not get_backend(execution.backend).reports_neg_inf:
        return found
    return found._replace(has_neg_inf=batch.student.new_empty(1, dtype=torch.bool))


def fake_distillation_rows(student: Tensor, labels: Tensor | None, dtype: torch.dtype) -> DistillationRows:
    """Rows without values, for ``student`` [N, ...]."""
    n_rows = student.shape[0]

    def column() -> Tensor:
        return student.new_empty(n_rows, dtype=dtype)

    return DistillationRows(
        divergence=column(),
        student_logprob=None if labels is None else column(),
        student_entropy=column(),
        teacher_logprob=None if labels is None else column(),
        teacher_entropy=column(),
        saved_statistics=student.new_empty((SAVED_FIELDS, n_rows), dtype=dtype),
        has_neg_inf=None,
    )


def _gradient(inputs: GradientInputs, out: Tensor | None) -> Tensor:
    batch, options, vocab, execution = inputs.forward
    return get_backend(execution.backend).distillation_gradient(
        batch, options, Columns.whole(vocab), inputs.saved, inputs.grads, out
    )


def _backward(inputs: DistillationInputs, found: DistillationRows, grads: DistillationRows) -> tuple[Tensor]:
    upstream = DistillationGrads(grads.divergence, grads.student_logprob, grads.student_entropy)
    return (distillation_gradient(GradientInputs(inputs, found.saved, upstream), inplace=inputs.execution.inplace),)


distillation_rows = Operator("distillation_rows", DistillationInputs, DistillationRows, _rows, _fake_rows)
distillation_gradient = GradientOperator(
    "distillation_gradient", GradientInputs, _gradient, logits="forward_batch_student", once=ONCE
)
distillation_rows.register_autograd(
    _backward,
    inputs=["batch_student"],
    outputs=DIFFERENTIABLE,
    saved=["student_entropy", "saved_statistics", "has_neg_inf"],
    overwrites=Overwrites(lambda inputs: inputs.execution.inplace, "student_logits", ONCE),
)
