"""What a backend computes for the losses.

Logits are [N, V] with N rows (tokens); gradients have the shape and dtype of the logits they belong to. Statistics are
[N] in nats, float32 (float64 when an input is). Rows of weight 0 report 0 and get gradient 0, whatever they hold.
Upstream gradients may have any floating dtype and stride.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from caop_fast.losses.batches import (
    BinSums,
    Columns,
    ConfidenceBatch,
    ConfidenceGrads,
    ConfidenceRows,
    DistillationBatch,
    DistillationGrads,
    DistillationRows,
    SavedDistillation,
    SavedTokens,
    SavedTopK,
    SoftBatch,
    SoftError,
    TokenBatch,
    TokenGrads,
    TokenRows,
    TopKBatch,
    TopKRows,
)
from caop_fast.losses.options import ConfidenceOptions, DivergenceOptions, TokenOptions, TopKOptions
from caop_fast.losses.outputs import RowStatistics


class Backend(Protocol):
    """The losses' row computations, in plain PyTorch (``backends/torch.py``) or Triton (``backends/triton.py``).

    ``out`` is where a gradient goes: the logits themselves, or memory of any floating dtype; None for a new tensor in
    theirs.
    """

    name: str
    reports_neg_inf: bool
    """Whether ``DistillationRows.has_neg_inf`` is a tensor."""
    token_saved_fields: int
    """Rows of ``TokenRows.saved_statistics``."""
    saves_confidence: bool
    """Whether ``ConfidenceRows.saved_statistics`` is a tensor, given logits."""

    def distillation_rows(
        self, batch: DistillationBatch, options: DivergenceOptions, vocab: int, dtype: torch.dtype
    ) -> DistillationRows:
        """Statistics over the first ``vocab`` ids, computed in ``dtype`` or the dtype the logits imply."""
        ...

    def distillation_rows_with_gradient(
        self,
        batch: DistillationBatch,
        options: DivergenceOptions,
        dtype: torch.dtype,
        grad_divergence: Tensor | None,
        out: Tensor,
    ) -> DistillationRows:
        """Statistics over all columns and, given ``grad_divergence`` [N], the student's gradient in ``out``.

        The logits may be overwritten. What is saved for a gradient is not returned in full: there is none to come.
        """
        ...

    def distillation_gradient(
        self,
        batch: DistillationBatch,
        options: DivergenceOptions,
        columns: Columns,
        saved: SavedDistillation,
        grads: DistillationGrads,
        out: Tensor | None,
    ) -> Tensor:
        """Gradient of the student's logits, which may be some ``columns`` of the vocabulary."""
        ...

    def row_state(self, batch: DistillationBatch, options: DivergenceOptions, vocab: int, dtype: torch.dtype) -> Tensor:
        """The mergeable state [12, N] of the first ``vocab`` columns; labels are relative to the first of them."""
        ...

    def merge_states(self, states: Tensor) -> Tensor:
        """States [S, 12, N] of disjoint columns in one, [12, N]."""
        ...

    def finish_state(self, state: Tensor, labels: Tensor | None) -> RowStatistics:
        """The statistics of a state [12, N] of all columns."""
        ...

    def finish_distillation(self, state: Tensor, labels: Tensor | None, options: DivergenceOptions) -> DistillationRows:
        """The same as distillation statistics; an interior divergence is left to ``finish_mixture``."""
        ...

    def finish_tokens(self, state: Tensor, labels: Tensor | None) -> TokenRows:
        """The student's token statistics of a state [12, N] of all columns."""
        ...

    def mixture_sums(
        self, student: Tensor, teacher: Tensor, options: DivergenceOptions, saved_statistics: Tensor
    ) -> Tensor:
        """The sums [K, 2, N] of an interior divergence over some columns; those of other columns are added to them."""
        ...

    def finish_mixture(self, sums: Tensor, saved_statistics: Tensor, options: DivergenceOptions) -> Tensor:
        """The interior divergence [N] of sums [K, 2, N]; writes its mean ratio to ``saved_statistics``."""
        ...

    def token_rows(self, batch: TokenBatch, options: TokenOptions, vocab: int, dtype: torch.dtype) -> TokenRows:
        """Statistics over the first ``vocab`` ids."""
        ...

    def token_gradient(
        self,
        batch: TokenBatch,
        options: TokenOptions,
        columns: Columns,
        saved: SavedTokens,
        grads: TokenGrads,
        out: Tensor | None,
    ) -> Tensor:
        """Gradient of the logits, which may be some ``columns`` of the vocabulary."""
        ...

    def topk_rows(self, batch: TopKBatch, options: TopKOptions, vocab: int, sorted_ids: Tensor) -> TopKRows:
        """Statistics against the teacher's list, over the first ``vocab`` ids.

        ``sorted_ids`` [N, k]: the ids as ``sort_ids`` returns them.
        """
        ...

    def topk_gradient(
        self,
        batch: TopKBatch,
        options: TopKOptions,
        vocab: int,
        saved: SavedTopK,
        grads: DistillationGrads,
        out: Tensor | None,
    ) -> Tensor:
        """Gradient of the student's logits."""
        ...

    def confidence_rows(self, batch: ConfidenceBatch, options: ConfidenceOptions, vocab: int) -> ConfidenceRows:
        """Scores of the candidates, the softmax running over the first ``vocab`` ids."""
        ...

    def confidence_gradient(
        self,
        batch: ConfidenceBatch,
        options: ConfidenceOptions,
        vocab: int,
        saved_statistics: Tensor | None,
        grads: ConfidenceGrads,
        out: Tensor | None,
    ) -> Tensor:
        """Gradient of ``batch.source``, which ``out`` shares no memory with."""
        ...

    def bin_sums(self, confidence: Tensor, correct: Tensor, edges: Tensor) -> BinSums:
        """Sums of the answers [N] in each bin of float64 ``edges`` [n_bins + 1]."""
        ...

    def soft_error(self, batch: SoftBatch) -> SoftError:
        """The soft-binned calibration error."""
        ...

    def soft_gradient(self, batch: SoftBatch, signs: Tensor, grad_error: Tensor) -> Tensor:
        """Gradient [N] of the confidence, in its dtype, for the upstream gradient [1]."""
        ...
