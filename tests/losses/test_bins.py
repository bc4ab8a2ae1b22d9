"""calibration_bins and soft_ece in plain PyTorch, against the metrics package and the written definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from caop_fast.calibration import calibration_metrics
from caop_fast.calibration.counts import bin_index
from caop_fast.losses import bins
from caop_fast.losses.batches import SoftBatch
from caop_fast.losses.bins import calibration_bins, soft_ece
from caop_fast.losses.options import ExecutionConfig
from helpers.opcheck import opcheck


def answers(n=500, seed=0):
    g = torch.Generator().manual_seed(seed)
    c = (torch.rand(n, generator=g, dtype=torch.float64) * 20).round() / 20
    return c, (torch.rand(n, generator=g) < 0.6).double()


@pytest.mark.parametrize("edges", ["official", "exact"])
@pytest.mark.parametrize("n_bins", [1, 10, 15])
def test_gives_the_ece_of_the_metrics(edges, n_bins):
    c, y = answers()
    c[5] = math.nan
    found = calibration_bins(c, y, n_bins=n_bins, edges=edges)
    ece = (found.confidence_sum - found.correct_sum).abs().sum() / found.count.sum()
    want = calibration_metrics(y.tolist(), c.tolist(), n_bins=n_bins, edges=edges)
    assert ece.item() == pytest.approx(want["ece"], abs=1e-12)
    assert found.count.sum() == 499


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("edges", ["official", "exact"])
def test_the_exact_value_decides(dtype, edges):
    c = (torch.arange(101, dtype=torch.float64) / 100).to(dtype)
    found = calibration_bins(c, torch.ones(101, dtype=torch.bool), edges=edges)
    want = np.bincount(bin_index(c.double().numpy(), 10, edges), minlength=10)
    assert found.count.tolist() == want.tolist()
    assert found.count.dtype == torch.int64
    assert found.confidence_sum.dtype == found.correct_sum.dtype == torch.float64
    assert found.correct_sum.tolist() == want.tolist()
    if dtype == torch.float64:  # 0.3, 0.6 and 0.7 fall one bin low with the official edges
        on = calibration_bins(torch.tensor([0.3, 0.6, 0.7, 1.0], dtype=dtype), torch.ones(4), edges=edges)
        low = edges == "official"
        assert on.count.nonzero().view(-1).tolist() == ([2, 5, 6, 9] if low else [3, 6, 7, 9])


def test_rows_left_out_and_shapes():
    c = torch.tensor([[0.5, math.nan], [-0.1, 0.25]])
    y = torch.tensor([[1, 0], [1, 0]])
    with pytest.raises(ValueError, match=r"confidence.*-0\.1"):
        calibration_bins(c, y)
    found = calibration_bins(c.requires_grad_(), y, n_bins=4, validate=False)
    assert found.count.tolist() == [0, 1, 1, 0]
    assert not found.confidence_sum.requires_grad
    empty = calibration_bins(torch.zeros(0), torch.zeros(0))
    assert empty.count.tolist() == [0] * 10


def definition(c, y, w, n_bins, temperature):
    """S_b, A_b and C_b as the paper writes them."""
    centres = torch.tensor([(b + 0.5) / n_bins for b in range(n_bins)], dtype=torch.float64)
    g = torch.exp(-((c[:, None] - centres) ** 2) / temperature)
    u = g / g.sum(-1, keepdim=True) * w[:, None]
    size = u.sum(0)
    accuracy, confidence = (u * y[:, None]).sum(0) / size, (u * c[:, None]).sum(0) / size
    return (size / w.sum() * (accuracy - confidence).abs()).sum()


@pytest.mark.parametrize(("n_bins", "temperature"), [(1, 0.1), (10, 0.01), (15, 0.2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_soft_ece_is_its_definition(n_bins, temperature, dtype):
    c, y = answers(60)
    c, w = c.to(dtype), torch.linspace(0.2, 2, 60)
    leaf, exact = c.clone().requires_grad_(), c.double().requires_grad_()
    value = soft_ece(leaf, y, n_bins=n_bins, temperature=temperature, weights=w)
    want = definition(exact, y, w.double(), n_bins, temperature)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert abs(value.item() - want.item()) < 2e-6
    (value * 1.7).backward()
    (want * 1.7).backward()
    slack = 2e-5 * exact.grad.abs().max()
    assert ((leaf.grad.double() - exact.grad).abs() <= torch.finfo(dtype).eps * exact.grad.abs() + slack).all()


def test_gradcheck():
    c, y = answers(20)
    c = c.clamp(0.02, 0.97) + 0.003
    w = torch.linspace(0, 2, 20, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: soft_ece(x, y, n_bins=7, temperature=0.03, weights=w), (c.requires_grad_(),)
    )


def test_becomes_the_ece_as_the_temperature_falls():
    g = torch.Generator().manual_seed(3)
    c = (torch.randint(0, 10, (200,), generator=g) + 0.5).double() / 10 + 0.01
    y = (torch.rand(200, generator=g) < c).double()
    want = calibration_metrics(y.tolist(), c.tolist())["ece"]
    assert soft_ece(c, y, temperature=1e-5).item() == pytest.approx(want, abs=1e-9)


def test_rows_that_do_not_count():
    c, y = answers(10)
    w = torch.ones(10)
    w[0] = 0
    want = soft_ece(c[2:], y[2:])
    c[0], y[0], c[1] = 7.0, math.nan, math.nan
    leaf = c.requires_grad_()
    got = soft_ece(leaf, y, weights=w)
    torch.testing.assert_close(got, want)
    got.backward()
    assert leaf.grad[:2].tolist() == [0, 0]
    assert leaf.grad[2:].isfinite().all()
    zero = soft_ece(leaf, y, weights=torch.zeros(10))
    zero.backward()
    assert zero == 0
    balanced = torch.tensor([0.5, 0.5], requires_grad=True)
    soft_ece(balanced, torch.tensor([1.0, 0.0]), n_bins=1).backward()
    assert balanced.grad.tolist() == [0, 0]


def test_blocks_of_rows_change_nothing(monkeypatch):
    c, y = answers(300)
    leaf = c.clone().requires_grad_()
    whole = soft_ece(leaf, y)
    whole.backward()
    monkeypatch.setattr("caop_fast.losses.backends.row_blocks.CPU_BLOCK_ELEMENTS", 70)
    parts = c.clone().requires_grad_()
    value = soft_ece(parts, y)
    value.backward()
    torch.testing.assert_close(value, whole)
    torch.testing.assert_close(parts.grad, leaf.grad)
    assert calibration_bins(c, y).count.sum() == 300


def test_differentiable_once_and_opcheck():
    c, y = answers(12)
    leaf = c.clamp(0.1, 0.9).requires_grad_()
    (gradient,) = torch.autograd.grad(soft_ece(leaf, y), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.sum().backward()
    execution = ExecutionConfig("torch", validate=True)
    batch = SoftBatch(leaf, y, torch.ones(12, dtype=torch.float64), 5, 0.02)
    opcheck(bins._soft_ece, bins.SoftInputs(batch, execution))
    opcheck(bins._calibration_bins, bins.BinInputs(c, y, 5, "exact", execution))


def test_compiles_as_one_graph():
    c, y = answers(30)

    def both(x, y):
        return soft_ece(x, y, n_bins=5), calibration_bins(x, y).count

    eager, compiled = c.clone().requires_grad_(), c.clone().requires_grad_()
    want, counts = both(eager, y)
    got, compiled_counts = torch.compile(both, backend="aot_eager", fullgraph=True)(compiled, y)
    want.backward()
    got.backward()
    assert torch.equal(counts, compiled_counts)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(compiled.grad, eager.grad)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"confidence": [0.5]}, TypeError, "confidence"),
        ({"confidence": torch.ones(2, dtype=torch.int64)}, TypeError, "confidence"),
        ({"confidence": torch.tensor([0.5, 1.5])}, ValueError, "confidence.*1.5"),
        ({"correct": None}, TypeError, "correct"),
        ({"correct": torch.ones(3)}, ValueError, "correct.*shape"),
        ({"correct": torch.tensor([0.5, math.nan])}, ValueError, "correct.*nan"),
        ({"n_bins": 0}, ValueError, "n_bins"),
        ({"n_bins": 1025}, ValueError, "n_bins"),
        ({"n_bins": 10.0}, TypeError, "n_bins"),
        ({"n_bins": True}, TypeError, "n_bins"),
        ({"backend": "numpy"}, ValueError, "backend"),
        ({"validate": "yes"}, TypeError, "validate"),
    ],
)
@pytest.mark.parametrize("function", [calibration_bins, soft_ece])
def test_bad_input(function, change, error, words):
    arguments = {"confidence": torch.tensor([0.5, 0.5]), "correct": torch.tensor([1.0, 0.0])}
    with pytest.raises(error, match=words):
        function(**{**arguments, **change})


@pytest.mark.parametrize(
    ("function", "change", "error", "words"),
    [
        (calibration_bins, {"edges": "quantile"}, ValueError, "edges.*'exact'"),
        (soft_ece, {"temperature": 0.0}, ValueError, "temperature"),
        (soft_ece, {"weights": torch.tensor([1.0, -1])}, ValueError, "weights"),
        (soft_ece, {"weights": torch.ones(3)}, ValueError, "weights.*shape"),
    ],
)
def test_bad_options(function, change, error, words):
    with pytest.raises(error, match=words):
        function(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0]), **change)
