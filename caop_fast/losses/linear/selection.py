"""Rows of weight 0 in the linear losses: dropped on the CPU, where looking costs nothing, elsewhere held harmless."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from caop_fast.losses.rows import live_rows, spread, take


class Selection(NamedTuple):
    """Which of N rows the GEMMs see."""

    n_rows: int
    live: Tensor | None  # index of the rows that are left; None for all
    dead: Tensor | None  # mask [N] of rows that stay but must not count; None for none

    @staticmethod
    def of(weights: Tensor | None, n_rows: int) -> Selection:
        return Selection(n_rows, *live_rows(weights))

    @property
    def count(self) -> int:
        """How many rows are left."""
        return self.n_rows if self.live is None else self.live.numel()

    def take(self, values: Tensor | float | None) -> Tensor | float | None:
        """The entries of the rows that are left; what is not a tensor stays as it is."""
        return values if self.live is None else take(values, self.live)

    def mask(self, weights: Tensor | None) -> Tensor | None:
        """Weights for kernels that skip rows of weight 0; None where none is left."""
        return None if self.dead is None else weights

    def spread(self, column: Tensor) -> Tensor:
        """[R] of the rows that are left as [N], with 0 in the others."""
        return spread(column, self.n_rows, self.live, self.dead)

    def spread_rows(self, rows: Tensor) -> Tensor:
        """[R, H] of the rows that are left as [N, H], with 0 in the others."""
        if self.live is None:
            return rows
        return rows.new_zeros(self.n_rows, *rows.shape[1:]).index_copy_(0, self.live, rows)
