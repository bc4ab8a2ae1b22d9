"""Every check of the losses as a test: in full size by the kernels on a GPU, else in a small size."""

from __future__ import annotations

import pytest
import torch

from benchmarks.checks import bins, confidence, linear, logits, sparse, tokens
from benchmarks.checks.check import SIZES, Check, Setting
from benchmarks.conftest import DEVICE
from benchmarks.peers.peer import interpreted

# Most important first.
CHECKS: tuple[Check, ...] = (
    *logits.checks(), *linear.checks(), *linear.rows_checks(), *sparse.checks(), *sparse.linear_checks(),
    *tokens.checks(), *tokens.linear_checks(), *confidence.checks(), *confidence.logprob_checks(),
    *confidence.linear_checks(), *logits.state_checks(), *bins.checks(),
)  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.stash[DEVICE].type == "cuda"
    metafunc.parametrize("check", [c for c in CHECKS if full or not c.rare], ids=lambda check: check.name)


def test_loss(check: Check, device: torch.device) -> None:
    full = device.type == "cuda"
    check.run(Setting(device, "triton" if full or interpreted() else "torch", SIZES["full" if full else "small"]))
    if full:
        torch.cuda.synchronize(device)  # or an asynchronous error would surface in the next check
