"""Calibration of stated confidences over bins: exact sums per bin, and a calibration error that can be trained on."""

from __future__ import annotations

import functools
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from caop_fast.calibration.counts import bin_edges
from caop_fast.losses import checks
from caop_fast.losses.backends.resolve import get_backend, resolve_backend
from caop_fast.losses.batches import BinSums, SoftBatch, SoftError
from caop_fast.losses.operator import Operator
from caop_fast.losses.options import ExecutionConfig
from caop_fast.losses.outputs import CalibrationBins

EDGES = ("official", "exact")
MAX_BINS = 1024  # a kernel holds all bins of a row at once
ONCE = "soft_ece can be differentiated once: double backward through it is not supported"


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
    execution = ExecutionConfig(resolve_backend(backend, device), checks.checks_values(validate, device))
    inputs = BinInputs(confidence.detach(), correct, _count("n_bins", n_bins), edges, execution)
    return CalibrationBins(*_calibration_bins(inputs))


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
    shape = checks.floating_tensor("confidence", confidence).shape
    confidence, correct, device = _rows(confidence, correct)
    checks.one_device({"confidence": confidence, "weights": weights})
    dtype = checks.statistics_dtype((confidence,))
    batch = SoftBatch(
        confidence,
        correct,
        checks.row_weights(weights, None, shape, dtype),
        _count("n_bins", n_bins),
        checks.positive("temperature", temperature),
    )
    execution = ExecutionConfig(resolve_backend(backend, device), checks.checks_values(validate, device))
    return _soft_ece(SoftInputs(batch, execution)).error.view(())


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
    if not 1 <= int(value) <= MAX_BINS:
        raise ValueError(f"{name} must be in [1, {MAX_BINS}], got {value}")
    return int(value)


class BinInputs(NamedTuple):
    """Arguments of ``caop_fast::calibration_bins``."""

    confidence: Tensor  # [N]
    correct: Tensor  # [N]
    n_bins: int
    edges: str
    execution: ExecutionConfig


class SoftInputs(NamedTuple):
    """Arguments of ``caop_fast::soft_ece``."""

    batch: SoftBatch
    execution: ExecutionConfig


class SoftGradientInputs(NamedTuple):
    """Arguments of ``caop_fast::soft_ece_gradient``."""

    forward: SoftInputs
    signs: Tensor  # [n_bins + 1]
    grad_error: Tensor  # [1]


def _run_bins(inputs: BinInputs) -> BinSums:
    confidence, correct, n_bins, edges, execution = inputs
    if execution.validate:
        _check_unit(confidence, correct, None)
    bounds = _edge_tensor(n_bins, edges, confidence.device)
    return get_backend(execution.backend).bin_sums(confidence, correct, bounds)


def _fake_bins(inputs: BinInputs) -> BinSums:
    count, *sums = (
        inputs.confidence.new_empty(inputs.n_bins, dtype=dtype) for dtype in (torch.int64, torch.float64, torch.float64)
    )
    return BinSums(count, *sums)


@functools.lru_cache(maxsize=64)
def _edge_tensor(n_bins: int, edges: str, device: torch.device) -> Tensor:
    """The edges as float64 on a device; kept, for every copy to a GPU makes the host wait."""
    return torch.tensor(bin_edges(n_bins, edges).tolist(), dtype=torch.float64, device=device)


def _run_soft(inputs: SoftInputs) -> SoftError:
    batch, execution = inputs
    if execution.validate:
        checks.check_weights(batch.weights)
        _check_unit(batch.confidence, batch.correct, batch.weights)
    return get_backend(execution.backend).soft_error(batch)


def _fake_soft(inputs: SoftInputs) -> SoftError:
    confidence, dtype = inputs.batch.confidence, checks.statistics_dtype((inputs.batch.confidence,))
    return SoftError(confidence.new_empty(1, dtype=dtype), confidence.new_empty(inputs.batch.n_bins + 1, dtype=dtype))


def _run_soft_gradient(inputs: SoftGradientInputs) -> Tensor:
    (batch, execution), signs, grad_error = inputs
    return get_backend(execution.backend).soft_gradient(batch, signs, grad_error)


def _check_unit(confidence: Tensor, correct: Tensor, weights: Tensor | None) -> None:
    """Confidence in [0, 1] or NaN, correct in [0, 1], in rows of weight > 0. Reads values."""
    counts = torch.ones_like(confidence, dtype=torch.bool) if weights is None else weights != 0
    bad = counts & ~(((confidence >= 0) & (confidence <= 1)) | confidence.isnan())
    if bool(bad.any()):
        raise ValueError(f"confidence must be in [0, 1], or NaN where unparsed, got {float(confidence[bad][0])}")
    bad = counts & ~((correct >= 0) & (correct <= 1))
    if bool(bad.any()):
        raise ValueError(f"correct must be in [0, 1], got {float(correct[bad][0])}")


def _backward(inputs: SoftInputs, found: SoftError, grads: SoftError) -> tuple[Tensor]:
    return (_soft_ece_gradient(SoftGradientInputs(inputs, found.signs, grads.error)),)


_calibration_bins = Operator("calibration_bins", BinInputs, BinSums, _run_bins, _fake_bins)
_soft_ece = Operator("soft_ece", SoftInputs, SoftError, _run_soft, _fake_soft)
_soft_ece_gradient = Operator(
    "soft_ece_gradient",
    SoftGradientInputs,
    Tensor,
    _run_soft_gradient,
    lambda inputs: torch.empty_like(inputs.forward.batch.confidence, memory_format=torch.contiguous_format),
    once=ONCE,
)
_soft_ece.register_autograd(_backward, inputs=["batch_confidence"], outputs=["error"], saved=["signs"])
