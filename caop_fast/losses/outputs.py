"""What the losses return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class DistillationOutput(NamedTuple):
    """Result of a distillation loss over N tokens; every field but ``loss`` has the leading shape of the inputs.

    Statistics are in nats, without weights, in float32 (float64 when an input is float64). A row of weight 0 holds 0.
    """

    loss: Tensor | None
    """Scalar; with ``reduction="none"`` one value per token."""
    divergence: Tensor
    """D(beta) between the two distributions of a token."""
    student_logprob: Tensor | None
    """log p_s(label); None without labels, 0 where the label is -100."""
    teacher_logprob: Tensor | None
    """log p_t(label), as above. Never differentiable."""
    student_entropy: Tensor
    """Entropy of the student's distribution."""
    teacher_entropy: Tensor
    """Entropy of the teacher's distribution. Never differentiable."""


class RowStatistics(NamedTuple):
    """Statistics of N rows of two models' logits, in nats; the log-probabilities are None without labels."""

    forward_kl: Tensor
    reverse_kl: Tensor
    student_lse: Tensor
    teacher_lse: Tensor
    student_logprob: Tensor | None
    teacher_logprob: Tensor | None
    student_entropy: Tensor
    teacher_entropy: Tensor


class TokenStatistics(NamedTuple):
    """Statistics of N tokens under one model, in nats, each with the leading shape of the logits.

    float32 (float64 when the logits are). A row of weight 0 holds 0.
    """

    logprob: Tensor | None
    """log p(label); None without labels, 0 where the label is -100."""
    entropy: Tensor
    """-sum p log p."""
    lse: Tensor
    """log sum exp of the tempered logits."""


class ConfidenceOutput(NamedTuple):
    """Result of a confidence loss; every field but ``loss`` has the shape of ``target``. Weight-0 rows hold 0."""

    loss: Tensor
    """Scalar; with ``reduction="none"`` one value per row."""
    expected: Tensor
    """Mean of the candidate values under q, the distribution restricted to the candidates."""
    variance: Tensor
    """Variance of the candidate values under q."""
    outside_mass: Tensor
    """Probability the full softmax gives to everything that is not a candidate."""


class CalibrationBins(NamedTuple):
    """Sums of answers per confidence bin, [n_bins] each, in the order of the bins."""

    count: Tensor  # type: ignore[assignment]  # takes the place of tuple.count
    """Number of answers, int64."""
    confidence_sum: Tensor
    """Sum of their stated confidence, float64."""
    correct_sum: Tensor
    """Sum of their correctness, float64."""
