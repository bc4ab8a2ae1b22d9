"""Numbers that are none, or far beyond what they should be: the kernels give what PyTorch does."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from caop_fast import distillation_loss, topk_distillation_loss

SPECIAL = (math.nan, math.inf, -math.inf, 0.0)


def rows(device: torch.device, n: int, v: int = 203, spread: float = 0.01) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a student and of a teacher near it."""
    g = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(n, v, generator=g)
    return student.to(device), (student + spread * torch.randn(n, v, generator=g)).to(device)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, "rows"])
def test_special_logits_of_both_models(device, beta):
    """Every pair of them in one column, each in a row of its own."""
    pairs = list(itertools.product(SPECIAL, SPECIAL))
    student, teacher = rows(device, len(pairs))
    for row, (s, t) in enumerate(pairs):
        student[row, 7], teacher[row, 7] = s, t
    betas = (torch.arange(len(pairs), device=device) % 2).float() if beta == "rows" else beta
    found = {}
    for backend in ("triton", "torch"):
        leaf = student.clone().requires_grad_()
        out = distillation_loss(leaf, teacher, beta=betas, backend=backend, reduction="none", validate=False)
        out.loss.backward(torch.full_like(out.loss, 0.5))
        found[backend] = (out.divergence, out.student_entropy, out.teacher_entropy, leaf.grad)
    for name, ours, theirs in zip(("divergence", "student", "teacher", "grad"), *found.values(), strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=2e-3, atol=2e-7, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("tail", "bad"),
    [("bucket", "large"), ("renormalize", "large"), ("ignore", "large"), ("bucket", "nan"), ("ignore", "nan")],
)
def test_teachers_that_are_no_distributions(device, tail, bad):
    """Logits given for log-probabilities, and a student with NaN at an id that is not listed."""
    student, _ = rows(device, 3)
    ids = torch.arange(12, device=device).view(3, 4)
    logprobs = torch.full((3, 4), -2.0, device=device)
    if bad == "large":
        logprobs[:, 0] = torch.tensor([89.0, 95.0, 200.0])
    else:
        student[1, 50] = math.nan
    found = {}
    for backend in ("triton", "torch"):
        leaf = student.clone().requires_grad_()
        out = topk_distillation_loss(leaf, ids, logprobs, tail=tail, backend=backend, reduction="none", validate=False)
        out.loss.backward(torch.full_like(out.loss, 0.5))
        found[backend] = (out.divergence.isfinite(), leaf.grad.isfinite())
    for ours, theirs in zip(*found.values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_near_rows_have_errors_of_both_signs(device, beta):
    """What a difference leaves out must not add up over the vocabulary."""
    student, _ = rows(device, 16, 2048)
    signs = torch.arange(2048, device=device) % 2 * 2 - 1
    teacher = student + signs * (math.log(2) / 32)
    out = distillation_loss(student, teacher, beta=beta, backend="triton", reduction="none")
    log_s, log_t = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    p, q = (log_t, log_s) if beta == 0 else (log_s, log_t)
    exact = (p.exp() * (p - q)).sum(-1)
    errors = (out.divergence.double() - exact) / exact
    assert abs(float(errors.mean())) < 3e-5, errors
