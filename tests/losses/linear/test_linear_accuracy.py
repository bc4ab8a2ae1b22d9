"""What the linear losses promise of their gradients: digits where the models are close, whatever the chunks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from caop_fast import linear_distillation_loss, linear_distillation_rows
from helpers.oracle import statistics

N, V, H = 64, 4096, 64


def close_models(divergence: float, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and heads whose forward KL is about ``divergence``: the teacher is a little off the student."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=g)
    weight = torch.randn(V, H, generator=g) * (3 / H**0.5)
    step = (2 * divergence / 9) ** 0.5
    other = weight + 3 * step / H**0.5 * torch.randn(V, H, generator=g)
    return tuple(t.to(dtype) for t in (hidden, weight, hidden, other))


def exact(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean divergence, grad_hidden and grad_weight in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (h_s, w_s)]
    loss = statistics(leaves[0] @ leaves[1].t(), h_t.double() @ w_t.double().t(), beta=beta)[0].mean()
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def gradients(call, h_s: Tensor, w_s: Tensor, *teacher: Tensor, **options) -> tuple[Tensor, Tensor]:
    leaves = [t.clone().requires_grad_() for t in (h_s, w_s)]
    out = call(*leaves, *teacher, **options)
    (out.divergence.mean() if out.loss is None else out.loss).backward()
    return tuple(leaf.grad for leaf in leaves)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


WAYS = {
    "balanced": (linear_distillation_loss, {}),
    "min": (linear_distillation_loss, {"memory": "min"}),
    "rows": (linear_distillation_rows, {}),
}
CHUNKS = {"balanced": 20, "min": 500, "rows": 20}  # of 64 tokens; with "min", of 4096 ids


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_bfloat16_weights_cost_half_a_percent_at_a_divergence_of_a_fiftieth(way, beta):
    models = close_models(0.02, torch.bfloat16)
    loss, *want = exact(*models, beta)
    if beta != 0.5:
        assert 0.01 < loss < 0.04
    call, options = WAYS[way]
    got = gradients(call, *models, beta=beta, **options)
    assert max(error(g, w) for g, w in zip(got, want, strict=True)) < 5e-3
    # What a caller who asks for it loses: the tolerance above tells the two apart.
    rounded = gradients(call, *models, beta=beta, logits_dtype=torch.bfloat16, **options)
    assert min(error(g, w) for g, w in zip(rounded, want, strict=True)) > 5e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", [1.0, 1e-3])
def test_errors_are_those_of_plain_pytorch_on_float32_logits(dtype, divergence):
    models = close_models(divergence, dtype, seed=1)
    _, *want = exact(*models, 0.0)
    leaves = [t.detach().clone().float().requires_grad_() for t in models[:2]]
    ls = torch.log_softmax(leaves[0] @ leaves[1].t(), -1)
    lt = torch.log_softmax(models[2].float() @ models[3].float().t(), -1)
    (lt.exp() * (lt - ls)).sum(-1).mean().backward()
    plain = [leaf.grad.to(dtype) for leaf in leaves]
    for call, options in WAYS.values():
        for got, theirs, truth in zip(gradients(call, *models, **options), plain, want, strict=True):
            assert error(got, truth) <= 1.2 * error(theirs, truth) + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("way", WAYS)
def test_the_chunk_size_changes_nothing_but_rounding(way):
    models = close_models(0.3, torch.float32)
    call, options = WAYS[way]
    whole = gradients(call, *models, beta=0.3, **options)
    sizes = (20, 32, 50) if way != "min" else (100, 500, 1024)
    for chunk in sizes:
        for a, b in zip(gradients(call, *models, beta=0.3, chunk_size=chunk, **options), whole, strict=True):
            assert error(a, b) < 1e-6, chunk
    # For a handful of rows the BLAS library has other kernels, which round the logits in another order.
    _, *truth = exact(*models, 0.3)
    for chunk in (1, 7):
        found = gradients(call, *models, beta=0.3, chunk_size=chunk, **options)
        for a, b, exactly in zip(found, whole, truth, strict=True):
            assert error(a, exactly) < 2 * error(b, exactly), chunk


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("threads", [1, 2])
def test_equal_calls_give_equal_bits(way, threads):
    models, others = close_models(0.3, torch.float32), close_models(0.3, torch.float32, seed=5)
    call, options = WAYS[way]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first = gradients(call, *models, beta=0.3, chunk_size=CHUNKS[way], **options)
        gradients(call, *others, beta=0.3, chunk_size=CHUNKS[way], **options)
        again = gradients(call, *models, beta=0.3, chunk_size=CHUNKS[way], **options)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_head_that_serves_both_is_the_same_as_two():
    """Stacked hidden states, one product; scale, bias and softcap stay each side's own."""
    h_s, w, _, _ = close_models(0.3, torch.bfloat16)
    h_t = h_s + 0.1 * torch.randn(h_s.shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    bias = torch.randn(V, generator=torch.Generator().manual_seed(4)).bfloat16()
    options = {"beta": 0.3, "teacher_bias": bias, "student_scale": 0.5, "teacher_softcap": 9.0}
    for way, (call, more) in WAYS.items():
        more = {**options, **more, "chunk_size": CHUNKS[way]}
        together = gradients(call, h_s, w, h_t, w, **more)
        leaves = [h_s.clone().requires_grad_(), w.clone().requires_grad_()]
        out = call(leaves[0], leaves[1], h_t, leaves[1], **more)  # the very same tensor, as with a tied or frozen head
        (out.divergence.mean() if out.loss is None else out.loss).backward()
        for a, leaf in zip(together, leaves, strict=True):
            assert error(leaf.grad, a) < 2e-3  # roundings of bfloat16 may fall to the other side
