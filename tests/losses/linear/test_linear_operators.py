"""The operators of the linear losses as PyTorch sees them: opcheck, torch.compile, autocast, autograd's ways."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from caop_fast import (
    linear_confidence_loss,
    linear_distillation_loss,
    linear_distillation_rows,
    linear_token_statistics,
    linear_topk_distillation_loss,
)
from caop_fast.losses.linear import chunking

N, V, H = 6, 33, 8
LABELS = torch.tensor([0, 32, -100, 5, 6, 7])
WEIGHTS = torch.tensor([1.0, 0, 0.5, 2, 1, 0])
BETA = torch.tensor([0.0, 1, 1, 0, 1, 0])


def make(seed: int = 0) -> list[Tensor]:
    """Student's hidden states, weight and bias; teacher's hidden states and weight."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((N, H), (V, H), (V,), (N, H + 2), (V, H + 2))
    return [torch.randn(*shape, generator=g) for shape in shapes]


TEACHER = make(7)[3:]
LISTED = (TEACHER[0] @ TEACHER[1].t()).log_softmax(-1).topk(4)


def balanced(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
    out = linear_distillation_loss(
        h, w, *TEACHER, LABELS, student_bias=b, weights=WEIGHTS, beta=0.3, chunk_size=4, student_softcap=5.0
    )
    return -1.5 * out.loss


def low_memory(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
    out = linear_distillation_loss(h, w, *TEACHER, LABELS, student_bias=b, beta=BETA, memory="min", vocab_size=33)
    return -1.5 * out.loss


def rows(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
    out = linear_distillation_rows(h, w, *TEACHER, LABELS, student_bias=b, weights=WEIGHTS, temperature=1.3)
    return (2 * out.divergence - out.student_logprob + 0.3 * out.student_entropy).sum()


def tokens(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
    out = linear_token_statistics(h, w, LABELS, bias=b, weights=WEIGHTS, scale=0.5)
    return (2 * out.logprob - out.lse + 0.3 * out.entropy).sum()


def topk(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
    labels = torch.where(LABELS < 0, LABELS, LISTED[1][:, 2])  # any other has a teacher_logprob of NaN
    out = linear_topk_distillation_loss(h, w, LISTED[1], LISTED[0], labels, student_bias=b, beta=0.4, chunk_size=4)
    return -1.5 * out.loss


def confidence(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
    ids, values = torch.tensor([1, 5, 9]), torch.tensor([0.0, 0.5, 1.0])
    out = linear_confidence_loss(h, w, ids, values, torch.linspace(0, 1, N), bias=b, weights=WEIGHTS, kind="brier")
    return 2 * out.loss + out.expected.sum() - out.outside_mass.sum()


CALLS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    f.__name__: f for f in (balanced, low_memory, rows, tokens, topk, confidence)
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing compiled before, and blocks of at most 12 ids where the logits are recomputed."""
    torch.compiler.reset()
    monkeypatch.setattr(chunking, "CPU_BLOCK_BYTES", 0)
    monkeypatch.setattr(chunking, "MIN_IDS", 12)


def results(call, dtype: torch.dtype = torch.float32, needs: str = "hwb", autocast: bool = False) -> list[Tensor]:
    """The value and the gradients of hidden states, weight and bias that ``needs`` names."""
    leaves = [t.to(dtype).requires_grad_(k in needs) for k, t in zip("hwb", make()[:3], strict=True)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = call(*leaves)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_fullgraph(name, dynamic):
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for needs in ("hwb", "h"):
        for got, want in zip(results(compiled, needs=needs), results(CALLS[name], needs=needs), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", CALLS)
def test_autocast_rounds_the_operands_and_nothing_else(name):
    """The same as on operands rounded beforehand, products and statistics in float32, also when compiled."""
    under = results(CALLS[name], autocast=True)
    g = [t.bfloat16().float() for t in make()[:2]]
    assert all(t.dtype == torch.float32 for t in under)

    def rounded(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return CALLS[name](h + (g[0] - h.detach()), w + (g[1] - w.detach()), b)

    if name in ("tokens", "topk", "confidence"):  # the teacher of the others is rounded, too
        for got, want in zip(under, results(rounded), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")
    for got, want in zip(results(compiled, autocast=True), under, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck_of_any_subset(name):
    """All three gradients against differences; those of each subset are the same."""
    leaves = [t.double().requires_grad_() for t in make()[:3]]
    assert torch.autograd.gradcheck(CALLS[name], leaves)
    value, *checked = results(CALLS[name], torch.float64)
    for needs in ("h", "w", "b", "hw", "hb", "wb"):
        wanted = [value, *(grad for k, grad in zip("hwb", checked, strict=True) if k in needs)]
        for got, want in zip(results(CALLS[name], torch.float64, needs), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", CALLS)
def test_once_and_again_but_no_further(name):
    leaves = [t.requires_grad_() for t in make()[:3]]
    value = CALLS[name](*leaves)
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    copies = [g.clone() for g in first]
    for gradient in first:  # what a caller does to a gradient must not reach the next one
        gradient.zero_()
    assert all(
        torch.equal(a, b) for a, b in zip(torch.autograd.grad(value, leaves, retain_graph=True), copies, strict=True)
    )
    for gradient in torch.autograd.grad(value, leaves, create_graph=True):
        with pytest.raises(RuntimeError, match="double backward"):
            gradient.sum().backward(retain_graph=True)
    with torch.no_grad():
        assert not CALLS[name](*leaves).requires_grad


@pytest.mark.parametrize("name", CALLS)
def test_tensors_that_are_not_contiguous(name):
    want = results(CALLS[name])

    def strided(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        wide = torch.stack([h, h], -1)[..., 1]
        assert not wide.is_contiguous()
        return CALLS[name](wide, w.t().contiguous().t(), torch.stack([b, b], -1)[..., 0])

    for got, exact in zip(results(strided), want, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name, monkeypatch):
    """Of whatever operators a call and its backward run, on the arguments they get."""
    seen: list[tuple] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "caop_fast" and "linear" in function.name():
                seen.append((function, args))
            return function(*args, **(kwargs or {}))

    leaves = [t.requires_grad_() for t in make()[:3]]
    with Watch():
        CALLS[name](*leaves).backward()
    assert len(seen) == (1 if name in ("balanced", "topk") else 2)
    for index, (function, args) in enumerate(seen):
        arguments = [a.detach().clone() if isinstance(a, Tensor) else a for a in args]
        if index == 0:
            arguments[:3] = [a.requires_grad_() for a in arguments[:3]]
        torch.library.opcheck(function, tuple(arguments))


def test_leading_axes_come_back():
    h, w, b, h_t, w_t = make()
    out = linear_distillation_rows(h.view(2, 3, H), w, h_t.view(2, 3, -1), w_t, LABELS.view(2, 3), student_bias=b)
    assert out.loss is None
    assert all(field.shape == (2, 3) for field in out[1:])
    assert linear_token_statistics(h.view(3, 2, H), w, LABELS.view(3, 2)).lse.shape == (3, 2)
    listed = [t.view(2, 3, 4) for t in LISTED]
    out = linear_topk_distillation_loss(h.view(2, 3, H), w, listed[1], listed[0])
    assert out.divergence.shape == (2, 3)
    assert out.student_logprob is None
    found = linear_confidence_loss(h.view(2, 3, H), w, [1, 2], [0.0, 1.0], torch.zeros(2, 3), reduction="none")
    assert found.loss.shape == found.variance.shape == (2, 3)


def test_float16_survives_small_upstream_gradients():
    """Weights divided by a token count underflow float16 long before the loss scale makes up for it."""
    h, w, b = (t.half() for t in make()[:3])
    teacher = [t.half() for t in TEACHER]
    for memory in ("balanced", "min"):
        leaves = [t.clone().requires_grad_() for t in (h, w, b)]
        out = linear_distillation_loss(
            leaves[0], leaves[1], *teacher, student_bias=leaves[2], weights=torch.full((N,), 1e-7), reduction="sum",
            memory=memory,
        )  # fmt: skip
        (out.loss * 2.0**20).backward()
        exact = [t.double().requires_grad_() for t in (h, w, b)]
        other = linear_distillation_loss(
            exact[0], exact[1], *(t.double() for t in teacher), student_bias=exact[2], reduction="sum"
        )
        (other.loss * 1e-7 * 2.0**20).backward()
        for got, want in zip(leaves, exact, strict=True):
            error = (got.grad.double() - want.grad).norm() / want.grad.norm()
            assert error < 2e-3, memory


@pytest.mark.parametrize("name", ["balanced", "topk"])
def test_gradients_of_the_forward_pass_keep_no_input(name):
    leaves = [t.requires_grad_() for t in make()[:3]]
    inputs = [t * 1 for t in leaves]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        CALLS[name](*inputs)
    storages = {t.untyped_storage().data_ptr() for t in kept if t.numel()}
    assert len(storages) >= 4  # three gradients and their factor
    assert not storages & {t.untyped_storage().data_ptr() for t in (*inputs, *TEACHER, *LISTED)}


@pytest.mark.parametrize("memory", ["balanced", "min"])
def test_shapes_without_values(memory):
    """On the meta device, as when a model is laid out before it is loaded."""
    leaves = [torch.empty(s, device="meta").requires_grad_() for s in ((N, H), (V, H))]
    teacher = [t.to("meta") for t in TEACHER]
    out = linear_distillation_loss(*leaves, *teacher, memory=memory, vocab_size=V - 1)
    out.loss.backward()
    assert out.divergence.shape == (N,)
    assert [leaf.grad.shape for leaf in leaves] == [(N, H), (V, H)]
