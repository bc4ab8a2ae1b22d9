"""Autotuning: off unless asked for, right in every configuration, remembered, and harmless to what it rehearses on."""

from __future__ import annotations

import pytest
import torch

import caop_kernels
from caop_fast import distillation_loss
from caop_kernels import tuning
from caop_kernels.launch import statistics_launch
from helpers.row_oracle import logits


@pytest.fixture
def timed(monkeypatch):
    """Configurations in the order they were timed; the last one of each kernel wins."""
    seen = []

    def milliseconds(run, device):
        run()
        seen.append(run)
        return -float(len(seen))

    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    yield seen
    caop_kernels.set_autotune(False)


def step(student, teacher, **options):
    leaf = student.clone().requires_grad_()
    over = leaf * 1.0
    out = distillation_loss(over, teacher, backend="triton", **options)
    out.loss.backward()
    return out.divergence.detach(), leaf.grad


@pytest.mark.parametrize(("beta", "inplace"), [(0.5, False), (1.0, True)])
def test_every_configuration_gives_the_same_result(device, timed, beta, inplace):
    student, teacher = logits("normal", 3, 17000, torch.float32, device)
    table = step(student, teacher, beta=beta)
    assert not timed
    caop_kernels.set_autotune(True)
    tuned = step(student, teacher, beta=beta, inplace=inplace)
    kernels = 3 if beta == 0.5 else 2  # statistics, mixture, gradient
    each = len(tuning.candidates(statistics_launch("cuda", 4, aligned=False)))
    assert each > 5
    assert len(timed) >= kernels * each - 3 * kernels  # no narrower than one warp
    for a, b in zip(tuned, table, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)
    count = len(timed)
    again = step(student, teacher, beta=beta, inplace=inplace)
    assert len(timed) == count, "what was found is kept"
    assert all(torch.equal(a, b) for a, b in zip(again, tuned, strict=True))
    step(student[:, :1000].contiguous(), teacher[:, :1000].contiguous(), beta=beta, inplace=inplace)
    assert len(timed) > count, "another vocabulary is another question"
    caop_kernels.set_autotune(False)
    assert all(torch.equal(a, b) for a, b in zip(step(student, teacher, beta=beta), table, strict=True))


def test_the_clock(device):
    assert tuning._milliseconds(lambda: None, device) >= 0


def test_the_switch_takes_a_bool():
    with pytest.raises(TypeError, match="on must be True or False"):
        caop_kernels.set_autotune(1)
