"""Accelerators mask rows of weight 0 instead of dropping them (no sync). The same results, run here on the CPU."""

from __future__ import annotations

import math

import pytest
import torch

from caop_fast import (
    distillation_loss,
    linear_confidence_loss,
    linear_distillation_loss,
    linear_distillation_rows,
    linear_token_statistics,
    linear_topk_distillation_loss,
)
from caop_fast.losses.backends.masked_rows import UnmaskedRows

LINEAR = ("balanced", "min", "rows", "tokens", "topk", "confidence")


def run(name, bad):
    g = torch.Generator().manual_seed(0)
    weights = torch.tensor([1.0, 0, 2, 0, 1])
    rows = torch.randn(5, 8, generator=g)
    other, head = torch.randn(5, 8, generator=g), torch.randn(20, 8, generator=g)
    rows[weights == 0] = other[weights == 0] = bad  # both sides
    leaves = [rows.requires_grad_(), head.requires_grad_()]
    flows = torch.randn(3, 5, generator=g)
    if name == "logits":
        out = distillation_loss(leaves[0], other, weights=weights, beta=0.4)
        total = out.loss
    elif name in ("balanced", "min"):
        out = linear_distillation_loss(*leaves, other, head, weights=weights, beta=0.4, memory=name, chunk_size=2)
        total = out.loss
    elif name == "rows":
        out = linear_distillation_rows(*leaves, other, head, weights=weights, beta=1.0)
        total = (out.divergence * flows[0] + out.student_entropy * flows[1]).sum()
    elif name == "tokens":
        out = linear_token_statistics(*leaves, torch.arange(5), weights=weights)
        total = (out.logprob * flows[0] + out.entropy * flows[1] + out.lse * flows[2]).sum()
    elif name == "topk":
        listed = torch.arange(3).expand(5, 3)
        out = linear_topk_distillation_loss(*leaves, listed, torch.full((5, 3), -2.0), weights=weights, chunk_size=2)
        total = out.loss
    else:
        out = linear_confidence_loss(*leaves, [1, 2], [0.0, 1.0], torch.full((5,), 0.4), weights=weights, chunk_size=2)
        total = out.loss + (out.expected * flows[0]).sum()
    total.backward()
    assert (rows.grad[weights == 0] == 0).all()
    assert (head.grad is not None) == (name in LINEAR)  # grad_weight is where a row left unmasked would end up
    return [t.detach() for t in (*out, rows.grad, head.grad) if t is not None]


@pytest.mark.parametrize("name", ["logits", *LINEAR])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_masking_equals_dropping(monkeypatch, name, bad):
    dropped = run(name, bad)
    calls = []

    def mask(weights, n_rows):
        calls.append(weights)
        return UnmaskedRows(n_rows, None, None if weights is None else weights == 0)

    monkeypatch.setattr(UnmaskedRows, "of", staticmethod(mask))
    masked = run(name, bad)
    assert calls, "the rows were not masked: nothing was compared"
    for a, b in zip(masked, dropped, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
