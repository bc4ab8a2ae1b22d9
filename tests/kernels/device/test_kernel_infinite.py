"""Rows with infinite logits or an infinite divergence: both backends give the same values and gradients."""

from __future__ import annotations

import math

import pytest
import torch

from caop_fast.losses.distillation import distillation_loss
from caop_fast.losses.topk import topk_distillation_loss
from helpers.oracle import statistics

INF = math.inf
# What each row holds: (student's infinite column, its value), (teacher's).
ROWS = {
    "finite": (None, None),
    "student +inf": ((2, INF), None),
    "teacher +inf": (None, (2, INF)),
    "both +inf": ((2, INF), (2, INF)),
    "both +inf apart": ((2, INF), (3, INF)),
    "teacher -inf": (None, (2, -INF)),
    "teacher -inf, student underflows": ((2, -200.0), (2, -INF)),
    "student -inf": ((2, -INF), None),
    "both -inf": ((2, -INF), (2, -INF)),
}
NAN_ROWS = [name for name in ROWS if "+inf" in name]
NO_GRADIENT = [*NAN_ROWS, "teacher -inf", "teacher -inf, student underflows"]  # of reverse KL
CASES = [
    (0.0, torch.float32),
    (0.3, torch.float64),
    (1.0, torch.float32),
    (1.0, torch.float64),
    ("ones", torch.float32),
]


def logits(dtype):
    g = torch.Generator().manual_seed(0)
    sides = torch.randn(2, len(ROWS), 6, generator=g, dtype=torch.float64).to(dtype)
    for row, places in enumerate(ROWS.values()):
        for side, place in zip(sides, places, strict=True):
            if place is not None:
                side[row, place[0]] = place[1]
    return sides


def are(names):
    return [name in names for name in ROWS]


@pytest.mark.parametrize(("beta", "dtype"), CASES)
def test_infinite_logits(device, beta, dtype):
    beta = torch.ones(len(ROWS)) if beta == "ones" else beta  # of each row
    reverse = isinstance(beta, torch.Tensor) or beta == 1
    student, teacher = logits(dtype)
    found = {}
    for backend, place in (("torch", torch.device("cpu")), ("triton", device)):
        leaf = student.to(place, copy=True).requires_grad_()
        chosen = beta.to(place) if isinstance(beta, torch.Tensor) else beta
        out = distillation_loss(leaf, teacher.to(place), beta=chosen, backend=backend)
        (gradient,) = torch.autograd.grad(out.divergence.sum(), leaf, retain_graph=True)
        defined = torch.tensor([name not in NO_GRADIENT for name in ROWS], device=place)
        (masked,) = torch.autograd.grad(out.divergence[defined].sum(), leaf)
        numbers = torch.tensor([name not in NAN_ROWS for name in ROWS])  # where nothing flows, +inf does no harm
        found[backend] = [x.detach().cpu() for x in (out.divergence, gradient, masked[numbers.to(place)])]
    for divergence, gradient, masked in found.values():
        assert divergence.isnan().tolist() == are(NAN_ROWS)
        assert gradient.isnan().all(-1).tolist() == are(NO_GRADIENT if reverse else NAN_ROWS)
        assert masked.isfinite().all()
    for mine, other in zip(*found.values(), strict=True):
        tolerance = 2e-6 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance, equal_nan=True)
    # Where the gradient exists it is autograd's.
    rows = torch.tensor([i for i, name in enumerate(ROWS) if name not in NO_GRADIENT and "-inf" not in name])
    truth = student[rows].double().requires_grad_()
    exact = statistics(truth, teacher[rows], beta=beta[rows].double() if isinstance(beta, torch.Tensor) else beta)[0]
    exact.sum().backward()
    torch.testing.assert_close(found["triton"][1][rows].double(), truth.grad, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "ignore"])
@pytest.mark.parametrize(("beta", "dtype"), CASES[:4])
def test_infinite_logits_against_a_sparse_teacher(device, beta, dtype, tail):
    g = torch.Generator().manual_seed(0)
    names = ("finite", "listed +inf", "unlisted +inf", "teacher -inf", "listed -inf")
    student = torch.randn(5, 7, generator=g, dtype=torch.float64).to(dtype)
    ids = torch.tensor([4, 1, 2]).expand(5, 3)
    logprobs = torch.tensor([0.5, 0.2, 0.1], dtype=dtype).log().repeat(5, 1)
    student[1, 1] = student[2, 6] = INF
    logprobs[3, 1] = student[4, 1] = -INF
    found = {}
    for backend, place in (("torch", torch.device("cpu")), ("triton", device)):
        leaf = student.to(place, copy=True).requires_grad_()
        out = topk_distillation_loss(leaf, ids.to(place), logprobs.to(place), beta=beta, tail=tail, backend=backend)
        (gradient,) = torch.autograd.grad(out.divergence.sum(), leaf)
        found[backend] = [x.detach().cpu() for x in (out.divergence, gradient)]
    for divergence, gradient in found.values():
        assert divergence.isnan().tolist() == ["+inf" in name for name in names]
        undefined = [tail_ for tail_ in names if "+inf" in tail_ or (beta == 1 and tail_ == "teacher -inf")]
        listed = gradient.gather(-1, ids)
        assert listed.isnan().all(-1).tolist() == [name in undefined for name in names]
        assert gradient[[name not in undefined for name in names]].isfinite().all()
    for mine, other in zip(*found.values(), strict=True):
        tolerance = 2e-6 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance, equal_nan=True)
