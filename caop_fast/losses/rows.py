"""Runs the definitions in ``reference/`` over many rows, in blocks that stay in cache.

On the CPU a block is small enough for its half dozen arrays to stay in the cache while a dozen passes go over them,
which is where the speed comes from; elsewhere it is large enough to fill the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from caop_fast.losses.reference import states, tokens
from caop_fast.losses.reference.divergence import (
    Block,
    Options,
    RowStatistics,
    choose_divergence,
    coefficients,
    contains_neg_inf,
    logit_gradient,
    mixture_excess,
    open_block,
    row_statistics,
    weighted_sum,
)

CPU_BLOCK_ELEMENTS = 1 << 19  # 2 MB of float32: measured best between 2**18 and 2**19, twice as slow from 2**21 on
# PyTorch splits the sum of a single row this long over threads, but keeps the rows of a larger block whole: with blocks
# of several rows, the bits of the last row would depend on how many come before it.
SPLIT_ELEMENTS = 1 << 15
DEVICE_BLOCK_ELEMENTS = 1 << 25  # 128 MB of float32


def row_blocks(n_rows: int, vocab: int, device: torch.device, index: Tensor | None) -> Iterator[slice | Tensor]:
    """The rows of each block: slices of range(n_rows), or pieces of ``index``. At least one block, maybe empty."""
    elements = CPU_BLOCK_ELEMENTS if device.type == "cpu" else DEVICE_BLOCK_ELEMENTS
    height = max(1, elements // vocab)
    if device.type == "cpu" and vocab >= SPLIT_ELEMENTS:
        height = 1
    count = n_rows if index is None else index.numel()
    for start in range(0, max(count, 1), height):
        rows = slice(start, min(start + height, count))
        yield rows if index is None else index[rows]


def take(values: Any, rows: slice | Tensor) -> Any:
    """The entries of a block's rows; floats and None stay as they are."""
    return values[rows] if isinstance(values, Tensor) else values


def take_options(options: Options, rows: slice | Tensor) -> Options:
    return options._replace(beta=take(options.beta, rows)) if isinstance(options.beta, Tensor) else options


def join_statistics(blocks: list[RowStatistics]) -> RowStatistics:
    """Statistics of consecutive blocks in one."""
    if len(blocks) == 1:
        return blocks[0]
    return RowStatistics(*(None if columns[0] is None else torch.cat(columns) for columns in zip(*blocks, strict=True)))


def block_statistics(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    options: Options,
    dtype: torch.dtype,
    *,
    consume: bool = False,
    slope: bool = False,
) -> tuple[Block, RowStatistics, bool]:
    """The opened block of raw logits [R, V], its statistics, and ``has_neg_inf``.

    The second way through, which -inf needs, is taken on the CPU only where a block asks for it, and always elsewhere.
    """
    block, *shifts = open_block(student, teacher, options, dtype, consume=consume, slope=slope)
    has_neg_inf = contains_neg_inf(block)
    return block, row_statistics(block, tuple(shifts), labels, options, has_neg_inf=has_neg_inf), has_neg_inf


def block_gradient(
    block: Block,
    rows: RowStatistics,
    labels: Tensor | None,
    options: Options,
    *,
    has_neg_inf: bool,
    **upstream: Tensor | None,
) -> Tensor | None:
    """Gradient [R, V] for upstream gradients of divergence, logprob and entropy; None when nothing flows."""
    found = coefficients(rows, options, labels, block.student_e.shape[-1], **upstream)
    return None if found is None else logit_gradient(block, rows, found, labels, options, has_neg_inf=has_neg_inf)


class Columns(NamedTuple):
    """Which ids of a vocabulary of ``total`` the first ``width`` columns of some logits are: from ``first`` on."""

    first: int
    width: int
    total: int

    @staticmethod
    def whole(vocab: int) -> Columns:
        return Columns(0, vocab, vocab)

    def local(self, labels: Tensor | None) -> Tensor | None:
        """Labels relative to the first column; those of other columns, and -100, are not in [0, width)."""
        return labels if labels is None or self.first == 0 else labels - self.first

    def within(self, ids: slice) -> Columns:
        """Some of these columns."""
        return Columns(self.first + ids.start, ids.stop - ids.start, self.total)

    def of(self, logits: Tensor) -> Tensor:
        """These columns of logits of the whole vocabulary."""
        return logits[:, self.first : self.first + self.width]


class Rows(NamedTuple):
    """Statistics of N rows, [N] each, and what a gradient needs to know of them."""

    divergence: Tensor
    student_logprob: Tensor | None
    teacher_logprob: Tensor | None
    student_entropy: Tensor
    teacher_entropy: Tensor
    saved_statistics: Tensor
    """[6, N]: student_shift, teacher_shift, student_total, teacher_total, log_ratio, mean_ratio of RowStatistics."""
    has_neg_inf: bool


def distillation_rows(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    options: Options,
    vocab: int,
    dtype: torch.dtype,
) -> Rows:
    """Statistics of logits [N, V_s] and [N, V_t]; rows of weight 0 report 0 and on the CPU are never touched."""
    live, dead = live_rows(weights)
    found, has_neg_inf = [], False
    for rows in row_blocks(student.shape[0], vocab, student.device, live):
        _, statistics, block_has_neg_inf = block_statistics(
            student[rows, :vocab],
            teacher[rows, :vocab],
            take(labels, rows),
            take_options(options, rows),
            dtype,
            consume=isinstance(rows, Tensor),  # an index makes a copy, which is ours
        )
        found.append(statistics)
        has_neg_inf |= block_has_neg_inf
    joined = join_statistics(found)
    columns = (joined.student_shift, joined.teacher_shift, joined.student_total, joined.teacher_total)
    mean_ratio = torch.zeros_like(joined.log_ratio) if joined.mean_ratio is None else joined.mean_ratio
    columns = (*columns, joined.log_ratio, mean_ratio)
    n_rows = student.shape[0]
    return Rows(
        spread(joined.divergence, n_rows, live, dead),
        spread(joined.student_logprob, n_rows, live, dead),
        spread(joined.teacher_logprob, n_rows, live, dead),
        spread(joined.student_entropy, n_rows, live, dead),
        spread(joined.teacher_entropy, n_rows, live, dead),
        torch.stack([spread(column, n_rows, live, dead) for column in columns]),
        has_neg_inf,
    )


def distillation_chunk(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    options: Options,
    dtype: torch.dtype,
    grad_divergence: Tensor | None,
) -> RowStatistics:
    """Statistics of logits [N, V]; given ``grad_divergence`` [N], the gradient is written over the student's.

    Both come from the same exponentials. The logits are overwritten in any case.
    """
    found = []
    for rows in row_blocks(student.shape[0], student.shape[1], student.device, None):
        chosen, block_labels = take_options(options, rows), take(labels, rows)
        block, statistics, has_neg_inf = block_statistics(
            student[rows],
            teacher[rows],
            block_labels,
            chosen,
            dtype,
            consume=True,
            slope=grad_divergence is not None and options.student_softcap is not None,
        )
        found.append(statistics)
        if grad_divergence is not None:
            flow = grad_divergence[rows].view(-1, 1) / options.temperature
            gradient = block_gradient(
                block, statistics, block_labels, chosen, has_neg_inf=has_neg_inf, grad_divergence=flow
            )
            if gradient.data_ptr() != student[rows].data_ptr():
                student[rows] = gradient
    return join_statistics(found)


def state_rows(state: Tensor, labels: Tensor | None, options: Options) -> Rows:
    """Statistics of rows from the state [12, N] of all their columns; an interior divergence is left to the mixture."""
    found = states.finish_state(state, labels)
    return Rows(
        pick_divergence(options.beta, found.forward_kl, found.reverse_kl),
        found.student_logprob,
        found.teacher_logprob,
        found.student_entropy,
        found.teacher_entropy,
        states.saved_statistics(state),
        True,
    )


def pick_divergence(beta: float | Tensor, forward: Tensor, reverse: Tensor) -> Tensor:
    """``choose_divergence`` of [N]."""
    return choose_divergence(beta, forward.view(-1, 1), reverse.view(-1, 1)).view(-1)


def mixture_sums(student: Tensor, teacher: Tensor, options: Options, saved_statistics: Tensor) -> Tensor:
    """The sums [1, 2, N] of an interior divergence over some columns; those of other columns are added to them."""
    sums = []
    for rows in row_blocks(student.shape[0], student.shape[1], student.device, None):
        known = known_statistics(saved_statistics[:, rows], saved_statistics[0, rows])
        block, *_ = open_block(student[rows], teacher[rows], options, saved_statistics.dtype, known=known)
        excess = mixture_excess(block, known.log_ratio, options, contains_neg_inf(block))
        parts = [-weighted_sum(e, x) for e, x in zip((block.student_e, block.teacher_e), excess, strict=True)]
        sums.append(torch.cat(parts, -1).t())
    return torch.cat(sums, 1).unsqueeze(0)


def finish_mixture(sums: Tensor, saved_statistics: Tensor, options: Options) -> Tensor:
    """The interior divergence [N] of sums [K, 2, N]; its mean ratio goes into the saved_statistics."""
    mean_ratio, mean_teacher = sums.sum(0) / saved_statistics[2:4]
    saved_statistics[5] = mean_ratio
    return (options.beta * mean_teacher + (1 - options.beta) * mean_ratio).clamp_(min=0)


def distillation_gradient(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    options: Options,
    columns: Columns,
    saved_statistics: Tensor,
    student_entropy: Tensor,
    *,
    has_neg_inf: bool | None = None,
    out: Tensor | None,
    grad_divergence: Tensor | None,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    """Gradient [N, V_s] of the student's logits, in ``out`` (maybe the logits themselves) or a new tensor like them.

    ``has_neg_inf`` None: each block is asked.
    """
    live, dead = live_rows(weights)
    upstream = {"grad_divergence": grad_divergence, "grad_logprob": grad_logprob, "grad_entropy": grad_entropy}
    upstream = {k: v.view(-1, 1) / options.temperature for k, v in upstream.items() if v is not None}
    gradient = torch.empty_like(student, memory_format=torch.contiguous_format) if out is None else out
    local = columns.local(labels)
    if live is not None:
        dead = weights == 0
    for rows in row_blocks(student.shape[0], columns.width, student.device, live):
        known = known_statistics(saved_statistics[:, rows], student_entropy[rows])
        chosen = take_options(options, rows)
        block, *_ = open_block(
            student[rows, : columns.width],
            teacher[rows, : columns.width],
            chosen,
            saved_statistics.dtype,
            known=known,
            consume=isinstance(rows, Tensor),
            slope=options.student_softcap is not None,
        )
        flows = {k: v[rows] for k, v in upstream.items()}
        found = coefficients(known, chosen, take(labels, rows), columns.total, **flows)
        if found is None:
            gradient[rows, : columns.width] = 0
            continue
        care = contains_neg_inf(block) if has_neg_inf is None else has_neg_inf
        part = logit_gradient(block, known, found, take(local, rows), chosen, has_neg_inf=care)
        gradient[rows, : columns.width] = part.to(gradient.dtype)
    gradient[:, columns.width :] = 0
    return gradient if dead is None else gradient.masked_fill_(dead.view(-1, 1), 0)


def token_gradient(
    logits: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    saved_statistics: Tensor,
    entropy: Tensor,
    temperature: float,
    softcap: float | None,
    columns: Columns,
    *,
    out: Tensor | None,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
) -> Tensor:
    """Gradient [N, V] of one model's logits, in ``out`` (maybe the logits themselves) or a new tensor like them."""
    live, _ = live_rows(weights)
    upstream = {"grad_logprob": grad_logprob, "grad_entropy": grad_entropy, "grad_lse": grad_lse}
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format) if out is None else out
    local = columns.local(labels)
    for rows in row_blocks(logits.shape[0], columns.width, logits.device, live):
        gradient[rows, : columns.width] = tokens.token_gradient(
            logits[rows, : columns.width],
            take(labels, rows),
            temperature,
            softcap,
            saved_statistics[0, rows].view(-1, 1),
            saved_statistics[1, rows].view(-1, 1),
            entropy[rows].view(-1, 1),
            **{k: None if v is None else v[rows].view(-1, 1) for k, v in upstream.items()},
            vocab=columns.total,
            local_labels=take(local, rows),
            consume=isinstance(rows, Tensor),
        ).to(gradient.dtype)
    gradient[:, columns.width :] = 0
    return gradient if weights is None else gradient.masked_fill_((weights == 0).view(-1, 1), 0)


def known_statistics(saved_statistics: Tensor, student_entropy: Tensor) -> RowStatistics:
    """The statistics a gradient reads, back from ``Rows``."""
    columns = [column.view(-1, 1) for column in saved_statistics]
    return RowStatistics(
        student_shift=columns[0],
        teacher_shift=columns[1],
        student_total=columns[2],
        teacher_total=columns[3],
        log_ratio=columns[4],
        divergence=columns[5],  # not read
        mean_ratio=columns[5],
        student_entropy=student_entropy.view(-1, 1),
        teacher_entropy=student_entropy.view(-1, 1),  # not read
        student_logprob=None,
        teacher_logprob=None,
    )


def live_rows(weights: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """How weight-0 rows are left out: an index of the others (CPU: never touched), or a mask [N] of them (no sync).

    (None, None) when there are none to leave out.
    """
    if weights is None:
        return None, None
    dead = weights == 0
    if weights.device.type != "cpu":
        return None, dead
    if not bool(dead.any()):
        return None, None
    return (~dead).nonzero().view(-1), None


def spread(column: Tensor | None, n_rows: int, live: Tensor | None, dead: Tensor | None) -> Tensor | None:
    """Column [R, 1] of the live rows as [N], with 0 in the others."""
    if column is None:
        return None
    flat = column.reshape(-1)
    if live is not None:
        return flat.new_zeros(n_rows).index_copy_(0, live, flat)
    return flat if dead is None else flat.masked_fill(dead, 0)
