"""The two ways through tokens and ids: chunks of tokens with all ids, or blocks of the vocabulary with all tokens.

A chunk or block is projected to logits in a buffer and shown to ``visit``; the gradient that ``visit`` computes of it
goes into two GEMMs before the next one takes its place. With one unit U = 2 N V H operations, a model's projection is
1 U, grad_hidden and grad_weight 1 U each.

Over tokens, grad_weight is read and written once a chunk, in float32, and rounded by the caller; over the vocabulary
every block of grad_weight is computed at once and rounded as it is written, and only grad_hidden is carried.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from caop_fast.losses.backends.masked_rows import UnmaskedRows
from caop_fast.losses.backends.resolve import get_backend
from caop_fast.losses.batches import ConfidenceRows, DistillationRows, TokenRows
from caop_fast.losses.linear.config import LinearConfig, NeedsGrad
from caop_fast.losses.linear.lm_head import (
    ID_MULTIPLE,
    TOKEN_MULTIPLE,
    LMHead,
    LogitBuffer,
    Operands,
    ProjectedSide,
    add_hidden_gradient,
    add_weight_gradient,
    convert_weights,
    even_slices,
    gradient_operand,
    hidden_operand,
    shares_projection,
    weight_gradient,
)

# Bytes of logits of all models per chunk of tokens. Each chunk reads and writes all of grad_weight once, so chunks are
# larger where grad_weight is needed.
CPU_CHUNK_BYTES = 240 << 20
DEVICE_CHUNK_BYTES = 1280 << 20
DEVICE_CHUNK_BYTES_WITH_WEIGHT_GRADIENT = 2560 << 20
# Bytes of logits per block of ids, all tokens at a time; the last with ``low_memory``.
CPU_BLOCK_BYTES = 192 << 20
DEVICE_BLOCK_BYTES = 1280 << 20
LOW_MEMORY_BLOCK_BYTES = 192 << 20

MIN_TOKENS, MIN_IDS = 32, 256

# visit(which tokens or ids, student's logits, teacher's logits, where the gradient may go) -> the gradient, or None
Visit = Callable[[slice, Tensor, "Tensor | None", Tensor], "Tensor | None"]
Rows = TypeVar("Rows", DistillationRows, TokenRows, ConfidenceRows)


class ProjectedSides(NamedTuple):
    """What logits are computed from: hidden states of the rows that are computed, heads of this rank's ids."""

    student: ProjectedSide
    teacher: ProjectedSide | None = None
    mask: Tensor | None = None  # [R] bool: rows whose hidden states must not reach a product

    @property
    def shared(self) -> bool:
        """Whether one projection serves both models."""
        return self.teacher is not None and shares_projection(self.student.head, self.teacher.head)

    @property
    def heads(self) -> tuple[LMHead, LMHead | None]:
        return self.student.head, None if self.teacher is None else self.teacher.head

    def operands(self, rows: slice) -> Operands:
        """Hidden states of some rows as the GEMMs take them; 0 in masked rows, whatever they hold: NaN * 0 is NaN."""
        mask = None if self.mask is None else self.mask[rows].view(-1, 1)

        def masked(hidden: Tensor) -> Tensor:
            return hidden if mask is None else hidden.masked_fill(mask, 0)

        student = self.student.hidden[rows].to(self.student.head.operand_dtype)
        if self.teacher is None:
            return Operands(masked(student))
        teacher = self.teacher.hidden[rows].to(self.teacher.head.operand_dtype)
        if not self.shared:
            return Operands(masked(student), masked(teacher))
        stacked = torch.cat([student, teacher])
        if mask is not None:
            stacked.masked_fill_(torch.cat([mask, mask]), 0)
        student, teacher = stacked.split(student.shape[0])
        return Operands(student, teacher, stacked)


def unmask_sides(
    student: ProjectedSide, teacher: ProjectedSide | None, unmasked: UnmaskedRows, config: LinearConfig
) -> ProjectedSides:
    """The rows that are computed, and both heads over the ids of this rank, detached."""
    width = config.layout.columns.width

    def unmask(side: ProjectedSide) -> ProjectedSide:
        head = side.head
        bias = None if head.bias is None else head.bias.detach()[:width].to(head.logits_dtype)
        head = head._replace(weight=head.weight.detach()[:width], bias=bias)
        return ProjectedSide(unmasked.take(side.hidden.detach()), head)

    return ProjectedSides(unmask(student), None if teacher is None else unmask(teacher), unmasked.mask)


class ProjectionGrads(NamedTuple):
    """Gradients of the student's hidden states, weight and bias; None where none is needed."""

    hidden: Tensor | None = None  # [N, H]
    weight: Tensor | None = None  # [V, H]
    bias: Tensor | None = None  # [V]

    @staticmethod
    def zeros(sides: ProjectedSides, needs: NeedsGrad) -> ProjectionGrads:
        """For ``over_token_chunks`` to add to, in the dtype of accumulation."""
        hidden, head = sides.student
        dtype, new = head.accumulator_dtype, head.weight.new_zeros
        return ProjectionGrads(
            new(hidden.shape, dtype=dtype) if needs.hidden else None,
            new(head.weight.shape, dtype=dtype) if needs.weight else None,
            new(head.weight.shape[0], dtype=dtype) if needs.bias else None,
        )

    @staticmethod
    def like(head: LMHead, sides: ProjectedSides, needs: NeedsGrad) -> ProjectionGrads:
        """For ``over_vocabulary_blocks`` to write: all rows of ``head``, 0 in those that are not compared."""
        hidden, own = sides.student
        weight = head.weight.new_empty(head.weight.shape) if needs.weight else None
        bias = head.bias.new_empty(head.bias.shape) if needs.bias and head.bias is not None else None
        for part in (weight, bias):
            if part is not None:
                part[own.weight.shape[0] :] = 0
        return ProjectionGrads(
            own.weight.new_zeros(hidden.shape, dtype=own.accumulator_dtype) if needs.hidden else None, weight, bias
        )

    @property
    def needed(self) -> bool:
        """Whether there is any."""
        return any(part is not None for part in self)


def over_token_chunks(
    sides: ProjectedSides,
    visit: Visit,
    config: LinearConfig,
    grads: ProjectionGrads,
    *,
    gathers_logits: bool = False,
    extra_buffers: int = 0,
) -> None:
    """Visit all ids of a chunk of tokens at a time, and add to ``grads``, in the dtype of accumulation.

    Args:
        gathers_logits: ``visit`` gathers the logits of the other ranks, and holds them as they came and side by side.
        extra_buffers: how many buffers of the size of a model's logits ``visit`` allocates.
    """
    (student, teacher), n_rows = sides.heads, sides.student.hidden.shape[0]
    vocab, device = student.weight.shape[0], student.weight.device
    chunks = list(
        even_slices(n_rows, _most_tokens(sides, config, grads, gathers_logits, extra_buffers), TOKEN_MULTIPLE)
    )
    longest = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    with _no_autocast(device):
        buffer = LogitBuffer(student, teacher, longest, vocab, narrow=_narrows(config, grads))
        student, teacher = convert_weights(student, teacher, shared=sides.shared)
        for rows in chunks:
            hidden = sides.operands(rows)
            logits, teacher_logits = buffer.project(hidden, student, teacher)
            gradient = visit(rows, logits, teacher_logits, buffer.gradient(logits))
            if gradient is None or not grads.needed:
                continue
            gradient = gradient_operand(gradient, student)
            if grads.hidden is not None:
                add_hidden_gradient(grads.hidden[rows], gradient, student)
            if grads.weight is not None:
                add_weight_gradient(grads.weight, gradient, hidden.student, student)
            if grads.bias is not None:
                grads.bias.add_(gradient.sum(0, dtype=grads.bias.dtype))


def over_vocabulary_blocks(
    sides: ProjectedSides, visit: Visit, config: LinearConfig, grads: ProjectionGrads, factor: Tensor | None = None
) -> None:
    """Visit all tokens of a block of ids at a time; add to ``grads.hidden``, write the others.

    ``factor`` is a scalar that all gradients are multiplied by before they are rounded.
    """
    (student, teacher), n_rows = sides.heads, sides.student.hidden.shape[0]
    vocab, device, dtype = student.weight.shape[0], student.weight.device, student.accumulator_dtype
    blocks = list(even_slices(vocab, _most_ids(sides, config), ID_MULTIPLE))
    longest = max((block.stop - block.start for block in blocks), default=0)
    with _no_autocast(device):
        buffer = LogitBuffer(student, teacher, n_rows, longest, narrow=_narrows(config, grads))
        hidden = sides.operands(slice(None))
        other = hidden_operand(hidden.student, student)
        shared = hidden.stacked is not None
        for ids in blocks:
            head, teacher_head = convert_weights(
                student.within(ids), None if teacher is None else teacher.within(ids), shared=shared
            )
            logits, teacher_logits = buffer.project(hidden, head, teacher_head)
            gradient = visit(ids, logits, teacher_logits, buffer.gradient(logits))
            if gradient is None or not grads.needed:
                continue
            gradient = gradient_operand(gradient, head)
            if grads.hidden is not None:
                add_hidden_gradient(grads.hidden, gradient, head)
            if grads.weight is not None:
                _write(weight_gradient(gradient, other, dtype), grads.weight[ids], factor)
            if grads.bias is not None:
                _write(gradient.sum(0, dtype=dtype), grads.bias[ids], factor)
        if factor is not None and grads.hidden is not None:
            grads.hidden.mul_(factor)


def _write(part: Tensor, out: Tensor, factor: Tensor | None) -> None:
    """A block's gradient, rounded to the dtype of ``out``. Not inline: it would be held while the next one is made."""
    out.copy_(part if factor is None else part.mul_(factor))


def _narrows(config: LinearConfig, grads: ProjectionGrads) -> bool:
    return grads.needed and get_backend(config.execution.backend).narrows_gradients


def _no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """The products take the dtypes they were given."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _most_tokens(
    sides: ProjectedSides, config: LinearConfig, grads: ProjectionGrads, gathers_logits: bool, extra_buffers: int
) -> int:
    """The same on all ranks, however many ids each has, since they exchange something in every chunk."""
    if config.chunk_size is not None:
        return config.chunk_size
    layout, head = config.layout, sides.student.head
    width = max(layout.sizes) + (2 * sum(layout.sizes) if gathers_logits and layout.is_sharded else 0)
    n_buffers = (1 if sides.teacher is None else 2) + extra_buffers
    needs_weight = grads.weight is not None
    return chunk_tokens(width, n_buffers, head.logits_dtype, head.weight.device, weight_gradient=needs_weight)


def _most_ids(sides: ProjectedSides, config: LinearConfig) -> int:
    if config.low_memory and config.chunk_size is not None:
        return config.chunk_size
    n_models, (hidden, head) = 1 if sides.teacher is None else 2, sides.student
    return block_ids(hidden.shape[0], n_models, head.logits_dtype, head.weight.device, low_memory=config.low_memory)


def chunk_tokens(
    width: int, n_buffers: int, logits_dtype: torch.dtype, device: torch.device, *, weight_gradient: bool
) -> int:
    """Most tokens per chunk, each with ``width`` logits in each of ``n_buffers``."""
    if device.type == "cpu":
        budget = CPU_CHUNK_BYTES
    else:
        budget = DEVICE_CHUNK_BYTES_WITH_WEIGHT_GRADIENT if weight_gradient else DEVICE_CHUNK_BYTES
    return _fitting(budget // (n_buffers * max(width, 1) * logits_dtype.itemsize), MIN_TOKENS, TOKEN_MULTIPLE)


def block_ids(n_rows: int, n_models: int, logits_dtype: torch.dtype, device: torch.device, *, low_memory: bool) -> int:
    """Most ids per block, each with the logits of ``n_rows`` tokens and ``n_models``."""
    budget = CPU_BLOCK_BYTES if device.type == "cpu" else DEVICE_BLOCK_BYTES
    budget = min(budget, LOW_MEMORY_BLOCK_BYTES) if low_memory else budget
    return _fitting(budget // (n_models * max(n_rows, 1) * logits_dtype.itemsize), MIN_IDS, ID_MULTIPLE)


def _fitting(count: int, least: int, multiple: int) -> int:
    count = max(least, count)
    return count // multiple * multiple if count >= multiple else count


def write_rows(rows: Rows, tokens: slice, chunk: Rows) -> None:
    """Statistics of a chunk of tokens, into those of all rows that are computed."""
    for column, values in zip(rows, chunk, strict=True):
        if column is not None and values is not None:
            column[..., tokens] = values


def spread_rows(rows: Rows, unmasked: UnmaskedRows) -> Rows:
    """Statistics of the rows that are computed as those of all rows, with 0 in rows of weight 0."""

    def spread(values: Tensor) -> Tensor:
        return unmasked.spread(values) if values.ndim == 1 else torch.stack([unmasked.spread(row) for row in values])

    return type(rows)._make(None if values is None else spread(values) for values in rows)
