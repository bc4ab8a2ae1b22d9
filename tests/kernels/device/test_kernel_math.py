"""The softcap's tanh: its error over all magnitudes, with NVIDIA's approximate instructions at their bounds, too."""

from __future__ import annotations

import math
from functools import partial, partialmethod

import pytest
import torch
import triton
import triton.language as tl

from caop_fast.losses.distillation import distillation_loss
from caop_kernels.math import tanh
from helpers.oracle import statistics

# Largest relative errors that the PTX ISA states of ex2.approx.ftz.f32 and rsqrt.approx.ftz.f32.
BOUNDS = {"create_exp2": 2**-22, "create_rsqrt": 2**-22.9}


@triton.jit
def tanh_kernel(values_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(out_ptr + offsets, tanh(tl.load(values_ptr + offsets, mask=mask, other=0.0)), mask=mask)


def run(values: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(values)
    tanh_kernel[(triton.cdiv(values.numel(), 4096),)](values, out, values.numel(), BLOCK=4096)
    return out


def at_bounds(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Interpreted, let the instructions of these names err by their bounds, up and down at random."""
    import numpy
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    signs = numpy.random.default_rng(0)

    def erring(exact, bound, builder, x):
        found = exact(builder, x)
        if found.data.dtype != numpy.float32:
            return found
        error = bound * signs.choice([-1.0, 1.0], size=found.data.shape)
        return TensorHandle((found.data.astype("float64") * (1 + error)).astype("float32"), found.dtype.scalar)

    for name in names:
        exact = getattr(InterpreterBuilder, name)
        monkeypatch.setattr(InterpreterBuilder, name, partialmethod(partial(erring, exact, BOUNDS[name])))


def magnitudes(dtype: torch.dtype) -> torch.Tensor:
    tiny = torch.logspace(math.log10(torch.finfo(dtype).tiny), -2, 5000, dtype=torch.float64)
    usual = torch.linspace(1e-2, 12, 60000, dtype=torch.float64)
    values = torch.cat((tiny, usual, torch.tensor([0.625, 20.0, 44.0, 60.0, 1e4, 3e38, math.inf], dtype=torch.float64)))
    return torch.cat((values, -values)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, "at the bounds"])
def test_tanh_has_small_relative_errors_everywhere(device, monkeypatch, dtype):
    """As a multiple of 2^-24 or 2^-53, half an ulp: PyTorch's own is 1 on a CPU, 4 on a GPU (CUDA's bound)."""
    emulated = dtype == "at the bounds"
    if emulated:
        if device.type != "cpu":
            pytest.skip("the bounds are emulated in the interpreter")
        at_bounds(monkeypatch, *BOUNDS)
        dtype = torch.float32
    values = magnitudes(dtype).to(device)
    found, truth = run(values).double().cpu(), torch.tanh(values.double()).cpu()
    half_ulps = (found / truth - 1).abs() / (torch.finfo(dtype).eps / 2)
    size = values.abs().double().cpu()
    assert half_ulps[size <= 0.6].max() <= (1.2 if dtype == torch.float32 else 4)
    assert half_ulps.max() <= (8 if emulated or device.type != "cpu" else 4)
    assert half_ulps[size >= 3].max() <= (1.2 if dtype == torch.float32 else 3)  # 1 - tanh^2 keeps its digits
    assert found.abs().max() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh_of_what_is_not_finite(device, dtype):
    values = torch.tensor([math.inf, -math.inf, 0.0, -0.0, math.nan], dtype=dtype, device=device)
    found = run(values).cpu()
    assert found[:4].tolist() == [1, -1, 0, 0]
    assert found[4].isnan()


def plain(student, teacher, beta, cap):
    """Softcapped logits in float32 and PyTorch's own operations."""
    s, t = (cap * torch.tanh(x / cap) for x in (student, teacher))
    log_s, log_t = s.log_softmax(-1), t.log_softmax(-1)
    log_m = log_t if beta == 1 else log_s
    if 0 < beta < 1:
        log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
    terms = beta * log_t.exp() * (log_t - log_m) + (1 - beta) * log_s.exp() * (log_s - log_m)
    if beta in (0, 1):
        terms = log_t.exp() * (log_t - log_s) if beta == 0 else log_s.exp() * (log_s - log_t)
    return terms.sum(-1), -(log_s.exp() * log_s).sum(-1)


@pytest.mark.parametrize("spread", [4.0, 20.0, 80.0])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_softcapped_errors_are_those_of_plain_pytorch(device, monkeypatch, beta, spread):
    """RMS error of values and gradients at most 1.2 times plain PyTorch's plus an ulp, from small to saturated logits
    of a cap of 30, with the inverse root at its bound."""
    if device.type == "cpu":
        at_bounds(monkeypatch, "create_rsqrt")
    g = torch.Generator().manual_seed(1)
    student = spread * torch.randn(32, 500, generator=g)
    teacher = student + 0.3 * spread * torch.randn(32, 500, generator=g)
    flows = torch.linspace(0.5, 2.0, 32)
    found = student.clone().to(device).requires_grad_()
    out = distillation_loss(
        found, teacher.to(device), beta=beta, student_softcap=30.0, teacher_softcap=30.0, backend="triton"
    )
    (flows.to(device) * (out.divergence + 0.3 * out.student_entropy)).sum().backward()
    yard, truth = student.clone().requires_grad_(), student.double().requires_grad_()
    theirs = plain(yard, teacher, beta, 30.0)
    (flows * (theirs[0] + 0.3 * theirs[1])).sum().backward()
    exact = statistics(truth, teacher.double(), beta=beta, student_softcap=30.0, teacher_softcap=30.0)
    want = exact[0], exact[3]
    (flows.double() * (want[0] + 0.3 * want[1])).sum().backward()
    triples = [
        (out.divergence, theirs[0], want[0]),
        (out.student_entropy, theirs[1], want[1]),
        (found.grad, yard.grad, truth.grad),
    ]
    for mine, other, true in triples:
        errors = [(x.detach().cpu().double() - true.detach()).square().mean().sqrt() for x in (mine, other)]
        assert errors[0] <= 1.2 * errors[1] + torch.finfo(torch.float32).eps * true.detach().square().mean().sqrt()
