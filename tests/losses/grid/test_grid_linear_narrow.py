"""GEMMs of bfloat16 operands with float32 results, which CUDA has and a CPU lacks: played here by products that widen.

What surrounds them is then what runs on a GPU: gradients of float32 logits written as the GEMMs take them, masks in
place of dropped rows, nothing read back to the host.
"""

from __future__ import annotations

import pytest
import torch
from test_grid_linear import AXES, BASE, complaints
from test_grid_operators import reads
from torch import Tensor

from caop_fast import (
    linear_confidence_loss,
    linear_distillation_loss,
    linear_distillation_rows,
    linear_token_statistics,
    linear_topk_distillation_loss,
)
from caop_fast.losses.backends.masked_rows import UnmaskedRows
from caop_fast.losses.linear import chunking
from helpers.mixed_products import play, several_products

COPIES = {"aten::copy_": 1, "aten::clone": 0, "aten::empty_like": 0}  # and where what they read, or take after, stands


@pytest.fixture(params=["once", "summed"])
def mixed_products(request, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.dtype]]:
    """(product, dtype of its operands) of every mixed product that is asked for.

    "once": the gradients of all tokens' logits go into one product, which rounds grad_weight itself. "summed": those of
    4 or 5 tokens at a time, in a sum that is rounded at the end, and no product adds to another. Logits are held for 3.
    """
    once = request.param == "once"
    several_products(monkeypatch, logits=3, gradient_bytes=None if once else 2 * 5 * 33)
    return play(monkeypatch, addmm=once, rounds=once)


@pytest.fixture
def masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of weight 0 stay, as on accelerators."""

    def of(weights: Tensor | None, n_rows: int) -> UnmaskedRows:
        return UnmaskedRows(n_rows, None, None if weights is None else weights == 0)

    monkeypatch.setattr(UnmaskedRows, "of", staticmethod(of))


@pytest.mark.usefixtures("masked")
@pytest.mark.parametrize("way", AXES["way"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("heads", ["two", "shared", "sizes"])
def test_narrow_operands(place, way, dtype, heads, mixed_products):
    if place.device.type != "cpu":
        pytest.skip("a GPU has the products themselves: test_grid_linear.py runs on it")
    chunk = None if way == "balanced" else 3  # None: as the fixture has it
    assert not complaints({**BASE, "way": way, "dtype": dtype, "heads": heads, "chunk": chunk}, 7, place, narrow=True)
    assert mixed_products
    assert {operand for _, operand in mixed_products} == {torch.bfloat16 if dtype == "bf16" else torch.float16}


def calls(place) -> dict:
    g = torch.Generator().manual_seed(0)
    h_s, w_s, h_t, w_t = (torch.randn(*s, generator=g).bfloat16() for s in ((5, 8), (33, 8), (5, 6), (33, 6)))
    leaves = [h_s.to(place.device).requires_grad_(), w_s.to(place.device).requires_grad_()]
    teacher = [h_t.to(place.device), w_t.to(place.device)]
    weights = torch.tensor([1.0, 0, 2, 0.5, 1], device=place.device)
    labels = torch.arange(5, device=place.device)
    listed = (teacher[0].float() @ teacher[1].float().t()).log_softmax(-1).topk(3)
    ids, values = torch.tensor([1, 5], device=place.device), torch.tensor([0.0, 1.0], device=place.device)
    target = torch.full((5,), 0.4, device=place.device)
    options = {"weights": weights, "backend": place.backend}

    def rows(validate: bool) -> Tensor:
        out = linear_distillation_rows(*leaves, *teacher, labels, beta=0.3, validate=validate, **options)
        return out.divergence.sum() + out.student_logprob.sum()

    def low_memory(validate: bool) -> Tensor:
        return linear_distillation_loss(
            *leaves, *teacher, memory="min", chunk_size=2, validate=validate, **options
        ).loss

    return {
        "balanced": lambda v: linear_distillation_loss(*leaves, *teacher, labels, validate=v, **options).loss,
        "min": low_memory,
        "rows": rows,
        "topk": lambda v: linear_topk_distillation_loss(*leaves, listed[1], listed[0], validate=v, **options).loss,
        "tokens": lambda v: linear_token_statistics(*leaves, labels, validate=v, **options).logprob.sum(),
        "confidence": lambda v: linear_confidence_loss(*leaves, ids, values, target, validate=v, **options).loss,
    }


@pytest.mark.usefixtures("masked")
@pytest.mark.parametrize("name", ["balanced", "min", "rows", "topk", "tokens", "confidence"])
def test_the_host_reads_nothing_back(place, name, mixed_products):
    if place.backend == "torch" and place.device.type == "cpu":
        pytest.skip("on the CPU the PyTorch path looks at values on purpose: there they cost nothing")
    call = calls(place)[name]
    assert not reads(lambda: call(False).backward())
    assert reads(lambda: call(True))["aten::_local_scalar_dense"] >= 1  # checks of values do read


@pytest.mark.usefixtures("masked")
@pytest.mark.parametrize("name", ["balanced", "min", "rows", "topk", "tokens", "confidence"])
def test_gradients_of_logits_arrive_as_the_products_take_them(place, name, mixed_products, monkeypatch):
    """Written once in the dtype of the operands, in rows that keep their padding: 33 columns, 48 apart."""
    if place.device.type != "cpu":
        pytest.skip("the buffers are looked at on a CPU")
    seen = []
    product = chunking.hidden_gradient

    def watch(gradient: Tensor, *args, **options) -> None:
        seen.append((gradient.dtype, gradient.stride()))
        product(gradient, *args, **options)

    monkeypatch.setattr(chunking, "hidden_gradient", watch)
    calls(place)[name](False).backward()
    assert set(seen) == {(torch.bfloat16, (16 if name == "min" else 48, 1))}  # "min" takes 2 ids at a time here


@pytest.mark.usefixtures("masked", "mixed_products")
@pytest.mark.parametrize("name", ["balanced", "rows", "topk", "tokens", "confidence"])
def test_no_gradient_of_logits_is_made_in_float32(place, name):
    """The only float32 tensor of rows of 33 columns is the buffer of the logits, made flat."""
    if place.device.type != "cpu" or place.backend != "triton":
        pytest.skip("PyTorch's operations make tensors of a block of rows as they go")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        calls(place)[name](False).backward()
    found = set()
    for event in profile.profiler.kineto_results.events():
        if event.name() in COPIES:
            index = COPIES[event.name()]
            found.add((event.dtypes()[index], tuple(event.shapes()[index])[1:]))
    assert ("float", (33,)) not in found
    assert ("float", (8,)) in found, "no other copy of a float32 tensor was seen either"


@pytest.mark.usefixtures("masked", "mixed_products")
@pytest.mark.parametrize("flow", [torch.inf, torch.nan, 1e8])
def test_upstream_gradients_of_masked_float16_rows_do_no_harm(place, flow):
    if place.device.type != "cpu":
        pytest.skip("a GPU has the products themselves")
    g = torch.Generator().manual_seed(0)
    h_s, w_s, h_t, w_t = (torch.randn(*s, generator=g).half() for s in ((5, 8), (33, 8), (5, 6), (33, 6)))
    weights = torch.tensor([1.0, 0, 1, 1, 1])
    found = []
    for dead in (0.0, flow):
        leaves = [h_s.clone().requires_grad_(), w_s.clone().requires_grad_()]
        out = linear_distillation_rows(*leaves, h_t, w_t, weights=weights, backend=place.backend)
        out.divergence.backward(torch.tensor([1e-4, dead, -1e-4, 2e-4, 1e-4]))
        found.append([leaf.grad for leaf in leaves])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
        assert a.abs().max() > 0


@pytest.mark.usefixtures("mixed_products")
def test_small_probabilities_keep_their_digits_in_float16(place):
    """At V = 32000 most p_s - p_t lie below 6e-5, where float16 runs out of bits."""
    if place.device.type != "cpu" or place.backend != "torch":
        pytest.skip("the products are the same for both backends")
    g = torch.Generator().manual_seed(0)
    h = torch.randn(16, 32, generator=g).half()
    w = (torch.randn(32000, 32, generator=g) / 32**0.5).half()
    other = (w + 0.2 / 32**0.5 * torch.randn(32000, 32, generator=g)).half()
    for memory in ("balanced", "min"):
        errors = []
        for dtype in (torch.float16, torch.float64):
            leaf = h.detach().clone().to(dtype).requires_grad_()
            linear_distillation_loss(leaf, w.to(dtype), h.to(dtype), other.to(dtype), memory=memory).loss.backward()
            errors.append(leaf.grad.double())
        assert (errors[0] - errors[1]).norm() < 1e-3 * errors[1].norm(), memory
