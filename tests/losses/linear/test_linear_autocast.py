"""A backward under autocast: the products inside of the operators stay in the dtypes they were asked for."""

from __future__ import annotations

import pytest
import torch

from caop_fast import linear_distillation_loss, linear_token_statistics


def distill(hidden, weight, memory):
    g = torch.Generator().manual_seed(1)
    teacher = torch.randn(6, 16, generator=g), torch.randn(40, 16, generator=g)
    return linear_distillation_loss(hidden, weight, *teacher, beta=0.3, memory=memory).loss


CALLS = {
    "balanced": lambda h, w: distill(h, w, "balanced"),
    "min": lambda h, w: distill(h, w, "min"),
    "tokens": lambda h, w: linear_token_statistics(h, w, torch.arange(6)).entropy.sum(),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_backward_inside_of_autocast_changes_no_bit(name):
    g = torch.Generator().manual_seed(0)
    source = torch.randn(6, 16, generator=g), torch.randn(40, 16, generator=g)
    found = []
    for inside in (False, True):
        leaves = [t.clone().requires_grad_() for t in source]
        with torch.autocast("cpu", torch.bfloat16):
            loss = CALLS[name](*leaves)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            loss.backward()
        found.append([leaf.grad for leaf in leaves])
    for outside, inside in zip(*found, strict=True):
        assert torch.equal(outside, inside)
