"""Calibration of stated confidences over bins: exact sums per bin, and a calibration error that can be trained on."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from caop_fast.losses import checks
from caop_fast.losses.backend import resolve_backend
from caop_fast.losses.ops import bins as ops
from caop_fast.losses.outputs import CalibrationBins

EDGES = ("official", "exact")
MAX_BINS = 1024  # a kernel holds all bins of a row at once


def calibration_bins(
    confidence: Tensor,
    correct: Tensor,
    *,
    n_bins: int = 10,
    edges: str = "official",
    backend: str = "auto",
    validate: bool | None = None,
) -> CalibrationBins:
    """Number of answers, summed confidence and summed correctness per confidence bin: all that binned metrics need.

    The bins are those of ``caop_fast.calibration``: equal-width, left-closed, 1.0 in the last. The exact value given is
    binned, as if in float64: a bfloat16 0.7 (0.69921875) belongs below the edge at 0.7. Every bit is the same in every
    run; nothing is differentiable. The expected calibration error over the binned answers is
    ``(confidence_sum - correct_sum).abs().sum() / count.sum()``.

    Args:
        confidence: [N] (or any shape) float32, bfloat16, float16 or float64 in [0, 1]; NaN where an answer stated none,
            which leaves it out.
        correct: the same shape, in [0, 1]; any of these dtypes, an integer one or bool.
        n_bins: in [1, 1024].
        edges: "official" = ``np.linspace(0, 1, n_bins + 1)``, "exact" = the float64 nearest to k/n_bins.
        backend: "torch", "triton", or "auto" (Triton on GPUs where it is installed).
        validate: check that values lie in [0, 1], which makes the host wait for a GPU; None does so on the CPU only.
            Unchecked, a row with a value outside is left out.

    Returns:
        CalibrationBins of [n_bins] tensors: count int64, the sums float64.

    Raises:
        TypeError, ValueError: on bad arguments, naming the argument, what it got and what it takes.
    """
    confidence, correct, device = _rows(confidence, correct)
    checks.choice("edges", edges, EDGES)
    sums = ops.calibration_bins(
        confidence.detach(),
        correct,
        _count("n_bins", n_bins),
        edges,
        resolve_backend(backend, device) == "triton",
        checks.checks_values(validate, device),
    )
    return CalibrationBins(*sums)


def soft_ece(
    confidence: Tensor,
    correct: Tensor,
    *,
    n_bins: int = 10,
    temperature: float = 0.01,
    weights: Tensor | None = None,
    backend: str = "auto",
    validate: bool | None = None,
) -> Tensor:
    """Soft-binned expected calibration error (SB-ECE of Karandikar et al. 2021, arXiv 2108.00106, order 1).

    Every answer belongs to each of ``n_bins`` equal-width bins with centres x_b to the degree
    ``u_b = softmax_b(-(c - x_b)^2 / temperature)``, and

        soft_ece = sum_b |sum_i w_i u_b(c_i) (c_i - y_i)| / sum_i w_i

    which is 0 when all weights are. As the temperature goes to 0 it becomes the ECE over equal-width bins.
    Differentiable with respect to ``confidence``, once; the derivative of |.| at 0 is taken as 0. Every bit is the same
    in every run.

    Args:
        confidence: [N] (or any shape) float32, bfloat16, float16 or float64 in [0, 1]; NaN where an answer stated none,
            which counts as weight 0.
        correct: the same shape, in [0, 1], not differentiated; any of these dtypes, an integer one or bool.
        n_bins: in [1, 1024].
        temperature: of the memberships, > 0, in squared units of confidence.
        weights: the same shape, finite, >= 0; None means 1. A row of weight 0 may hold anything; its gradient is 0.
        backend: "torch", "triton", or "auto" (Triton on GPUs where it is installed).
        validate: check values of tensors, which makes the host wait for a GPU; None does so on the CPU only. Unchecked,
            a row with a confidence or correctness outside [0, 1] counts as weight 0.

    Returns:
        A scalar in float32 (float64 when ``confidence`` is).

    Raises:
        TypeError, ValueError: on bad arguments, naming the argument, what it got and what it takes.
    """
    shape = confidence.shape if isinstance(confidence, Tensor) else None
    confidence, correct, device = _rows(confidence, correct)
    checks.one_device({"confidence": confidence, "weights": weights})
    dtype = checks.statistics_dtype((confidence,))
    error, _ = ops.soft_ece(
        confidence,
        correct,
        checks.row_weights(weights, None, shape, dtype, values=False),
        _count("n_bins", n_bins),
        checks.positive("temperature", temperature),
        resolve_backend(backend, device) == "triton",
        checks.checks_values(validate, device),
    )
    return error.view(())


def _rows(confidence: Any, correct: Any) -> tuple[Tensor, Tensor, torch.device]:
    """Both flattened to floating-point [N], and their device."""
    checks.floating_tensor("confidence", confidence)
    if not isinstance(correct, Tensor):
        raise TypeError(f"correct must be a torch.Tensor, got {type(correct).__name__}")
    if correct.is_complex():
        raise TypeError(f"correct must be real numbers or bool, got {correct.dtype}")
    device = checks.one_device({"confidence": confidence, "correct": correct})
    flat = checks.shaped("correct", correct.detach(), confidence.shape)
    if flat.dtype not in checks.FLOAT_DTYPES:
        flat = flat.to(torch.float32)
    return confidence.reshape(-1), flat, device


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer in [1, {MAX_BINS}], got {type(value).__name__}")
    if not 1 <= value <= MAX_BINS:
        raise ValueError(f"{name} must be in [1, {MAX_BINS}], got {value}")
    return int(value)
