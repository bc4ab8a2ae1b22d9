"""Kernel tests that run on whatever Triton runs on in this process.

Collected as usual they need a GPU (marker `gpu`) and are skipped with a reason where there is none. With
TRITON_INTERPRET=1 the same tests run on CPU tensors; `test_kernels_interpreted.py` does that in a process of its own,
because Triton decides at import time whether its functions are interpreted.
"""

from __future__ import annotations

import os

import pytest
import torch

import caop_kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def _reason_to_skip() -> str | None:
    if INTERPRETED:
        return caop_kernels.available("cpu")
    if torch.cuda.is_available():
        return caop_kernels.available("cuda")
    return "no CUDA or ROCm device; test_kernels_interpreted.py runs this test in Triton's interpreter"


def pytest_itemcollected(item: pytest.Item) -> None:
    if not INTERPRETED:
        item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    reason = _reason_to_skip()
    if reason is not None:
        pytest.skip(reason)
    return torch.device("cpu" if INTERPRETED else "cuda")
