"""``torch.ops.caop_fast.calibration_bins`` and ``torch.ops.caop_fast.soft_ece``, the latter with its derivative."""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from caop_fast.calibration.counts import bin_edges
from caop_fast.losses import checks
from caop_fast.losses.reference import bins as reference
from caop_fast.losses.rows import row_blocks

ONCE = "soft_ece can be differentiated once: double backward through it is not supported"


@torch.library.custom_op("caop_fast::calibration_bins", mutates_args=())
def calibration_bins(
    confidence: Tensor, correct: Tensor, n_bins: int, edges: str, triton: bool, validate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Count (int64), sum of confidence and sum of correct (float64) per bin, [n_bins] each, of floating-point [N]."""
    if validate:
        check_unit(confidence, correct, None)
    bounds = edge_tensor(n_bins, edges, confidence.device)
    if triton:
        count, confidences, corrects = importlib.import_module("caop_kernels.bins").bin_sums(
            confidence, correct, bounds
        )
    else:
        sums = bounds.new_zeros(3, n_bins)
        for rows in row_blocks(confidence.shape[0], n_bins, confidence.device, None):
            sums += reference.bin_sums(confidence[rows].double(), correct[rows].double(), bounds)
        count, confidences, corrects = sums
    return count.to(torch.int64), confidences.clone(), corrects.clone()


@calibration_bins.register_fake
def _(confidence, correct, n_bins, edges, triton, validate):
    sums = [confidence.new_empty(n_bins, dtype=torch.float64) for _ in range(2)]
    return confidence.new_empty(n_bins, dtype=torch.int64), *sums


@functools.lru_cache(maxsize=64)
def edge_tensor(n_bins: int, edges: str, device: torch.device) -> Tensor:
    """The edges as float64 on a device; kept, for every copy to a GPU makes the host wait."""
    return torch.tensor(bin_edges(n_bins, edges).tolist(), dtype=torch.float64, device=device)


@torch.library.custom_op("caop_fast::soft_ece", mutates_args=())
def soft_ece(
    confidence: Tensor,
    correct: Tensor,
    weights: Tensor | None,
    n_bins: int,
    temperature: float,
    triton: bool,
    validate: bool,
) -> tuple[Tensor, Tensor]:
    """The soft-binned calibration error [1], and [n_bins + 1] what its derivative needs, of floating-point [N]."""
    if validate:
        checks.check_weights(weights)
        check_unit(confidence, correct, weights)
    if triton:
        return tuple(
            importlib.import_module("caop_kernels.bins").soft_calibration(
                confidence, correct, n_bins=n_bins, temperature=temperature, weights=weights
            )
        )
    dtype = checks.statistics_dtype((confidence,))
    sums = confidence.new_zeros(n_bins + 1, dtype=dtype)
    for _, columns in _clean_blocks(confidence, correct, weights, n_bins, dtype):
        sums += reference.soft_sums(*columns, n_bins, temperature)
    return reference.soft_error(sums)


@soft_ece.register_fake
def _(confidence, correct, weights, n_bins, temperature, triton, validate):
    dtype = checks.statistics_dtype((confidence,))
    return confidence.new_empty(1, dtype=dtype), confidence.new_empty(n_bins + 1, dtype=dtype)


@torch.library.custom_op("caop_fast::soft_ece_gradient", mutates_args=())
def soft_ece_gradient(
    confidence: Tensor,
    correct: Tensor,
    weights: Tensor | None,
    signs: Tensor,
    grad_error: Tensor,
    n_bins: int,
    temperature: float,
    triton: bool,
) -> Tensor:
    """Gradient [N] of ``confidence``, in its dtype, for the upstream gradient [1]."""
    if triton:
        return importlib.import_module("caop_kernels.bins").soft_calibration_gradient(
            confidence, correct, signs, grad_error, n_bins=n_bins, temperature=temperature, weights=weights
        )
    out = torch.empty_like(confidence, memory_format=torch.contiguous_format)
    for rows, columns in _clean_blocks(confidence, correct, weights, n_bins, signs.dtype):
        gradient = grad_error * reference.soft_gradient(*columns, signs, temperature)
        out[rows] = torch.where(columns[2] == 0, 0.0, gradient).to(out.dtype)
    return out


@soft_ece_gradient.register_fake
def _(confidence, *_):
    return torch.empty_like(confidence, memory_format=torch.contiguous_format)


def _clean_blocks(confidence, correct, weights, n_bins, dtype):
    for rows in row_blocks(confidence.shape[0], n_bins, confidence.device, None):
        block_weights = None if weights is None else weights[rows]
        yield rows, reference.clean(confidence[rows], correct[rows], block_weights, dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    confidence, correct, weights, *settings, _ = inputs
    ctx.save_for_backward(confidence, correct, weights, output[1])
    ctx.settings = settings
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_error: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    gradient = None if grad_error is None else soft_ece_gradient(*ctx.saved_tensors, grad_error, *ctx.settings)
    return gradient, *(None,) * 6


def _once(ctx: Any, *_: Any) -> None:
    raise RuntimeError(ONCE)


soft_ece.register_autograd(_backward, setup_context=_setup)
soft_ece_gradient.register_autograd(_once)


def check_unit(confidence: Tensor, correct: Tensor, weights: Tensor | None) -> None:
    """Confidence in [0, 1] or NaN, correct in [0, 1], where there is weight. Reads values."""
    live = torch.ones_like(confidence, dtype=torch.bool) if weights is None else weights != 0
    bad = live & ~(((confidence >= 0) & (confidence <= 1)) | confidence.isnan())
    if bool(bad.any()):
        raise ValueError(f"confidence must be in [0, 1], or NaN where unparsed, got {float(confidence[bad][0])}")
    bad = live & ~((correct >= 0) & (correct <= 1))
    if bool(bad.any()):
        raise ValueError(f"correct must be in [0, 1], got {float(correct[bad][0])}")
