"""Binned calibration kernels, through the public functions, against numpy and against float64 definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from caop_fast.calibration.counts import bin_edges, bin_index
from caop_fast.losses.bins import calibration_bins, soft_ece

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def answers(n, dtype, device, decimals=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    c = torch.rand(n, generator=g, dtype=torch.float64)
    if decimals is not None:
        c = (c * 10**decimals).round() / 10**decimals
    y = (torch.rand(n, generator=g) < 0.6).float()
    return c.to(dtype).to(device), y.to(device)


def soft_truth(c, y, w, n_bins, temperature):
    """One bin and one row at a time."""
    centres = [(b + 0.5) / n_bins for b in range(n_bins)]
    total = 0.0
    for b in range(n_bins):
        difference = 0.0
        for ci, yi, wi in zip(c, y.tolist(), w.tolist(), strict=True):
            weights = torch.stack([torch.exp(-((ci - x) ** 2) / temperature) for x in centres])
            difference = difference + wi * weights[b] / weights.sum() * (ci - yi)
        total = total + difference.abs()
    return total / w.sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("edges", ["official", "exact"])
@pytest.mark.parametrize(("n", "n_bins"), [(0, 10), (1, 1), (5000, 10), (2049, 7), (300, 100)])
def test_bins_agree_with_numpy(device, dtype, edges, n, n_bins):
    c, y = answers(n, DTYPES[dtype], device, decimals=2)
    if n > 10:
        c[3:6] = torch.tensor([math.nan, 0.0, 1.0])
    found = calibration_bins(c, y, n_bins=n_bins, edges=edges, backend="triton")
    exact = c.double().cpu().numpy()
    stated = ~np.isnan(exact)
    index = bin_index(exact[stated], n_bins, edges)
    assert found.count.dtype == torch.int64
    assert np.array_equal(found.count.cpu().numpy(), np.bincount(index, minlength=n_bins))
    for got, column in ((found.confidence_sum, exact), (found.correct_sum, y.double().cpu().numpy())):
        want = np.bincount(index, weights=column[stated], minlength=n_bins)
        assert got.dtype == torch.float64
        np.testing.assert_allclose(got.cpu().numpy(), want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("edges", ["official", "exact"])
def test_values_on_and_next_to_every_edge(device, dtype, edges):
    """The float64 edge rounded to the dtype, and the numbers just below and above it."""
    on = torch.from_numpy(bin_edges(10, edges).copy()).to(DTYPES[dtype])
    steps = torch.tensor([-1e-3, 0, 1e-3], dtype=DTYPES[dtype])
    near = torch.cat([torch.nextafter(on, on + s) if dtype in ("fp32", "fp64") else on + s for s in steps])
    near = near[(near >= 0) & (near <= 1)].to(device)
    found = calibration_bins(near, torch.ones_like(near), edges=edges, backend="triton")
    want = np.bincount(bin_index(near.double().cpu().numpy(), 10, edges), minlength=10)
    assert np.array_equal(found.count.cpu().numpy(), want)


def test_values_outside_are_left_out_unless_checked(device):
    c = torch.tensor([-0.1, 1.1, math.inf, 0.5, 0.5, 0.5], device=device)
    y = torch.tensor([1.0, 1, 1, 2, math.nan, 1], device=device)
    found = calibration_bins(c, y, backend="triton", validate=False)
    assert found.count.tolist() == [0] * 5 + [1] + [0] * 4
    assert found.correct_sum.sum() == 1
    with pytest.raises(ValueError, match="confidence"):
        calibration_bins(c, y, backend="triton", validate=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "n_bins", "temperature"), [(1, 1, 0.01), (40, 10, 0.01), (33, 5, 0.3), (9, 20, 1e-4)])
def test_soft_ece_and_its_gradient(device, dtype, n, n_bins, temperature):
    c, y = answers(n, DTYPES[dtype], device, seed=n)
    w = torch.rand(n, generator=torch.Generator().manual_seed(9)).to(device) + 0.1
    leaf = c.clone().requires_grad_()
    value = soft_ece(leaf, y, n_bins=n_bins, temperature=temperature, weights=w, backend="triton")
    (1.7 * value).backward()
    exact = c.double().cpu().requires_grad_()
    want = soft_truth(exact, y, w.double().cpu(), n_bins, temperature)
    (wanted,) = torch.autograd.grad(1.7 * want, exact)
    assert value.dtype == (torch.float64 if dtype == "fp64" else torch.float32)
    assert value.shape == ()
    tolerance = 1e-12 if dtype == "fp64" else 2e-6
    assert abs(value.item() - want.item()) <= tolerance
    eps = torch.finfo(DTYPES[dtype]).eps
    # An exponent (c - x)^2 / temperature is off by about 1e-8 / temperature in float32.
    slack = (1e-9 if dtype == "fp64" else 1e-5 + 2e-8 / temperature) * wanted.abs().max()
    assert ((leaf.grad.double().cpu() - wanted).abs() <= eps * wanted.abs() + slack).all()


@pytest.mark.parametrize("n_bins", [10, 1024])
def test_soft_ece_over_many_rows_and_bins(device, n_bins):
    """More rows than one program takes; against a vectorised float64 form."""
    n = 4500 if n_bins == 10 else 8
    c, y = answers(n, torch.float32, device)
    leaf, exact = c.clone().requires_grad_(), c.double().requires_grad_()
    value = soft_ece(leaf, y, n_bins=n_bins, backend="triton")
    value.backward()
    centres = (torch.arange(n_bins, device=device).double() + 0.5) / n_bins
    u = torch.softmax(-((exact[:, None] - centres) ** 2) / 0.01, -1)
    want = (u * (exact - y)[:, None]).sum(0).abs().sum() / n
    want.backward()
    torch.testing.assert_close(value.double(), want, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-4, atol=1e-5 / n)


def test_rows_that_do_not_count(device):
    """Weight 0, a confidence of NaN, and unchecked values outside: as if the row were not there."""
    c, y = answers(12, torch.float32, device)
    w = torch.ones(12, device=device)
    w[2] = 0
    keep = torch.tensor([i not in (2, 4, 6, 8) for i in range(12)], device=device)
    bad_c, bad_y = c.clone(), y.clone()
    bad_c[2], bad_c[4], bad_c[6], bad_y[8] = math.nan, math.nan, 1.5, math.nan
    bad_y[2] = math.inf
    leaf, clean = bad_c.requires_grad_(), c[keep].requires_grad_()
    got = soft_ece(leaf, bad_y, weights=w, backend="triton", validate=False)
    want = soft_ece(clean, y[keep], backend="triton")
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    got.backward()
    want.backward()
    torch.testing.assert_close(leaf.grad[keep], clean.grad, rtol=1e-4, atol=1e-6)
    assert (leaf.grad[~keep] == 0).all()


@pytest.mark.parametrize("n", [0, 3])
def test_without_weight_the_error_is_zero(device, n):
    leaf = torch.full((n,), 0.4, device=device).requires_grad_()
    value = soft_ece(leaf, torch.zeros(n, device=device), weights=torch.zeros(n, device=device), backend="triton")
    value.backward()
    assert value == 0
    assert (leaf.grad == 0).all()


def test_the_gradient_vanishes_where_a_difference_is_zero(device):
    """One bin, sum (c - y) = 0: the derivative of |.| at 0 is 0."""
    leaf = torch.tensor([0.5, 0.5], device=device).requires_grad_()
    soft_ece(leaf, torch.tensor([1.0, 0.0], device=device), n_bins=1, backend="triton").backward()
    assert (leaf.grad == 0).all()


def test_same_bits_in_every_run(device):
    c, y = answers(5000, torch.float32, device)
    first, second = (calibration_bins(c, y, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(soft_ece(c, y, backend="triton"), soft_ece(c, y, backend="triton"))
