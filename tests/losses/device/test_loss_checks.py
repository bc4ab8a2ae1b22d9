"""Every check of the losses: the kernels in full size on a GPU, in a small one in the interpreter; PyTorch on a CPU."""

from __future__ import annotations

import os

import pytest
import torch

from helpers.loss_checks import CHECKS
from helpers.loss_checks.check import SIZES, Check, Setting

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
SETTING = Setting(
    torch.device("cuda" if ON_GPU else "cpu"),
    "triton" if ON_GPU or INTERPRETED else "torch",
    SIZES["full" if ON_GPU else "small"],
)


@pytest.mark.parametrize("check", [c for c in CHECKS if ON_GPU or not c.rare], ids=lambda check: check.name)
def test_loss(check: Check) -> None:
    check.run(SETTING)
    if ON_GPU:
        torch.cuda.synchronize()  # or an asynchronous error would surface in the next check
