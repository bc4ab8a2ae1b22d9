"""The two ways through tokens and ids: chunks of tokens with all ids, or blocks of the vocabulary with all tokens.

A chunk or block is projected to logits in a buffer and shown to ``visit``, which writes the gradient of the logits;
that goes into two GEMMs. With one unit U = 2 N V H operations, a model's projection is 1 U, grad_hidden and grad_weight
1 U each.

Over the vocabulary every block of grad_weight is computed at once and rounded as it is written, and only grad_hidden is
carried. Over tokens, grad_weight is a sum over chunks: adding one chunk of G tokens reads and writes the float32
[V, H], 8 V H bytes, for 2 V H G operations. At 700 TFLOP/s and 3 TB/s that is 930 / G of the GEMM's own time. The
gradient of the logits, in the GEMMs' narrower dtype, takes a quarter of what the float32 logits of two models take: it
is kept for many more tokens than the logits are, for all of them where they fit. Then grad_weight is one GEMM, which
nothing is added to. Where the gradient is no narrower, it goes over the logits, and both GEMMs follow every chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from caop_fast.losses.backends.masked_rows import UnmaskedRows
from caop_fast.losses.batches import ConfidenceRows, DistillationRows, TokenRows
from caop_fast.losses.linear.config import LinearConfig, NeedsGrad
from caop_fast.losses.linear.lm_head import (
    ID_MULTIPLE,
    TOKEN_MULTIPLE,
    LMHead,
    LogitBuffer,
    convert_weights,
    even_slices,
    hidden_gradient,
    hidden_operand,
    weight_gradient,
    weight_product,
)
from caop_fast.losses.linear.sides import ProjectedSides

# Bytes of logits of all models per chunk of tokens.
CPU_CHUNK_BYTES = 240 << 20
DEVICE_CHUNK_BYTES = 1280 << 20
# The same where every chunk reads and writes all of grad_weight.
DEVICE_CHUNK_BYTES_WITH_WEIGHT_GRADIENT = 2560 << 20
# Bytes of the gradient of the logits that is kept for one product: for all tokens, or else for some of them beside the
# float32 sum of grad_weight.
DEVICE_GRADIENT_BYTES = 2560 << 20
DEVICE_SUMMED_GRADIENT_BYTES = 1920 << 20
# Bytes of logits per block of ids, all tokens at a time; the last with ``low_memory``.
CPU_BLOCK_BYTES = 192 << 20
DEVICE_BLOCK_BYTES = 1280 << 20
LOW_MEMORY_BLOCK_BYTES = 192 << 20

MIN_TOKENS, MIN_IDS = 32, 256
NO_GRADIENT = NeedsGrad(False, False, False)

# visit(which tokens or ids, student's logits, teacher's logits, where the gradient goes, if any is needed)
Visit = Callable[[slice, Tensor, "Tensor | None", Tensor], None]
Rows = TypeVar("Rows", DistillationRows, TokenRows, ConfidenceRows)


class ProjectionGrads(NamedTuple):
    """Gradients of the student's hidden states, weight and bias; None where none is needed."""

    hidden: Tensor | None = None  # [N, H]
    weight: Tensor | None = None  # [V, H]
    bias: Tensor | None = None  # [V]

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


class TokenSizes(NamedTuple):
    """How many tokens are held at a time."""

    logits: int
    """Most tokens whose logits are held."""
    gradient: int
    """Most tokens whose gradient of the logits is held, for one product that makes or adds to grad_weight."""
    beside: bool
    """Whether that gradient has memory of its own; else it goes over the logits."""

    def chunks(self, n_rows: int) -> list[list[slice]]:
        """Tokens whose logits are computed at a time, by product; of nearly equal sizes, none of nothing."""
        return [
            [
                slice(product.start + part.start, product.start + part.stop)
                for part in even_slices(product.stop - product.start, self.logits, TOKEN_MULTIPLE)
            ]
            for product in even_slices(n_rows, self.gradient, TOKEN_MULTIPLE)
        ]


def over_token_chunks(
    sides: ProjectedSides,
    visit: Visit,
    config: LinearConfig,
    needs: NeedsGrad,
    *,
    gathers_logits: bool = False,
    overwrites: bool = True,
) -> ProjectionGrads:
    """Visit all ids of a chunk of tokens at a time; the gradients that ``needs`` names, of all rows of ``sides``.

    grad_hidden and grad_bias come in the dtype of accumulation, grad_weight in ``LMHead.kept_dtype``.

    Args:
        gathers_logits: ``visit`` gathers the logits of the other ranks, and holds them as they came and side by side.
        overwrites: whether ``visit`` can write the gradient over the logits.
    """
    (student, teacher), n_rows, vocab = sides.heads, sides.student.hidden.shape[0], sides.student.head.weight.shape[0]
    sizes = token_sizes(sides, config, needs, gathers_logits=gathers_logits, overwrites=overwrites)
    products = sizes.chunks(n_rows)
    sums = _Sums(sides, needs, several=len(products) > 1)
    longest = max((_length(part) for product in products for part in product), default=0)
    kept = max((_length(_span(product)) for product in products), default=0) if sizes.beside else None
    with _no_autocast(student.weight.device):
        buffer = LogitBuffer(student, teacher, longest, vocab, gradient_rows=kept)
        student, teacher = convert_weights(student, teacher, shared=sides.shared)
        for product in products:
            tokens = _span(product)
            for part in product:
                hidden = sides.operands(part)
                logits, teacher_logits = buffer.project(hidden, student, teacher)
                gradient = buffer.gradient(logits, part.start - tokens.start)
                visit(part, logits, teacher_logits, gradient)
                del logits, teacher_logits
            if not any(needs):
                continue
            own = hidden.student
            if len(product) > 1:
                gradient, own = buffer.gradient_rows(0, _length(tokens), vocab), sides.student_operand(tokens)
            if product is products[-1]:  # grad_weight may take the place of what is not read again
                teacher = None
                buffer.free_logits()
            sums.add(tokens, gradient, own, student)
            del gradient
        del buffer
        return sums.finish()


class _Sums:
    """The gradients of a call, to which those of some tokens are added at a time."""

    def __init__(self, sides: ProjectedSides, needs: NeedsGrad, *, several: bool) -> None:
        """``several``: more than one product goes into grad_weight, which is then summed before it is rounded."""
        hidden, head = sides.student
        dtype, self._new = head.accumulator_dtype, head.weight.new_zeros
        self._needs, self._kept_dtype = needs, head.kept_dtype
        self._sum_dtype = dtype if several else head.kept_dtype
        self._shape = head.weight.shape
        self._hidden = head.weight.new_empty(hidden.shape, dtype=dtype) if needs.hidden else None
        self._bias = self._new(self._shape[:1], dtype=dtype) if needs.bias else None
        self._weight: Tensor | None = None  # made when the first product is: by then other memory may be free

    def add(self, tokens: slice, gradient: Tensor, hidden: Tensor, head: LMHead) -> None:
        """What follows from the gradient [R, V] of the logits of ``tokens``, whose hidden states are [R, H]."""
        if self._hidden is not None:
            hidden_gradient(gradient, head, self._hidden[tokens])
        if self._bias is not None:
            self._bias.add_(gradient.sum(0, dtype=self._bias.dtype))
        if self._needs.weight:
            first = self._weight is None
            if self._weight is None:
                self._weight = gradient.new_empty(self._shape, dtype=self._sum_dtype)
            weight_gradient(gradient, hidden_operand(hidden, head), head, self._weight, add=not first)

    def finish(self) -> ProjectionGrads:
        """The gradients, of no tokens at all too."""
        weight = None
        if self._needs.weight:
            weight = self._new(self._shape, dtype=self._kept_dtype) if self._weight is None else self._weight
            weight, self._weight = weight.to(self._kept_dtype), None
        return ProjectionGrads(self._hidden, weight, self._bias)


def _span(chunks: list[slice]) -> slice:
    """All of the tokens of consecutive chunks."""
    return slice(chunks[0].start, chunks[-1].stop)


def _length(tokens: slice) -> int:
    return int(tokens.stop - tokens.start)


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
        beside = grads.needed and student.gradient_dtype != student.logits_dtype
        buffer = LogitBuffer(student, teacher, n_rows, longest, gradient_rows=n_rows if beside else None)
        hidden = sides.operands(slice(None))
        other = hidden_operand(hidden.student, student)
        shared = hidden.stacked is not None
        for ids in blocks:
            head, teacher_head = convert_weights(
                student.within(ids), None if teacher is None else teacher.within(ids), shared=shared
            )
            logits, teacher_logits = buffer.project(hidden, head, teacher_head)
            gradient = buffer.gradient(logits)
            visit(ids, logits, teacher_logits, gradient)
            if grads.hidden is not None:
                hidden_gradient(gradient, head, grads.hidden, add=True)
            if grads.weight is not None and factor is None:
                weight_gradient(gradient, other, head, grads.weight[ids])
            elif grads.weight is not None:
                _write(weight_product(gradient, other, dtype), grads.weight[ids], factor)
            if grads.bias is not None:
                _write(gradient.sum(0, dtype=dtype), grads.bias[ids], factor)
        if factor is not None and grads.hidden is not None:
            grads.hidden.mul_(factor)


def _write(part: Tensor, out: Tensor, factor: Tensor | None) -> None:
    """A block's gradient, rounded to the dtype of ``out``. Not inline: it would be held while the next one is made."""
    out.copy_(part if factor is None else part.mul_(factor))


def _no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """The products take the dtypes they were given."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def token_sizes(
    sides: ProjectedSides, config: LinearConfig, needs: NeedsGrad, *, gathers_logits: bool, overwrites: bool
) -> TokenSizes:
    """The same on all ranks, however many ids each has, since they exchange something in every chunk."""
    layout, head = config.layout, sides.student.head
    n_rows, widest = sides.student.hidden.shape[0], max(layout.sizes)
    gathers = gathers_logits and layout.is_sharded
    keeps = needs.weight and head.narrow_gradient  # for more tokens than have logits
    beside = any(needs) and (keeps or not overwrites or head.gradient_dtype != head.logits_dtype)
    if config.chunk_size is not None:  # who sets it wants to hold no more
        return TokenSizes(config.chunk_size, config.chunk_size, beside)
    n_buffers = 1 if sides.teacher is None else 2
    if any(needs) and not overwrites and (gathers or not keeps):
        n_buffers += 1
    width = widest + (2 * sum(layout.sizes) if gathers else 0)
    summed = needs.weight and not keeps
    logits = chunk_tokens(width, n_buffers, head.logits_dtype, head.weight.device, adds_weight_gradient=summed)
    gradient = max(logits, kept_tokens(n_rows, widest, head.gradient_dtype)) if keeps else logits
    return TokenSizes(logits, gradient, beside)


def _most_ids(sides: ProjectedSides, config: LinearConfig) -> int:
    if config.low_memory and config.chunk_size is not None:
        return config.chunk_size
    n_models, (hidden, head) = 1 if sides.teacher is None else 2, sides.student
    return block_ids(hidden.shape[0], n_models, head.logits_dtype, head.weight.device, low_memory=config.low_memory)


def chunk_tokens(
    width: int, n_buffers: int, logits_dtype: torch.dtype, device: torch.device, *, adds_weight_gradient: bool
) -> int:
    """Most tokens per chunk, each with ``width`` logits in each of ``n_buffers``."""
    if device.type == "cpu":
        budget = CPU_CHUNK_BYTES
    else:
        budget = DEVICE_CHUNK_BYTES_WITH_WEIGHT_GRADIENT if adds_weight_gradient else DEVICE_CHUNK_BYTES
    return _fitting(budget // (n_buffers * max(width, 1) * logits_dtype.itemsize), MIN_TOKENS, TOKEN_MULTIPLE)


def kept_tokens(n_rows: int, width: int, dtype: torch.dtype) -> int:
    """Most tokens of ``n_rows`` whose gradient of ``width`` logits is kept for one product."""
    row = max(width, 1) * dtype.itemsize
    if n_rows * row <= DEVICE_GRADIENT_BYTES:
        return max(n_rows, 1)
    return _fitting(DEVICE_SUMMED_GRADIENT_BYTES // row, MIN_TOKENS, TOKEN_MULTIPLE)


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
