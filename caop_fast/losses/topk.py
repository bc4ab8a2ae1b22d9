"""The distillation loss against a sparse teacher: k ids and log-probabilities per token, full student logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from caop_fast.losses import checks
from caop_fast.losses.backends.resolve import get_backend, resolve_backend
from caop_fast.losses.batches import DistillationGrads, SavedTopK, TopKBatch, TopKRows
from caop_fast.losses.distillation import DIFFERENTIABLE, ONCE, distillation_output, reduce_rows
from caop_fast.losses.operator import GradientOperator, Operator, Overwrites
from caop_fast.losses.options import ExecutionConfig, TopKOptions
from caop_fast.losses.outputs import DistillationOutput
from caop_kernels.constants import MAX_LISTED, TAILS, TOPK_SAVED_FIELDS
from caop_kernels.listed_ids import repeated_ids, sort_ids

# A log-sum-exp in float32 is rounded by up to 5e-4 for logits up to 1e4, so honest log-probabilities may exceed 0 by
# that much.
LOGPROB_SLACK = 1e-3
ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def topk_distillation_loss(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    labels: Tensor | None = None,
    *,
    tail: str = "bucket",
    beta: float | Tensor = 0.0,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    student_softcap: float | None = None,
    vocab_size: int | None = None,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str = "auto",
    validate: bool | None = None,
) -> DistillationOutput:
    """Divergence between a student and a teacher of which k log-probabilities per token are known, in nats.

    ``loss``, ``divergence``, ``student_logprob`` and ``student_entropy`` are differentiable with respect to
    ``student_logits``, in any mix, once; the teacher never is. ``student_logprob`` and ``student_entropy`` are those of
    the student's full softmax, whatever ``tail`` says. ``reference/topk.py`` holds the formulas and their sources.

    What the teacher did not list:

    * ``"bucket"``: k + 1 outcomes, the last one everything else on both sides. The student's tail mass is summed over
      the columns that are not listed, so e^-35 is exact. The teacher's is 1 - sum p; where the rounding of the
      log-probabilities leaves nothing of it, it is taken as what that rounding can resolve,
      ``eps(teacher_logprobs.dtype)/2 * sum p_i |log p_i|``, or reverse KL would be +inf by rounding. (It is 0 for a
      one-hot teacher, log p = 0, whose reverse KL *is* +inf; where every column is listed; and, unless the
      log-probabilities say otherwise, where the student excludes every other column.)
    * ``"renormalize"``: both sides are renormalised over the k ids, and only those columns get a gradient.
    * ``"ignore"``: the sum over the k ids of the divergence's terms with full-softmax probabilities, as it is:
      it may be negative, and is not clamped.

    A listed id the student excludes (-inf) makes forward KL +inf, one the teacher excludes and the student allows
    reverse KL, whose gradient is then NaN; log-probabilities below -2**64 count as -inf. Forward and reverse KL are
    summed as terms ``p log(p/q) - p + q >= 0``, so rounding of the log-probabilities cannot make them negative.

    Args:
        student_logits: [..., V] float32, bfloat16, float16 or float64; any leading shape, N tokens in all.
        teacher_ids: [..., k] integers in [0, V), distinct within a row, in any order; 1 <= k <= 256. -1 pads a row.
        teacher_logprobs: [..., k] floating, log-probabilities of the teacher's *full* softmax at the same temperature;
            values beside padding ids are not used. At most 0, or above by the rounding of a log-softmax (1e-3).
        labels: [...] integers in [0, V), or -100 for none.
        tail: "bucket", "renormalize" or "ignore", above.
        beta: 0 = forward KL(teacher || student), 1 = reverse KL(student || teacher), between
            ``beta KL(t||m) + (1-beta) KL(s||m)`` with ``m = beta p_t + (1-beta) p_s`` (GKD, arXiv 2306.13649); or a
            tensor [...] of zeros and ones that chooses the KL per token.
        temperature: divides the student's logits, > 0.
        weights: [...], finite, >= 0, not differentiated. None means 1, and 0 where the label is -100. A row of weight 0
            reports 0 everywhere, gets gradient 0, and may hold anything.
        student_softcap: ``c * tanh(z / c)`` on the logits before the temperature; None for none.
        vocab_size: take only the first columns as the vocabulary; None for all. Columns past it get gradient 0.
        reduction: "mean" = sum(w D)/sum(w) (0 when all weights are 0), "sum", or "none" (w D per token).
        inplace: the backward writes the gradient over ``student_logits`` (not a leaf, nor a view of one); a second
            backward is an error.
        backend: "torch", "triton", or "auto" (Triton on GPUs where it is installed).
        validate: check values of tensors (ids, log-probabilities, labels, weights, beta), which makes the host wait
            for a GPU; None does so on the CPU only. Unchecked, a bad label or beta entry gives NaN in its row,
            as does an id out of range or listed twice.

    Returns:
        DistillationOutput; statistics are float32 (float64 when ``student_logits`` or ``teacher_logprobs`` are), with
        the leading shape of the inputs. ``teacher_entropy`` is over the outcomes compared; ``teacher_logprob`` is the
        log-probability *as listed*, also under "renormalize": NaN for a label that is not, 0 for the label -100.

    Raises:
        TypeError, ValueError: on bad arguments, naming the argument, what it got and what it takes.
        RuntimeError: on a second derivative, or a second backward with ``inplace``.
    """
    checks.floating_tensor("student_logits", student_logits, min_ndim=2)
    lead, columns = student_logits.shape[:-1], student_logits.shape[-1]
    listed = check_listed(teacher_ids, teacher_logprobs, lead)
    device = checks.one_device(
        {
            "student_logits": student_logits,
            "teacher_ids": teacher_ids,
            "teacher_logprobs": teacher_logprobs,
            "labels": labels,
            "weights": weights,
            "beta": beta,
        }
    )
    vocab = checks.vocabulary(vocab_size, student_logits=columns)
    dtype = checks.statistics_dtype((student_logits, teacher_logprobs))
    label_ids = checks.label_ids(labels, lead)
    row_weights = checks.row_weights(weights, label_ids, lead, dtype)
    options = TopKOptions(
        tail=checks.choice("tail", tail, TAILS),
        beta=checks.divergence_beta(beta, lead, dtype),
        temperature=checks.positive("temperature", temperature),
        softcap=checks.optional_positive("student_softcap", student_softcap),
    )
    checks.choice("reduction", reduction, checks.REDUCTIONS)
    checks.overwritable("student_logits", student_logits, inplace)
    execution = ExecutionConfig(resolve_backend(backend, device), checks.checks_values(validate, device), inplace)
    batch = TopKBatch(
        student_logits.reshape(-1, columns),
        teacher_ids.reshape(-1, listed).to(torch.int64),  # narrow integers cannot be compared with every V
        teacher_logprobs.detach().reshape(-1, listed),
        label_ids,
        row_weights,
    )
    found = topk_rows(TopKInputs(batch, options, vocab, execution))
    return distillation_output(reduce_rows(found.divergence, row_weights, reduction, lead), found, lead)


def check_listed(ids: Tensor, logprobs: Tensor, lead: torch.Size) -> int:
    """The k of ids [..., k] and log-probabilities [..., k]."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"teacher_ids must be a torch.Tensor of integers, got {type(ids).__name__}")
    if ids.dtype not in ID_DTYPES:
        raise TypeError(f"teacher_ids must be integers (int64 or int32), got {ids.dtype}")
    checks.floating_tensor("teacher_logprobs", logprobs)
    if ids.shape[:-1] != lead or ids.ndim != len(lead) + 1 or not 1 <= ids.shape[-1] <= MAX_LISTED:
        wanted = ", ".join([*map(str, lead), "k"])
        raise ValueError(f"teacher_ids must have shape [{wanted}] with k in [1, {MAX_LISTED}], got {tuple(ids.shape)}")
    if logprobs.shape != ids.shape:
        raise ValueError(
            f"teacher_logprobs must have the shape of teacher_ids, {tuple(ids.shape)}, got {tuple(logprobs.shape)}"
        )
    return ids.shape[-1]


class TopKInputs(NamedTuple):
    """Arguments of ``caop_fast::topk_rows``."""

    batch: TopKBatch
    options: TopKOptions
    vocab: int
    execution: ExecutionConfig


class GradientInputs(NamedTuple):
    """Arguments of ``caop_fast::topk_gradient``."""

    forward: TopKInputs
    saved: SavedTopK
    grads: DistillationGrads


def check_values(batch: TopKBatch, options: TopKOptions, vocab: int, sorted_ids: Tensor) -> None:
    """ValueError on values the mathematics cannot take. Ids and log-probabilities count in rows of weight > 0 only.

    ``sorted_ids`` [N, k]: the ids as ``sort_ids`` returns them.
    """
    _, ids, logprobs, labels, weights = batch
    checks.check_labels(labels, vocab)
    checks.check_weights(weights)
    checks.check_beta(options.beta)
    if weights is not None:
        ids, logprobs, sorted_ids = (listed[weights != 0] for listed in (ids, logprobs, sorted_ids))
    bad = (ids < -1) | (ids >= vocab)
    if bool(bad.any()):
        raise ValueError(f"teacher_ids must be -1 (padding) or in [0, {vocab}), got {int(ids[bad][0])}")
    twice = repeated_ids(sorted_ids)
    if bool(twice.any()):
        raise ValueError(f"teacher_ids must be distinct within a row, got {int(sorted_ids[:, 1:][twice][0])} twice")
    bad = ~(logprobs <= LOGPROB_SLACK) & (ids >= 0)
    if bool(bad.any()):
        raise ValueError(f"teacher_logprobs must be log-probabilities <= 0, got {float(logprobs[bad][0])}")


def _rows(inputs: TopKInputs) -> TopKRows:
    batch, options, vocab, execution = inputs
    sorted_ids = sort_ids(batch.ids, vocab)
    if execution.validate:
        check_values(batch, options, vocab, sorted_ids)
    return get_backend(execution.backend).topk_rows(batch, options, vocab, sorted_ids)


def _fake_rows(inputs: TopKInputs) -> TopKRows:
    batch = inputs.batch
    n_rows, dtype = batch.student.shape[0], checks.statistics_dtype((batch.student, batch.logprobs))

    def column() -> Tensor:
        return batch.student.new_empty(n_rows, dtype=dtype)

    return TopKRows(
        divergence=column(),
        student_logprob=None if batch.labels is None else column(),
        student_entropy=column(),
        teacher_logprob=None if batch.labels is None else column(),
        teacher_entropy=column(),
        saved_statistics=batch.student.new_empty((TOPK_SAVED_FIELDS, n_rows), dtype=dtype),
    )


def _gradient(inputs: GradientInputs, out: Tensor | None) -> Tensor:
    batch, options, vocab, execution = inputs.forward
    return get_backend(execution.backend).topk_gradient(batch, options, vocab, inputs.saved, inputs.grads, out)


def _backward(inputs: TopKInputs, found: TopKRows, grads: TopKRows) -> tuple[Tensor]:
    saved = SavedTopK(found.saved_statistics, found.student_entropy)
    upstream = DistillationGrads(grads.divergence, grads.student_logprob, grads.student_entropy)
    return (topk_gradient(GradientInputs(inputs, saved, upstream), inplace=inputs.execution.inplace),)


topk_rows = Operator("topk_rows", TopKInputs, TopKRows, _rows, _fake_rows)
topk_gradient = GradientOperator("topk_gradient", GradientInputs, _gradient, logits="forward_batch_student", once=ONCE)
topk_rows.register_autograd(
    _backward,
    inputs=["batch_student"],
    outputs=DIFFERENTIABLE,
    saved=["student_entropy", "saved_statistics"],
    overwrites=Overwrites(lambda inputs: inputs.execution.inplace, "student_logits", ONCE),
)
