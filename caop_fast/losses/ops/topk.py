"""``torch.ops.caop_fast.topk_rows``: row statistics against a sparse teacher, with their derivative.

The forward returns what the caller sees and a small tensor that only the derivative understands: per row the maxima and
partition sums of the student, in the units of the backend that made them.
"""

import importlib

import torch
from torch import Tensor

from caop_fast.losses import checks
from caop_fast.losses.on_triton import unit_columns
from caop_fast.losses.ops.distillation import ONCE
from caop_fast.losses.ops.gradients import differentiate, gradient_operators
from caop_fast.losses.reference import topk as reference
from caop_fast.losses.rows import live_rows, row_blocks, take

# A log-sum-exp in float32 is rounded by up to 5e-4 for logits up to 1e4, so honest log-probabilities may exceed 0 by
# that much.
LOGPROB_SLACK = 1e-3
SAVED_FIELDS = len(reference.SavedStatistics._fields)


@torch.library.custom_op("caop_fast::topk_rows", mutates_args=())
def topk_rows(
    student: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    beta_rows: Tensor | None,
    tail: str,
    beta: float,
    temperature: float,
    softcap: float | None,
    vocab: int,
    inplace: bool,
    triton: bool,
    validate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Divergence, student log-probability and entropy, teacher log-probability and entropy [N], and the saved_statistics.

    student [N, >= vocab], ids and logprobs [N, k], labels [N] int64, weights and beta_rows [N] in the statistics dtype.
    Rows of weight 0 hold 0. Without labels both log-probabilities are empty. ``beta_rows`` replaces ``beta``;
    ``inplace`` says what the derivative may do, ``validate`` whether values are checked.
    """
    if validate:
        check_values(ids, logprobs, labels, weights, beta_rows, vocab)
    dtype = checks.statistics_dtype((student, logprobs))
    if triton:
        found = importlib.import_module("caop_kernels.topk").topk_statistics(
            unit_columns(student),
            ids,
            logprobs,
            labels,
            weights=weights,
            beta=beta if beta_rows is None else beta_rows,
            tail=tail,
            temperature=temperature,
            student_softcap=softcap,
            vocab_size=vocab,
        )
        return tuple(student.new_empty(0, dtype=dtype) if column is None else column for column in found)
    n_rows = student.shape[0]
    outputs = [student.new_zeros(n_rows, dtype=dtype) for _ in reference.Statistics._fields]
    if labels is None:
        outputs[1], outputs[3] = outputs[1][:0].clone(), outputs[3][:0].clone()
    saved_statistics = student.new_zeros(SAVED_FIELDS, n_rows, dtype=dtype)
    live, _ = live_rows(weights)  # on the CPU rows of weight 0 are left out; elsewhere that would need a sync
    for rows in row_blocks(n_rows, vocab, student.device, live):
        options = reference.Options(tail, _block_beta(beta, beta_rows, rows), temperature, softcap)
        listed = reference.list_teacher(ids[rows], logprobs[rows], vocab, dtype)
        block = student[rows, :vocab]
        opened = reference.open_rows(block, listed, options, dtype)
        statistics, norm = reference.row_statistics(opened, block, listed, take(labels, rows), options)
        for output, column in zip(outputs, statistics, strict=True):
            if column is not None:
                output[rows] = column.view(-1)
        saved_statistics[:, rows] = torch.cat(norm, -1).t()
    if weights is not None:
        outputs = [out.masked_fill_(weights == 0, 0) if out.numel() else out for out in outputs]
    return (*outputs, saved_statistics)


@topk_rows.register_fake
def _(
    student, ids, logprobs, labels, weights, beta_rows, tail, beta, temperature, softcap, vocab, inplace, triton,
    validate,
):  # fmt: skip
    n_rows, dtype = student.shape[0], checks.statistics_dtype((student, logprobs))
    column = [student.new_empty(n_rows, dtype=dtype) for _ in range(3)]
    logprob = [student.new_empty(0 if labels is None else n_rows, dtype=dtype) for _ in range(2)]
    saved_statistics = student.new_empty((SAVED_FIELDS, n_rows), dtype=dtype)
    return column[0], logprob[0], column[1], logprob[1], column[2], saved_statistics


def topk_logit_gradient(
    student: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    beta_rows: Tensor | None,
    saved_statistics: Tensor,
    entropy: Tensor,
    grad_divergence: Tensor | None,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    tail: str,
    beta: float,
    temperature: float,
    softcap: float | None,
    vocab: int,
    triton: bool,
    *,
    inplace: bool,
) -> Tensor:
    """Gradient [N, V] in the dtype of ``student``, for upstream gradients [N] of the first three outputs."""
    upstream = {"grad_divergence": grad_divergence, "grad_logprob": grad_logprob, "grad_entropy": grad_entropy}
    if triton:
        packed = unit_columns(student)
        found = importlib.import_module("caop_kernels.topk_gradient").topk_gradient(
            packed,
            ids,
            logprobs,
            labels,
            saved_statistics,
            entropy,
            weights=weights,
            beta=beta if beta_rows is None else beta_rows,
            tail=tail,
            temperature=temperature,
            student_softcap=softcap,
            vocab_size=vocab,
            inplace=inplace or packed is not student,
            **upstream,
        )
        return student.copy_(found) if inplace and packed is not student else found
    out = student if inplace else torch.empty(student.shape, dtype=student.dtype, device=student.device)
    live, _ = live_rows(weights)
    for rows in row_blocks(student.shape[0], vocab, student.device, live):
        options = reference.Options(tail, _block_beta(beta, beta_rows, rows), temperature, softcap)
        listed = reference.list_teacher(ids[rows], logprobs[rows], vocab, saved_statistics.dtype)
        opened = reference.open_rows(
            student[rows, :vocab], listed, options, saved_statistics.dtype, slope=softcap is not None
        )
        gradient = reference.logit_gradient(
            opened,
            reference.SavedStatistics(*saved_statistics[:, rows].unsqueeze(-1)),
            entropy[rows].view(-1, 1),
            listed,
            take(labels, rows),
            options,
            **{n: None if d is None else d[rows].view(-1, 1) / temperature for n, d in upstream.items()},
        )
        out[rows, :vocab] = gradient.to(out.dtype)
    out[:, vocab:] = 0
    if weights is not None:
        out.masked_fill_((weights == 0).view(-1, 1), 0)
    return out


def _block_beta(beta: float, beta_rows: Tensor | None, rows: slice | Tensor) -> float | Tensor:
    return beta if beta_rows is None else beta_rows[rows].view(-1, 1)


def check_values(
    ids: Tensor,
    logprobs: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    beta_rows: Tensor | None,
    vocab: int,
) -> None:
    """ValueError on values the mathematics cannot take. Ids and log-probabilities count in rows of weight > 0 only."""
    checks.check_labels(labels, vocab)
    checks.check_weights(weights)
    checks.check_beta(beta_rows)
    if weights is not None:
        ids, logprobs = ids[weights != 0], logprobs[weights != 0]
    bad = (ids < -1) | (ids >= vocab)
    if bool(bad.any()):
        raise ValueError(f"teacher_ids must be -1 (padding) or in [0, {vocab}), got {int(ids[bad][0])}")
    ordered = ids.sort(-1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if bool(twice.any()):
        raise ValueError(f"teacher_ids must be distinct within a row, got {int(ordered[:, 1:][twice][0])} twice")
    bad = ~(logprobs <= LOGPROB_SLACK) & (ids >= 0)
    if bool(bad.any()):
        raise ValueError(f"teacher_logprobs must be log-probabilities <= 0, got {float(logprobs[bad][0])}")


gradient = gradient_operators("topk_gradient", topk_logit_gradient, once=ONCE)
topk_gradient, topk_gradient_ = gradient.fresh, gradient.over
differentiate(
    topk_rows,
    gradient,
    logits="student_logits",
    n_tensors=6,
    labels=3,
    saved=(5, 2),
    flows=(0, 1, 2),
    logprob=1,
)
