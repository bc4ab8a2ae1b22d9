"""Checks of ``calibration_bins`` and ``soft_ece``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import caop_fast
from helpers.loss_checks import definitions, samples
from helpers.loss_checks.check import Check, Setting
from helpers.loss_checks.closeness import Inaccurate, verify

STATED = {"small": 40, "full": 4000}
BINS = (("float32", 10), ("bfloat16", 15), ("float16", 1), ("float32", 0))
ECE = (
    ("float32", 10, 0.01, None),
    ("bfloat16", 15, 0.02, "weights"),
    ("float16", 10, 0.05, "weights"),
    ("float32", 1, 0.01, "weights"),
)
# The explicit derivative of soft_ece subtracts the mean of the centres from each, and 2 / temperature amplifies the
# rounding error of that: 5 to 40 times the error of autograd, 1e-5 of the gradient.
DERIVATIVE = 60.0


def checks() -> Iterator[Check]:
    for dtype, n_bins in BINS:
        name = f"calibration_bins: {dtype}, " + (f"{n_bins} bins" if n_bins else "no answers")
        yield Check(name, partial(hard, dtype, n_bins))
    for dtype, n_bins, temperature, weights in ECE:
        name = f"soft_ece: {dtype}, {n_bins} bins, temperature {temperature}" + (f", {weights}" if weights else "")
        yield Check(name, partial(soft, dtype, n_bins, temperature, weights is not None))


def answers(dtype: str, setting: Setting, seed: tuple[object, ...]) -> tuple[Tensor, Tensor]:
    """Confidence [N], some on the edges of bins and some NaN, and correctness."""
    g = samples.generator(seed)
    n = STATED["small" if setting.sizes.n < 10 else "full"]
    stated = torch.rand(n, generator=g)
    stated[::5] = torch.linspace(0, 1, 11)[torch.arange(len(stated[::5])) % 11]
    stated[3::11] = float("nan")
    return stated.to(getattr(torch, dtype)).to(setting.device), (torch.rand(n, generator=g) < 0.6).to(setting.device)


def hard(dtype: str, n_bins: int, setting: Setting) -> None:
    """Counts exactly, sums to the last digits of float64."""
    stated, correct = answers(dtype, setting, (dtype, n_bins))
    if not n_bins:
        stated, correct, n_bins = stated[:0], correct[:0], 10
    found = caop_fast.calibration_bins(stated, correct, n_bins=n_bins, backend=setting.backend)
    c, y = stated.cpu().double(), correct.cpu().double()
    edges = [k * (1 / n_bins) for k in range(n_bins)] + [1.0]  # np.linspace(0, 1, n_bins + 1)
    for b in range(n_bins):
        member = (c >= edges[b]) & ((c <= 1) if b == n_bins - 1 else (c < edges[b + 1]))
        want = {"count": member.sum(), "confidence_sum": c[member].sum(), "correct_sum": y[member].sum()}
        for name, value in want.items():
            got = getattr(found, name)[b].cpu()
            if got.dtype != value.dtype or not abs(got.double() - value.double()) <= 1e-13 * float(value):
                raise Inaccurate(f"{name} of bin {b} is {got.item()!r}, not {value.item()!r}")


def soft(dtype: str, n_bins: int, temperature: float, weighted: bool, setting: Setting) -> None:
    """The calibration error and its gradient by the confidence."""
    stated, correct = answers(dtype, setting, (dtype, n_bins, temperature))
    weights = None
    if weighted:
        weights = (torch.arange(len(stated), device=setting.device) % 4) / 4

    def ours(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        error = caop_fast.soft_ece(
            leaves["confidence"], correct, n_bins=n_bins, temperature=temperature, weights=weights,
            backend=setting.backend,
        )  # fmt: skip
        return {"error": error}

    def defined(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        return definitions.soft_ece(leaves["confidence"], correct, weights, n_bins=n_bins, temperature=temperature)

    verify(ours, defined, {"confidence": stated}, ("error",), factor=DERIVATIVE)
