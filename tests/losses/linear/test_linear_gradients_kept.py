"""Gradients where GEMMs of bfloat16 and float16 sum in float32, as on CUDA: here a CPU plays them.

That all options and both backends are right there is held by ``grid/test_grid_linear_narrow.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from caop_fast import (
    VocabularyShards,
    linear_confidence_loss,
    linear_distillation_loss,
    linear_topk_distillation_loss,
)
from caop_fast.losses.linear import lm_head
from caop_fast.losses.linear.lm_head import LMHead
from helpers.mixed_products import play, several_products

V, H = 33, 8
MATMUL = torch.backends.cuda.matmul


def make(n: int, dtype: torch.dtype = torch.bfloat16) -> tuple[list[Tensor], list[Tensor]]:
    """The student's hidden states, weight and bias, the teacher's hidden states and weight."""
    g = torch.Generator().manual_seed(n)
    shapes = ((n, H), (V, H), (V,), (n, H), (V, H))
    made = [torch.randn(*shape, generator=g).to(dtype) for shape in shapes]
    return made[:3], made[3:]


def balanced(student: list[Tensor], teacher: list[Tensor], **options) -> Tensor:
    h, w, b = student
    return linear_distillation_loss(h, w, *teacher, student_bias=b, beta=0.3, student_scale=0.7, **options).loss


def topk(student: list[Tensor], teacher: list[Tensor], **options) -> Tensor:
    h, w, b = student
    listed = (teacher[0].float() @ teacher[1].float().t()).log_softmax(-1).topk(4)
    return linear_topk_distillation_loss(h, w, listed[1], listed[0], student_bias=b, **options).loss


def confidence(student: list[Tensor], teacher: list[Tensor], **options) -> Tensor:
    h, w, b = student
    target = torch.linspace(0, 1, h.shape[0])
    return linear_confidence_loss(h, w, [1, 5, 32], [0.0, 0.5, 1.0], target, bias=b, softcap=5.0, **options).loss


LOSSES: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (balanced, topk, confidence)}


def gradients(call: Callable[..., Tensor], tensors, needs: str = "hwb", flow: float = 1.0, **options) -> list[Tensor]:
    student, teacher = tensors
    leaves = [t.clone().requires_grad_(name in needs) for name, t in zip("hwb", student, strict=True)]
    (call(leaves, teacher, **options) * flow).backward()
    return [leaf.grad for leaf in leaves if leaf.requires_grad]


def exact(call: Callable[..., Tensor], tensors, flow: float = 1.0, **options) -> list[Tensor]:
    """In float64, which no mixed product is for."""
    wide = [[t.double() for t in part] for part in tensors]
    return gradients(call, wide, flow=flow, **options)


def assert_close(got: list[Tensor], want: list[Tensor], rounding: float) -> None:
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).abs().max() <= rounding * b.abs().max()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("n", [1, 4, 5, 17])
@pytest.mark.parametrize("addmm", [True, False])
def test_any_number_of_tokens_in_one_product_or_several(name, n, addmm, monkeypatch):
    tensors = make(n)
    want = exact(LOSSES[name], tensors)
    seen = play(monkeypatch, addmm=addmm)
    several_products(monkeypatch, logits=3, gradient_bytes=None)
    once = gradients(LOSSES[name], tensors)
    assert ("rounded mm", torch.bfloat16) in seen
    several_products(monkeypatch, logits=3, gradient_bytes=2 * 5 * V)
    seen.clear()
    summed = gradients(LOSSES[name], tensors)
    assert (("addmm", torch.bfloat16) in seen) == (addmm and n > 5)
    asked = gradients(LOSSES[name], tensors, chunk_size=4)  # for the gradient as well as for the logits
    for got in (once, summed, asked):
        assert all(t.dtype == torch.bfloat16 for t in got)
        assert_close(got, want, 2.0**-7)


@pytest.mark.parametrize("name", LOSSES)
def test_no_tokens(name, monkeypatch):
    play(monkeypatch)
    for got, like in zip(gradients(LOSSES[name], make(0)), make(0)[0], strict=True):
        assert got.dtype == like.dtype
        assert torch.equal(got, torch.zeros_like(like))


@pytest.mark.parametrize("name", LOSSES)
def test_any_subset_of_the_gradients(name, monkeypatch):
    play(monkeypatch)
    several_products(monkeypatch, logits=3, gradient_bytes=None)
    tensors = make(7)
    whole = dict(zip("hwb", gradients(LOSSES[name], tensors), strict=True))
    for needs in ("h", "w", "b", "hw", "hb", "wb"):
        for key, got in zip(needs, gradients(LOSSES[name], tensors, needs), strict=True):
            assert_close([got], [whole[key].double()], 2.0**-7)


@pytest.mark.parametrize("name", LOSSES)
def test_float16_below_a_loss_scale(name, monkeypatch):
    """Weights that underflow float16, scaled up by what comes after the loss, and sums beyond its range."""
    tensors = make(17, torch.float16)
    weights = torch.full((17,), 1e-7)
    weights[3] = 3e-4
    want = exact(LOSSES[name], tensors, 2.0**20, weights=weights, reduction="sum")
    seen = play(monkeypatch)
    assert_close(gradients(LOSSES[name], tensors, flow=2.0**20, weights=weights, reduction="sum"), want, 2.0**-9)
    assert ("rounded mm", torch.float16) not in seen


def test_an_upstream_gradient_is_not_rounded_to_bfloat16(monkeypatch):
    """A third rounded to 8 bits would be 0.2 % too large, everywhere. CUDA rounds factors to the dtype of a result."""
    tensors = make(64)
    want = exact(balanced, tensors, 1 / 3)
    play(monkeypatch)
    plain = torch.mul

    def mul(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        assert torch.result_type(a, b) == torch.float32
        return plain(a, b, out=out)

    monkeypatch.setattr(torch, "mul", mul)
    for got, right in zip(gradients(balanced, tensors, flow=1 / 3), want, strict=True):
        assert abs(float((got.double() * right).sum() / right.square().sum()) - 1) < 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_one_graph_with_its_gradients(name, monkeypatch):
    """The dtype in which grad_weight is kept is known to tracing."""
    play(monkeypatch)
    torch.compiler.reset()
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")
    for got, want in zip(gradients(compiled, make(7)), gradients(LOSSES[name], make(7)), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["topk", "confidence"])
def test_logits_gathered_over_ranks(name, monkeypatch, group):
    """Of one rank, whose columns are all of those that are gathered."""
    play(monkeypatch)
    several_products(monkeypatch, logits=3, gradient_bytes=None)
    tensors = make(7)
    want = gradients(LOSSES[name], tensors)
    assert_close(gradients(LOSSES[name], tensors, process_group=group), [t.double() for t in want], 0)


@pytest.fixture
def group() -> Iterator[VocabularyShards]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield VocabularyShards(dist.group.WORLD, V)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("rounds", [True, False])
def test_grad_weight_is_rounded_once(rounds, monkeypatch):
    """Whole, or in blocks where the GEMM could only return float32: the same bits."""
    g = torch.Generator().manual_seed(0)
    gradient = torch.randn(50, 400, generator=g).bfloat16()[:, :300]
    hidden = torch.randn(50, 16, generator=g).bfloat16()
    head = LMHead(torch.randn(300, 16, generator=g).bfloat16(), None, 1.0, torch.bfloat16)
    want = gradient.float().t() @ hidden.float()
    play(monkeypatch, rounds=rounds)
    monkeypatch.setattr(lm_head, "PASS_BYTES", 4 * 16 * 128)
    out = torch.full((300, 16), torch.nan, dtype=torch.bfloat16)
    lm_head.weight_gradient(gradient, hidden, head, out)
    assert torch.equal(out, want.bfloat16())
    total = torch.full((300, 16), torch.nan)
    for addmm in (True, False):
        monkeypatch.setattr(lm_head, "_has_addmm", lambda *_, has=addmm: has)
        lm_head.weight_gradient(gradient, hidden, head, total)
        lm_head.weight_gradient(gradient, hidden, head, total, add=True)
        torch.testing.assert_close(total, 2 * want, rtol=1e-6, atol=1e-5)


@pytest.fixture
def setting() -> Iterator[None]:
    before = MATMUL.allow_bf16_reduced_precision_reduction
    yield
    MATMUL.allow_bf16_reduced_precision_reduction = before


@pytest.mark.usefixtures("setting")
@pytest.mark.parametrize("allowed", [True, False])
def test_the_parts_of_a_split_sum_are_added_in_float32(allowed, monkeypatch):
    play(monkeypatch)
    MATMUL.allow_bf16_reduced_precision_reduction = allowed
    played, seen = torch.mm, []

    def mm(*args, **options) -> Tensor:
        if options.get("out") is not None and options["out"].dtype == torch.bfloat16:
            seen.append(MATMUL.allow_bf16_reduced_precision_reduction)
        return played(*args, **options)

    monkeypatch.setattr(torch, "mm", mm)
    gradients(balanced, make(5))
    assert seen == [False]
    assert MATMUL.allow_bf16_reduced_precision_reduction is allowed
    with pytest.raises(KeyError), lm_head._float32_sums():
        raise KeyError
    assert MATMUL.allow_bf16_reduced_precision_reduction is allowed


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("add", [False, True])
def test_grad_hidden_of_a_head_that_is_widened_in_blocks(logits_dtype, add, monkeypatch):
    """As on a CPU: whatever ``out`` holds is added to, or replaced."""
    monkeypatch.setattr(lm_head, "WIDEN_BYTES", 4 * 16 * 70)
    g = torch.Generator().manual_seed(0)
    head = LMHead(torch.randn(300, 16, generator=g).bfloat16(), None, 1.0, torch.bfloat16, logits_dtype)
    gradient = torch.randn(5, 300, generator=g).to(logits_dtype)
    out = torch.ones(5, 16) if add else torch.full((5, 16), torch.nan)
    lm_head.hidden_gradient(gradient, head, out, add=add)
    want = gradient.double() @ head.weight.double() + add
    assert (out - want).norm() <= 4 * torch.finfo(logits_dtype).eps * want.norm()  # sums of 300 terms
