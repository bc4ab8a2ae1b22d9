"""Accelerators mask rows of weight 0 instead of dropping them (no sync). The same results, run here on the CPU."""

from __future__ import annotations

import math

import pytest
import torch

from caop_fast import distillation_loss, linear_distillation_loss
from caop_fast.losses import linear
from caop_fast.losses import rows as blocks


def run(name, bad):
    g = torch.Generator().manual_seed(0)
    weights = torch.tensor([1.0, 0, 2, 0, 1])
    rows = torch.randn(5, 8, generator=g)
    other, head = torch.randn(5, 8, generator=g), torch.randn(20, 8, generator=g)
    rows[weights == 0] = other[weights == 0] = bad  # both sides
    leaves = [rows.requires_grad_(), head.requires_grad_()]
    if name == "logits":
        out = distillation_loss(leaves[0], other, weights=weights, beta=0.4)
    else:
        out = linear_distillation_loss(leaves[0], leaves[1], other, head, weights=weights, beta=1.0)
    out.loss.backward()
    assert (rows.grad[weights == 0] == 0).all()
    assert (head.grad is not None) == (name == "linear")  # d_weight is where a row left unmasked would end up
    return [t.detach() for t in (*out, rows.grad, head.grad) if t is not None]


@pytest.mark.parametrize("name", ["logits", "linear"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_masking_equals_dropping(monkeypatch, name, bad):
    dropped = run(name, bad)
    calls = []
    for module in (blocks, linear):
        monkeypatch.setattr(module, "live_rows", lambda w: calls.append(w) or (None, w == 0))
    masked = run(name, bad)
    assert calls, "the rows were not masked: nothing was compared"
    for a, b in zip(masked, dropped, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
