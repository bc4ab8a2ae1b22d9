"""linear_distillation_loss against float64 truth through plain autograd, and what it promises about memory."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from benchmarks.measure import allocations
from caop_fast import distillation_loss, linear_distillation_loss
from caop_fast.losses.linear import lm_head
from helpers.oracle import pairwise, statistics, weighted_mean

NAMES = ("divergence", "student_logprob", "teacher_logprob", "student_entropy", "teacher_entropy")
GRID = pairwise(
    dtype=[torch.float32, torch.bfloat16, torch.float16, torch.float64],
    beta=[0.0, 0.3, 1.0, "tensor"],
    temperature=[0.7, 1.0, 2.0],
    softcap=[None, 6.0],
    weights=[None, "zeros", "labels"],
    vocab=[8, 1031],
    scale=[1.0, 0.5],
    bias=[False, True],
    chunk=[None, 3],
    reduction=["mean", "sum"],
)


def make(n, vocab, dtype=torch.float32, h_s=24, h_t=16, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    labels = torch.randint(0, vocab, (n,), generator=g)
    return normal(n, h_s), normal(vocab, h_s) * 0.5, normal(n, h_t), normal(vocab, h_t) * 0.5, labels, normal(vocab)


@pytest.mark.parametrize("case", GRID, ids=lambda c: "-".join(str(v).replace("torch.", "") for v in c.values()))
def test_grid_matches_float64(case):
    n, dtype = 7, case["dtype"]
    h_s, w_s, h_t, w_t, labels, bias = make(n, case["vocab"], dtype)
    beta = torch.tensor([0.0, 1, 1, 0, 1, 0, 0]) if case["beta"] == "tensor" else case["beta"]
    weights = None
    if case["weights"] == "zeros":
        weights = torch.tensor([1.0, 0, 0.5, 2, 0, 1, 1])
    if case["weights"] == "labels":
        labels[2] = -100
    options = {"beta": beta, "temperature": case["temperature"], "student_softcap": case["softcap"]}
    leaves = [h_s.requires_grad_(), w_s.requires_grad_(), bias.requires_grad_()]
    out = linear_distillation_loss(
        h_s, w_s, h_t, w_t, labels, student_bias=bias if case["bias"] else None, student_scale=case["scale"],
        weights=weights, chunk_size=case["chunk"], reduction=case["reduction"], **options,
    )  # fmt: skip
    truth_leaves = [t.detach().double().requires_grad_() for t in leaves]
    raw = truth_leaves[0] @ truth_leaves[1].t() + (truth_leaves[2] if case["bias"] else 0)
    truth = statistics(raw * case["scale"], h_t.double() @ w_t.double().t(), labels, **options)
    live = torch.ones(n)
    if case["weights"]:
        live = weights if weights is not None else (labels != -100).double()
    loss = weighted_mean(truth[0], live) * (live.sum() if case["reduction"] == "sum" else 1)
    tolerance = 1e-11 if dtype == torch.float64 else 5e-5
    torch.testing.assert_close(out.loss.detach().double(), loss.detach(), rtol=tolerance, atol=tolerance)
    for name, want in zip(NAMES, truth, strict=True):
        got = getattr(out, name)
        assert not got.requires_grad
        want = torch.where(live > 0, want.detach(), 0.0)
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance, msg=name)
    (out.loss * -1.7).backward()  # an upstream gradient that is not 1
    (loss * -1.7).backward()
    rounding = {torch.float64: 1e-10, torch.float32: 5e-5}.get(dtype, torch.finfo(dtype).eps)
    for got, want in zip(leaves, truth_leaves, strict=True):
        if want.grad is None:
            assert got.grad is None
            continue
        assert got.grad.dtype == dtype
        error = (got.grad.double() - want.grad).abs()
        floor = 6e-8 if dtype == torch.float16 else 0  # half of float16's smallest number
        assert (error <= rounding * (want.grad.abs() + 0.02 * want.grad.abs().max()) + floor).all()
    assert (h_s.grad[live == 0] == 0).all()


@pytest.mark.parametrize("needs", ["h", "w", "b", "hw", "hb", "wb", "hwb"])
def test_gradcheck_any_subset(needs):
    h_s, w_s, h_t, w_t, labels, bias = make(5, 11, torch.float64, 4, 3)
    inputs = [t.requires_grad_(k in needs) for k, t in zip("hwb", (h_s, w_s, bias), strict=True)]

    def f(h, w, b):
        return linear_distillation_loss(
            h, w, h_t, w_t, labels, student_bias=b, beta=0.4, chunk_size=2, student_softcap=5.0, vocab_size=9,
            weights=torch.tensor([1.0, 0, 2, 1, 1]), student_scale=0.7, temperature=1.3,
        ).loss  # fmt: skip

    labels.clamp_(max=8)
    assert torch.autograd.gradcheck(f, inputs)


def test_agrees_with_the_logits_level_and_keeps_shapes():
    h_s, w_s, h_t, w_t, labels, _ = make(12, 50)
    flat = distillation_loss(h_s @ w_s.t(), h_t @ w_t.t(), labels)
    out = linear_distillation_loss(
        h_s.view(3, 4, -1), w_s, h_t.view(3, 4, -1), w_t, labels.view(3, 4), beta=torch.zeros(3, 4)
    )
    for name in NAMES:
        assert getattr(out, name).shape == (3, 4)
        torch.testing.assert_close(getattr(out, name).flatten(), getattr(flat, name), rtol=1e-5, atol=1e-5)


def test_shared_head_gets_the_students_gradient_only():
    h_s, w, _, _, labels, _ = make(6, 40)
    h_t = torch.randn(6, 24)
    w.requires_grad_()
    h_t.requires_grad_()
    linear_distillation_loss(h_s, w, h_t, w, labels, beta=1.0).loss.backward()
    shared = w.grad
    w.grad = None
    linear_distillation_loss(h_s, w, h_t, w.detach().clone(), labels, beta=1.0).loss.backward()
    torch.testing.assert_close(shared, w.grad, rtol=1e-5, atol=1e-7)  # one product of stacked rows, or two
    assert h_t.grad is None


def test_rows_of_weight_zero_are_never_touched():
    h_s, w_s, h_t, w_t, labels, _ = make(8, 30)
    keep = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1]).bool()
    weights = torch.rand(8).clamp(min=0.1) * keep

    def run(h, h2, y, w):
        leaf, head = h.clone().requires_grad_(), w_s.clone().requires_grad_()
        out = linear_distillation_loss(leaf, head, h2, w_t, y, weights=w, beta=0.5)
        out.loss.backward()
        return out, leaf.grad, head.grad

    want, want_h, want_w = run(h_s[keep], h_t[keep], labels[keep], weights[keep])
    h_s[~keep], h_t[~keep] = math.nan, math.inf
    out, got_h, got_w = run(h_s, h_t, labels, weights)
    torch.testing.assert_close(out.loss, want.loss)
    torch.testing.assert_close(got_h[keep], want_h)
    assert (got_h[~keep] == 0).all()
    torch.testing.assert_close(got_w, want_w)
    for name in NAMES:
        assert torch.equal(getattr(out, name)[keep], getattr(want, name))
        assert (getattr(out, name)[~keep] == 0).all()


def test_no_gradients_no_work_and_retained_graph():
    h_s, w_s, h_t, w_t, labels, _ = make(8, 30)
    with torch.no_grad():
        assert not linear_distillation_loss(h_s.requires_grad_(), w_s, h_t, w_t).loss.requires_grad
    out = linear_distillation_loss(h_s, w_s.requires_grad_(), h_t, w_t, labels)
    out.loss.backward(retain_graph=True)
    first = h_s.grad.clone(), w_s.grad.clone()
    h_s.grad.zero_()  # what a user does to .grad must not reach the saved gradients
    w_s.grad.zero_()
    out.loss.backward()
    assert torch.equal(h_s.grad, first[0])
    assert torch.equal(w_s.grad, first[1])
    (g,) = torch.autograd.grad(linear_distillation_loss(h_s, w_s, h_t, w_t).loss, h_s, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        g.sum().backward()


@pytest.mark.parametrize("n", [0, 1])
def test_few_rows(n):
    h_s, w_s, h_t, w_t, labels, bias = make(n, 9)
    leaves = [t.requires_grad_() for t in (h_s, w_s, bias)]
    out = linear_distillation_loss(h_s, w_s, h_t, w_t, labels, student_bias=bias)
    out.loss.backward()
    assert out.loss.isfinite()
    assert all(t.grad.shape == t.shape and t.grad.isfinite().all() for t in leaves)
    all_dropped = linear_distillation_loss(h_s, w_s, h_t, w_t, weights=torch.zeros(n))
    assert all_dropped.loss == 0
    all_dropped.loss.backward()


def test_reduced_head_is_widened_in_blocks(monkeypatch):
    """bfloat16 operands, float32 logits: the same as float32 GEMMs on the rounded values, at any block size."""
    h_s, w_s, h_t, w_t, labels, _ = make(6, 200, torch.bfloat16)
    want = linear_distillation_loss(h_s.float(), w_s.float(), h_t.float(), w_t.float(), labels)
    monkeypatch.setattr(lm_head, "WIDEN_BYTES", 4 * 24 * 30)
    got = linear_distillation_loss(h_s, w_s, h_t, w_t, labels)
    torch.testing.assert_close(got.divergence, want.divergence, rtol=1e-5, atol=1e-6)
    rounded = linear_distillation_loss(h_s, w_s, h_t, w_t, labels, logits_dtype=torch.bfloat16)
    assert not torch.allclose(rounded.divergence, want.divergence, rtol=1e-5)  # the option does something
    torch.testing.assert_close(rounded.divergence, want.divergence, rtol=0.05, atol=0.05)
    rounded = linear_distillation_loss(h_s.requires_grad_(), w_s, h_t, w_t, logits_dtype=torch.bfloat16)
    rounded.loss.backward()
    assert h_s.grad.isfinite().all()


def test_float16_gradients_survive_small_weights():
    """Weights already divided by a token count would underflow float16 in the forward; the loss scale comes later."""
    h_s, w_s, h_t, w_t, _, _ = make(6, 20, torch.float16)
    h_s.requires_grad_()
    out = linear_distillation_loss(h_s, w_s, h_t, w_t, weights=torch.full((6,), 1e-7), reduction="sum")
    (out.loss * 2.0**20).backward()
    truth = h_s.detach().double().requires_grad_()
    d = statistics(truth @ w_s.double().t(), h_t.double() @ w_t.double().t())[0]
    (d.sum() * 1e-7 * 2.0**20).backward()
    torch.testing.assert_close(h_s.grad.double(), truth.grad, rtol=2e-3, atol=1e-5)


def test_autocast_rounds_the_operands_and_nothing_else():
    h_s, w_s, h_t, w_t, labels, _ = make(6, 40)
    h_s.requires_grad_()
    w_s.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_distillation_loss(h_s, w_s, h_t, w_t, labels)
    want = linear_distillation_loss(*(t.detach().bfloat16() for t in (h_s, w_s, h_t, w_t)), labels)
    assert out.divergence.dtype == torch.float32
    torch.testing.assert_close(out.divergence, want.divergence, rtol=1e-6, atol=1e-6)
    out.loss.backward()
    assert h_s.grad.dtype == w_s.grad.dtype == torch.float32
    # The same in eager float32 on operands rounded beforehand: the products of the gradient stay in float32 as well.
    rounded = [t.detach().bfloat16().float() for t in (h_s, w_s, h_t, w_t)]
    eager = [t.requires_grad_() for t in rounded[:2]]
    linear_distillation_loss(*rounded, labels).loss.backward()
    torch.testing.assert_close(h_s.grad, eager[0].grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(w_s.grad, eager[1].grad, rtol=1e-5, atol=1e-7)
    truth = [t.detach().double().requires_grad_() for t in rounded[:2]]
    teacher = rounded[2].double() @ rounded[3].double().t()
    statistics(truth[0] @ truth[1].t(), teacher, labels)[0].mean().backward()
    for leaf, want in zip((h_s, w_s), truth, strict=True):
        assert (leaf.grad.double() - want.grad).norm() < 1e-5 * want.grad.norm()
    mixed = linear_distillation_loss(h_s.detach().bfloat16(), w_s, h_t, w_t)  # no autocast: dtypes are promoted
    assert mixed.loss.isfinite()


@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_head_is_never_widened_as_a_whole(monkeypatch, hidden_dtype):
    vocab, hidden = 4096, 256
    monkeypatch.setattr(lm_head, "WIDEN_BYTES", 1 << 16)
    h_s, w_s, h_t, w_t, labels, _ = make(8, vocab, torch.bfloat16, hidden, hidden)
    h_s, h_t = h_s.to(hidden_dtype), h_t.to(hidden_dtype)
    h_s.requires_grad_()
    linear_distillation_loss(h_s, w_s, h_t, w_t, labels).loss.backward()  # allocations of the first use
    sizes = allocations(lambda: linear_distillation_loss(h_s, w_s, h_t, w_t, labels).loss.backward())
    assert max(itertools.accumulate(sizes)) < vocab * hidden * 4 / 2


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"reduction": "none"}, ValueError, "linear_distillation_rows"),
        ({"memory": "small"}, ValueError, "memory.*'balanced', 'min'"),
        ({"process_group": object()}, TypeError, "process_group"),
        ({"logits_dtype": torch.int64}, ValueError, "logits_dtype"),
        ({"logits_dtype": "bfloat16"}, TypeError, "logits_dtype"),
        ({"chunk_size": 0}, ValueError, "chunk_size"),
        ({"chunk_size": 2.5}, TypeError, "chunk_size"),
        ({"student_scale": math.nan}, ValueError, "student_scale"),
        ({"student_bias": torch.zeros(3)}, ValueError, "student_bias"),
        ({"student_weight": torch.zeros(30, 5)}, ValueError, "student_weight"),
        ({"teacher_weight": torch.zeros(31, 16)}, ValueError, "vocab_size=30"),
        ({"teacher_hidden": torch.zeros(9, 16)}, ValueError, "teacher_hidden"),
        (
            {"student_hidden": torch.zeros(8, 0), "student_weight": torch.zeros(30, 0)},
            ValueError,
            "student_hidden.*feat",
        ),
        (
            {"teacher_hidden": torch.zeros(8, 0), "teacher_weight": torch.zeros(30, 0)},
            ValueError,
            "teacher_hidden.*feat",
        ),
        ({"student_hidden": torch.zeros(8, 24, dtype=torch.int64)}, TypeError, "student_hidden"),
        ({"teacher_weight": torch.zeros(30, 16, device="meta")}, ValueError, "teacher_weight"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"labels": torch.full((8,), 30)}, ValueError, "labels"),
    ],
)
def test_bad_input(change, error, words):
    h_s, w_s, h_t, w_t, labels, _ = make(8, 30)
    arguments = {"student_hidden": h_s, "student_weight": w_s, "teacher_hidden": h_t, "teacher_weight": w_t}
    arguments["labels"] = labels
    with pytest.raises(error, match=words):
        linear_distillation_loss(**{**arguments, **change})
