"""What a backend takes and returns: rows of logits, their statistics, upstream gradients.

N is the number of rows (tokens) and V the number of columns. Statistics are [N] in nats, float32 (float64 when an input
is). Fields named ``saved_statistics`` are for the backend that made them: a gradient needs them again.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


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


class DistillationBatch(NamedTuple):
    """Rows of two models' logits."""

    student: Tensor  # [N, V_s]
    teacher: Tensor  # [N, V_t]
    labels: Tensor | None  # [N] int64, -100 for none
    weights: Tensor | None  # [N] in the dtype of the statistics


class DistillationRows(NamedTuple):
    """Statistics of N rows, [N] each, and what a gradient needs to know of them."""

    divergence: Tensor
    student_logprob: Tensor | None
    student_entropy: Tensor
    teacher_logprob: Tensor | None
    teacher_entropy: Tensor
    saved_statistics: Tensor  # [SAVED_FIELDS, N]; only the backend that made them reads them
    has_neg_inf: Tensor | None  # [1] bool: whether a logit is -inf, NaN or a mask; None from a backend that never asks

    @property
    def saved(self) -> SavedDistillation:
        return SavedDistillation(self.saved_statistics, self.student_entropy, self.has_neg_inf)


class SavedDistillation(NamedTuple):
    """What ``distillation_gradient`` takes of the statistics of the forward pass."""

    statistics: Tensor  # [SAVED_FIELDS, N]
    student_entropy: Tensor  # [N]
    has_neg_inf: Tensor | None


class DistillationGrads(NamedTuple):
    """Upstream gradients of the differentiable statistics, [N] each or None."""

    divergence: Tensor | None = None
    student_logprob: Tensor | None = None
    student_entropy: Tensor | None = None


class TokenBatch(NamedTuple):
    """Rows of one model's logits."""

    logits: Tensor  # [N, V]
    labels: Tensor | None  # [N] int64, -100 for none
    weights: Tensor | None  # [N] in the dtype of the statistics


class TokenRows(NamedTuple):
    """Statistics of N rows, [N] each, and what a gradient needs to know of them."""

    logprob: Tensor | None
    entropy: Tensor
    lse: Tensor
    saved_statistics: Tensor  # [Backend.token_saved_fields, N]


class SavedTokens(NamedTuple):
    """What ``token_gradient`` takes of the statistics of the forward pass."""

    statistics: Tensor
    entropy: Tensor


class TokenGrads(NamedTuple):
    """Upstream gradients of the token statistics, [N] each or None."""

    logprob: Tensor | None = None
    entropy: Tensor | None = None
    lse: Tensor | None = None


class TopKBatch(NamedTuple):
    """Rows of the student's logits, and the teacher's list of each."""

    student: Tensor  # [N, V]
    ids: Tensor  # [N, k] int64, -1 for padding
    logprobs: Tensor  # [N, k]
    labels: Tensor | None  # [N] int64, -100 for none
    weights: Tensor | None  # [N] in the dtype of the statistics


class TopKRows(NamedTuple):
    """Statistics of N rows, [N] each, and what a gradient needs to know of them."""

    divergence: Tensor
    student_logprob: Tensor | None
    student_entropy: Tensor
    teacher_logprob: Tensor | None
    teacher_entropy: Tensor
    saved_statistics: Tensor  # [TOPK_SAVED_FIELDS, N]


class SavedTopK(NamedTuple):
    """What ``topk_gradient`` takes of the statistics of the forward pass."""

    statistics: Tensor
    student_entropy: Tensor


class ConfidenceBatch(NamedTuple):
    """Rows to score: logits and the candidates' ids, or log-probabilities of the candidates themselves."""

    source: Tensor  # [N, >= vocab] logits; or, without ids, [N, C] log-probabilities
    ids: Tensor | None  # [C] int64
    values: Tensor  # [C] in the dtype of the statistics
    target: Tensor  # [N] likewise
    weights: Tensor | None  # [N] likewise


class ConfidenceRows(NamedTuple):
    """Scores of N rows, [N] each, and what a gradient needs to know of them."""

    loss: Tensor
    expected: Tensor
    variance: Tensor
    outside_mass: Tensor
    saved_statistics: Tensor | None  # [CONFIDENCE_SAVED_FIELDS, N]; None from a backend that needs nothing


class ConfidenceGrads(NamedTuple):
    """Upstream gradients of the scores, [N] each or None."""

    loss: Tensor | None = None
    expected: Tensor | None = None
    variance: Tensor | None = None
    outside_mass: Tensor | None = None


class BinSums(NamedTuple):
    """Sums per confidence bin, [n_bins] each."""

    counts: Tensor  # int64
    confidence: Tensor  # float64
    correct: Tensor  # float64


class SoftBatch(NamedTuple):
    """Rows of ``soft_ece``."""

    confidence: Tensor  # [N]
    correct: Tensor  # [N]
    weights: Tensor | None  # [N]
    n_bins: int
    temperature: float


class SoftError(NamedTuple):
    """The soft-binned calibration error, and what its gradient needs."""

    error: Tensor  # [1]
    signs: Tensor  # [n_bins + 1]
