"""Rows of weight 0 (masked rows): left out on the CPU, set to 0 elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, overload

import torch
from torch import Tensor

from caop_fast.losses.backends.row_blocks import row_blocks
from caop_fast.losses.options import DivergenceOptions


class UnmaskedRows(NamedTuple):
    """Which of ``n_rows`` rows have weight, and how the others are kept out.

    On the CPU they are left out: ``kept`` lists the rows that are computed. Elsewhere looking would make the host wait
    for the device: all rows are computed, and those of ``mask`` are set to 0. Both are None where all rows count.
    """

    n_rows: int
    kept: Tensor | None  # [R] int64
    mask: Tensor | None  # [N] bool, True where the weight is 0

    @staticmethod
    def of(weights: Tensor | None, n_rows: int) -> UnmaskedRows:
        if weights is None:
            return UnmaskedRows(n_rows, None, None)
        masked = weights == 0
        if weights.device.type != "cpu":
            return UnmaskedRows(n_rows, None, masked)
        if not bool(masked.any()):
            return UnmaskedRows(n_rows, None, None)
        return UnmaskedRows(n_rows, (~masked).nonzero().view(-1), None)

    @property
    def n_kept(self) -> int:
        """How many rows are computed."""
        return self.n_rows if self.kept is None else self.kept.numel()

    def blocks(self, vocab: int, device: torch.device) -> Iterator[slice | Tensor]:
        """``row_blocks`` of the rows that are computed."""
        return row_blocks(self.n_rows, vocab, device, self.kept)

    @overload
    def take(self, values: Tensor) -> Tensor: ...
    @overload
    def take(self, values: None) -> None: ...
    def take(self, values: Tensor | None) -> Tensor | None:
        """The entries of the rows that are computed; None stays as it is."""
        return values if values is None or self.kept is None else values[self.kept]

    def take_options(self, options: DivergenceOptions) -> DivergenceOptions:
        """The options of the rows that are computed."""
        return options if self.kept is None else options.rows(self.kept)

    def weights(self, weights: Tensor | None) -> Tensor | None:
        """Weights for kernels that skip rows of weight 0; None where such rows are left out."""
        return None if self.mask is None else weights

    def scatter(self, values: Tensor) -> Tensor:
        """[R, ...] of the rows that are computed as [N, ...], with 0 in those that are left out."""
        if self.kept is None:
            return values
        return values.new_zeros(self.n_rows, *values.shape[1:]).index_copy_(0, self.kept, values)

    def spread(self, column: Tensor) -> Tensor:
        """[R] of the rows that are computed as [N], with 0 in all rows of weight 0."""
        column = self.scatter(column)
        return column if self.mask is None else column.masked_fill(self.mask, 0)

    def join(self, blocks: Iterable[Tensor]) -> Tensor:
        """Columns of the blocks in one, [N], with 0 in all rows of weight 0."""
        columns = list(blocks)
        return self.spread((columns[0] if len(columns) == 1 else torch.cat(columns)).view(-1))

    def join_optional(self, blocks: Iterable[Tensor | None]) -> Tensor | None:
        """The same of a statistic that every block has, or none has."""
        present = [block for block in blocks if block is not None]
        return self.join(present) if present else None
