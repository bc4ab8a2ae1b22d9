"""`token_statistics` on the kernels (student alone): values and gradients against float64."""

from __future__ import annotations

import pytest
import torch

from caop_fast import token_statistics
from helpers.row_oracle import logits

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
CASES = [
    (dtype, v, kind, temperature, softcap)
    for i, dtype in enumerate(DTYPES)
    for v, kind, temperature, softcap in (
        (8, "normal", (0.7, 1.0, 2.0)[i % 3], None),
        (1000, "peaked", (1.0, 2.0, 0.7)[i % 3], 30.0),
        (1031, "normal", (2.0, 0.7, 1.0)[i % 3], (None, 12.0)[i % 2]),
        (20000, "peaked", (0.7, 1.0, 2.0)[(i + 1) % 3], None),
    )
]


def truth(z, labels, temperature=1.0, softcap=None):
    a = z.double()
    a = (softcap * torch.tanh(a / softcap) if softcap else a) / temperature
    log_p = a.log_softmax(-1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * torch.where(p > 0, log_p, 0.0), 0.0).sum(-1)
    return log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1), entropy, a.logsumexp(-1)


def run(z, labels, up, **options):
    """The three statistics and the gradient of their weighted sum."""
    leaf = z.clone().requires_grad_()
    out = token_statistics(leaf, labels, backend="triton", **options)
    sum((u * o).sum() for u, o in zip(up, out, strict=True)).backward()
    return *(o.detach() for o in out), leaf.grad


def upstream(n, device):
    return torch.randn(3, n, generator=torch.Generator().manual_seed(7)).to(device)


@pytest.mark.parametrize(("dtype", "v", "kind", "temperature", "softcap"), CASES)
def test_matches_float64(device, dtype, v, kind, temperature, softcap):
    z, _ = logits(kind, 4, v, DTYPES[dtype], device)
    labels = torch.tensor([0, v - 1, -100, v // 2], device=device)
    up = upstream(4, device)
    found = run(z, labels, up, temperature=temperature, softcap=softcap)
    exact = z.double().requires_grad_()
    live = labels != -100
    want = [torch.where(live, w, 0.0) for w in truth(exact, labels, temperature, softcap)]
    sum((u * w).sum() for u, w in zip(up, want, strict=True)).backward()
    tolerance = 1e-11 if dtype == "fp64" else 4e-6
    for got, w in zip(found[:3], want, strict=True):
        torch.testing.assert_close(got.double(), w.detach(), rtol=tolerance, atol=tolerance)
    eps = {"fp32": 2e-6, "bf16": 2**-8, "fp16": 2**-10, "fp64": 1e-12}[dtype]
    error = (found[3].double() - exact.grad).abs()
    assert (error <= eps * (exact.grad.abs() + 0.1 * exact.grad.abs().amax()) + 1e-12).all()
    assert (found[3][2] == 0).all()


def test_each_output_alone(device):
    z, _ = logits("normal", 4, 1031, torch.float32, device)
    labels = torch.tensor([0, 1030, 5, 700], device=device)
    for i in range(3):
        up = torch.zeros(3, 4, device=device)
        up[i] = upstream(4, device)[i]
        leaf, exact = z.clone().requires_grad_(), z.double().requires_grad_()
        (token_statistics(leaf, labels, backend="triton")[i] * up[i]).sum().backward()
        (truth(exact, labels)[i] * up[i]).sum().backward()
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)


def test_rows_are_independent_and_weight_0_rows_are_not_read(device):
    z, _ = logits("normal", 5, 17000, torch.bfloat16, device)
    labels = torch.tensor([0, 1, 2, 3, 16999], device=device)
    up = upstream(5, device)
    whole = run(z, labels, up)
    order = torch.tensor([3, 0, 4], device=device)
    for got, want in zip(run(z[order], labels[order], up[:, order]), whole, strict=True):
        assert torch.equal(got, want[order])
    z[1] = float("nan")
    weights = torch.tensor([1.0, 0, 2, 1, 1], device=device)
    masked = run(z, labels, up, weights=weights)
    for got, want in zip(masked, whole, strict=True):
        assert (got[1] == 0).all()
        assert torch.equal(got[order], want[order])
    poisoned = run(z, labels, up)
    for got, want in zip(poisoned, whole, strict=True):
        assert got[1].isnan().all()
        assert torch.equal(got[order], want[order])


@pytest.mark.parametrize("n", [0, 1])
def test_few_rows_padding_and_inplace(device, n):
    z, _ = logits("normal", n, 1040, torch.float32, device)
    labels = torch.full((n,), 1030, device=device)
    up = upstream(n, device)
    want = run(z[:, :1031].contiguous(), labels, up)
    z[:, 1031:] = float("nan")
    found = run(z, labels, up, vocab_size=1031)
    for got, w in zip(found[:3], want[:3], strict=True):
        torch.testing.assert_close(got, w, rtol=4e-6, atol=4e-6)
    torch.testing.assert_close(found[3][:, :1031], want[3], rtol=1e-5, atol=1e-7)
    assert (found[3][:, 1031:] == 0).all()
    leaf = z.clone().requires_grad_()
    over = leaf * 1.0
    out = token_statistics(over, labels, backend="triton", vocab_size=1031, inplace=True)
    sum((u * o).sum() for u, o in zip(up, out, strict=True)).backward()
    assert torch.equal(leaf.grad, found[3])
    assert torch.equal(over.detach(), found[3])


@pytest.mark.parametrize("field", ["logprob", "entropy", "lse"])
def test_gradcheck(device, field):
    z, _ = logits("normal", 3, 9, torch.float64, device)
    labels = torch.tensor([0, 6, 2], device=device)
    weights = torch.tensor([1.0, 0, 2], device=device)

    def f(z):
        options = {"temperature": 0.8, "softcap": 4.0, "vocab_size": 7, "weights": weights}
        return getattr(token_statistics(z, labels, backend="triton", **options), field)

    assert torch.autograd.gradcheck(f, (z.requires_grad_(),))
