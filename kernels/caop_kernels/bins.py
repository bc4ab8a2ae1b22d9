"""Binned calibration sums of N stated confidences c against outcomes y, and the soft-binned calibration error.

Hard bins, edges e_0 <= ... <= e_B: a row belongs to bin b when e_b <= c < e_(b+1), the last bin takes e_B too, and

    count_b = sum 1        confidence_b = sum c        correct_b = sum y

in float64, compared in float64 too, so that any c lands in the bin its exact value belongs to.

Soft bins (Karandikar et al. 2021, arXiv 2108.00106, order 1), with centres x_b = (b + 1/2) / B and temperature T:

    u_b = softmax_b(-(c - x_b)^2 / T)        D_b = sum w u_b (c - y)        soft ECE = sum_b |D_b| / sum w
    d / dc = w / sum(w) * sum_b sign(D_b) u_b (1 + (c - y) 2 (x_b - x) / T),  x = sum_b u_b x_b

with sign(0) = 0. A row is left out where c or y is outside [0, 1] or NaN, or its weight is 0.

Rows are split into runs of fixed length. A program sums one run in a fixed order; a second kernel adds the runs up, in
order: no atomics, the same bits every time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from caop_kernels.backend import require
from caop_kernels.checks import assert_fields, assert_rows, contiguous
from caop_kernels.launch import compiled_with, compute_type, current_device

RUN = 2048  # rows per program: a thousand rows are one program, a million are 489
BIN_FIELDS = 3  # count, sum of confidence, sum of correct
ELEMENTS = 2048  # rows times bins of a tile: 16 per thread of 4 warps


class BinSums(NamedTuple):
    """Sums per bin, float64 [n_bins] each (counts are exact up to 2^53)."""

    counts: torch.Tensor
    confidence: torch.Tensor
    correct: torch.Tensor


class SoftCalibration(NamedTuple):
    """The soft-binned calibration error, and what its gradient needs."""

    error: torch.Tensor
    """[1]"""
    signs: torch.Tensor
    """[n_bins + 1]: sign(D_b) / sum w per bin, and sum w."""


@triton.jit
def load_rows(confidence_ptr, correct_ptr, weights_ptr, rows, n_rows, COMPUTE: tl.constexpr):
    """(c, y, weight) of some rows; 0, 0, 0 for those left out."""
    mask = rows < n_rows
    weight = tl.where(mask, 1.0, 0.0).to(COMPUTE)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + rows, mask=mask, other=0.0).to(COMPUTE)
    used = mask & (weight != 0)
    c = tl.load(confidence_ptr + rows, mask=used, other=-1.0).to(COMPUTE)
    y = tl.load(correct_ptr + rows, mask=used, other=-1.0).to(COMPUTE)
    used = (c >= 0) & (c <= 1) & (y >= 0) & (y <= 1)  # false for NaN
    return tl.where(used, c, 0.0), tl.where(used, y, 0.0), tl.where(used, weight, 0.0)


@triton.jit(do_not_specialize=["n_rows"])
def bin_kernel(
    confidence_ptr,  # [n_rows]
    correct_ptr,  # [n_rows]
    edges_ptr,  # [n_bins + 1] float64
    partial_ptr,  # [runs, BIN_FIELDS, n_bins] float64
    n_rows,
    n_bins,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    BINS: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """Program (run, group of bins): the sums of one run of rows."""
    run = tl.program_id(0).to(tl.int64)
    bins = tl.program_id(1) * BINS + tl.arange(0, BINS)
    real = bins < n_bins
    low = tl.load(edges_ptr + bins, mask=real, other=float("inf"))
    high = tl.load(edges_ptr + bins + 1, mask=real & (bins < n_bins - 1), other=float("inf"))
    count = tl.zeros([BINS], tl.float64)
    confidence = tl.zeros([BINS], tl.float64)
    correct = tl.zeros([BINS], tl.float64)
    for start in tl.range(0, RUN, ROWS):
        rows = run * RUN + start + tl.arange(0, ROWS)
        c, y, used = load_rows(confidence_ptr, correct_ptr, None, rows, n_rows, tl.float64)
        inside = (c[:, None] >= low[None, :]) & (c[:, None] < high[None, :]) & (used[:, None] != 0)
        count += tl.sum(tl.where(inside, 1.0, 0.0).to(tl.float64), axis=0)
        confidence += tl.sum(tl.where(inside, c[:, None], 0.0), axis=0)
        correct += tl.sum(tl.where(inside, y[:, None], 0.0), axis=0)
    out = partial_ptr + run * (FIELDS * n_bins) + bins
    tl.store(out, count, mask=real)
    tl.store(out + n_bins, confidence, mask=real)
    tl.store(out + 2 * n_bins, correct, mask=real)


@triton.jit(do_not_specialize=["n_runs"])
def add_runs_kernel(
    partial_ptr,  # [n_runs, width]
    out_ptr,  # [width]
    n_runs,
    width,
    BLOCK: tl.constexpr,
):
    """Column sums, in the order of the runs."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = columns < width
    total = tl.zeros([BLOCK], out_ptr.dtype.element_ty)
    source = partial_ptr + columns
    for _ in tl.range(0, n_runs):
        total += tl.load(source, mask=real, other=0.0)
        source += width
    tl.store(out_ptr + columns, total, mask=real)


@triton.jit
def memberships(c, centres, real, inverse_temperature):
    """Soft membership [rows, bins] of each confidence in each bin."""
    distance = c[:, None] - centres[None, :]
    exponent = tl.where(real[None, :], -(distance * distance) * inverse_temperature, float("-inf"))
    e = tl.exp(exponent - tl.max(exponent, axis=1)[:, None])
    return e / tl.sum(e, axis=1)[:, None]


@triton.jit(do_not_specialize=["n_rows"])
def soft_bin_kernel(
    confidence_ptr,  # [n_rows]
    correct_ptr,  # [n_rows]
    weights_ptr,  # [n_rows] or None
    partial_ptr,  # [runs, n_bins + 1], COMPUTE: D_b of the run, and its sum of weights
    n_rows,
    n_bins,
    inverse_temperature: tl.float64,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    BINS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Program (run): the soft sums of one run of rows."""
    run = tl.program_id(0).to(tl.int64)
    bins = tl.arange(0, BINS)
    real = bins < n_bins
    centres = (bins.to(COMPUTE) + 0.5) / n_bins
    inverse_temperature = tl.full((), inverse_temperature, COMPUTE)
    difference = tl.zeros([BINS], COMPUTE)
    weight_sum = tl.zeros([ROWS], COMPUTE)
    for start in tl.range(0, RUN, ROWS):
        rows = run * RUN + start + tl.arange(0, ROWS)
        c, y, weight = load_rows(confidence_ptr, correct_ptr, weights_ptr, rows, n_rows, COMPUTE)
        u = memberships(c, centres, real, inverse_temperature)
        difference += tl.sum(u * (weight * (c - y))[:, None], axis=0)
        weight_sum += weight
    out = partial_ptr + run * (n_bins + 1)
    tl.store(out + bins, difference, mask=real)
    tl.store(out + n_bins, tl.sum(weight_sum, axis=0))


@triton.jit
def soft_error_kernel(
    sums_ptr,  # [n_bins + 1]
    error_ptr,  # [1]
    signs_ptr,  # [n_bins + 1]
    n_bins,
    BINS: tl.constexpr,
):
    """sum |D_b| / sum w, and sign(D_b) / sum w for the gradient; 0 where all weights are."""
    bins = tl.arange(0, BINS)
    real = bins < n_bins
    d = tl.load(sums_ptr + bins, mask=real, other=0.0)
    total = tl.load(sums_ptr + n_bins)
    inverse = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
    tl.store(error_ptr, tl.sum(tl.abs(d), axis=0) * inverse)
    sign = tl.where(d > 0, inverse, tl.where(d < 0, -inverse, 0.0))
    tl.store(signs_ptr + bins, sign, mask=real)
    tl.store(signs_ptr + n_bins, total)


@triton.jit(do_not_specialize=["n_rows"])
def soft_gradient_kernel(
    confidence_ptr,  # [n_rows]
    correct_ptr,  # [n_rows]
    weights_ptr,  # [n_rows] or None
    signs_ptr,  # [n_bins + 1], COMPUTE
    grad_error_ptr,  # [1]
    out_ptr,  # [n_rows], the dtype of the confidence
    n_rows,
    n_bins,
    inverse_temperature: tl.float64,
    ROWS: tl.constexpr,
    BINS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Program (block of rows): the gradient of their confidence."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    bins = tl.arange(0, BINS)
    real = bins < n_bins
    centres = (bins.to(COMPUTE) + 0.5) / n_bins
    inverse_temperature = tl.full((), inverse_temperature, COMPUTE)
    c, y, weight = load_rows(confidence_ptr, correct_ptr, weights_ptr, rows, n_rows, COMPUTE)
    u = memberships(c, centres, real, inverse_temperature)
    signs = tl.load(signs_ptr + bins, mask=real, other=0.0)
    mean = tl.sum(u * centres[None, :], axis=1)
    pull = (c - y)[:, None] * (2.0 * inverse_temperature) * (centres[None, :] - mean[:, None])
    slope = tl.sum(u * signs[None, :] * (1.0 + pull), axis=1)
    gradient = tl.where(weight != 0, tl.load(grad_error_ptr).to(COMPUTE) * weight * slope, 0.0)
    tl.store(out_ptr + rows, gradient.to(out_ptr.dtype.element_ty), mask=rows < n_rows)


def tile(n_bins: int, *, whole: bool) -> dict[str, int]:
    """ROWS and BINS of a tile: all bins with `whole` (a softmax runs over them), else at most 64 per program."""
    bins = triton.next_power_of_2(n_bins)
    bins = bins if whole else min(bins, 64)
    return {"ROWS": max(ELEMENTS // max(bins, 16), 1), "BINS": bins}


def add_runs(partial: torch.Tensor, width: int) -> torch.Tensor:
    """[width] sums over the runs."""
    out = partial.new_empty(width)
    add_runs_kernel[(triton.cdiv(width, 64),)](partial, out, partial.shape[0], width, BLOCK=64, **compiled_with(2))
    return out


def bin_sums(confidence: torch.Tensor, correct: torch.Tensor, edges: torch.Tensor) -> BinSums:
    """Count, sum of confidence and sum of correct per bin.

    Args:
        confidence: [N] float32, bfloat16, float16 or float64.
        correct: [N], likewise; the dtypes may differ.
        edges: [n_bins + 1] float64, ascending, on the same device.

    Raises:
        RuntimeError: where the kernels cannot run.
    """
    n_rows, n_bins = confidence.shape[0], edges.shape[0] - 1
    assert_rows(n_rows, confidence.device, confidence, correct)
    assert edges.dtype == torch.float64, edges.dtype
    assert n_bins >= 1, edges.shape
    require(confidence.device)
    runs = triton.cdiv(n_rows, RUN)
    partial = edges.new_empty((runs, BIN_FIELDS, n_bins))
    shape = tile(n_bins, whole=False)
    with current_device(confidence.device):
        if runs:
            bin_kernel[(runs, triton.cdiv(n_bins, shape["BINS"]))](
                confidence.contiguous(),
                correct.contiguous(),
                edges.contiguous(),
                partial,
                n_rows,
                n_bins,
                RUN=RUN,
                FIELDS=BIN_FIELDS,
                **shape,
                **compiled_with(4),
            )
        sums = add_runs(partial, BIN_FIELDS * n_bins)
    counts, confidences, corrects = sums.view(BIN_FIELDS, n_bins)
    return BinSums(counts, confidences, corrects)


def soft_calibration(
    confidence: torch.Tensor,
    correct: torch.Tensor,
    *,
    n_bins: int,
    temperature: float,
    weights: torch.Tensor | None = None,
) -> SoftCalibration:
    """The soft-binned calibration error; float32, or float64 when `confidence` is.

    Args:
        confidence, correct: as in `bin_sums`.
        n_bins: in [1, 1024].
        temperature: of the memberships, > 0.
        weights: [N] >= 0, or None.

    Raises:
        RuntimeError: where the kernels cannot run.
    """
    n_rows = confidence.shape[0]
    assert_rows(n_rows, confidence.device, confidence, correct, weights)
    assert temperature > 0, temperature
    assert 1 <= n_bins <= 1024, n_bins
    require(confidence.device)
    dtype = torch.float64 if confidence.dtype == torch.float64 else torch.float32
    runs = triton.cdiv(n_rows, RUN)
    partial = confidence.new_empty((runs, n_bins + 1), dtype=dtype)
    error, signs = partial.new_empty(1), partial.new_empty(n_bins + 1)
    shape = tile(n_bins, whole=True)
    with current_device(confidence.device):
        if runs:
            soft_bin_kernel[(runs,)](
                confidence.contiguous(),
                correct.contiguous(),
                contiguous(weights),
                partial,
                n_rows,
                n_bins,
                inverse_temperature=1.0 / temperature,
                RUN=RUN,
                COMPUTE=compute_type(dtype),
                **shape,
                **compiled_with(4),
            )
        soft_error_kernel[(1,)](
            add_runs(partial, n_bins + 1), error, signs, n_bins, BINS=shape["BINS"], **compiled_with(1)
        )
    return SoftCalibration(error, signs)


def soft_calibration_gradient(
    confidence: torch.Tensor,
    correct: torch.Tensor,
    signs: torch.Tensor,
    grad_error: torch.Tensor,
    *,
    n_bins: int,
    temperature: float,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient [N] of `confidence`, in its dtype, from the upstream gradient of the error, [1]; else as in the
    forward."""
    n_rows = confidence.shape[0]
    assert_rows(n_rows, confidence.device, confidence, correct, weights)
    assert_fields(signs, n_bins + 1)
    out = torch.empty_like(confidence, memory_format=torch.contiguous_format)
    if n_rows == 0:
        return out
    shape = tile(n_bins, whole=True)
    with current_device(confidence.device):
        soft_gradient_kernel[(triton.cdiv(n_rows, shape["ROWS"]),)](
            confidence.contiguous(),
            correct.contiguous(),
            contiguous(weights),
            signs,
            grad_error.contiguous(),
            out,
            n_rows,
            n_bins,
            inverse_temperature=1.0 / temperature,
            COMPUTE=compute_type(signs.dtype),
            **shape,
            **compiled_with(4),
        )
    return out
