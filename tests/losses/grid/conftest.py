"""Tests of the public losses that run on every backend this process has.

Collected as usual: the PyTorch backend on the CPU and, where there is a GPU, both backends on that. With
TRITON_INTERPRET=1, which `test_grid_interpreted.py` sets in a process of its own: the Triton backend on CPU tensors.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


class Place(NamedTuple):
    """Which implementation runs where."""

    backend: str
    device: torch.device

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "place" not in metafunc.fixturenames:
        return
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    if INTERPRETED:
        places = [Place("triton", cpu)]
    else:
        places = [Place("torch", cpu)]
        if torch.cuda.is_available():
            places += [Place("torch", gpu), Place("triton", gpu)]
    metafunc.parametrize("place", places, ids=str)


@pytest.fixture(autouse=True, scope="session")
def nearest_bfloat16() -> None:
    """Store bfloat16 rounded to the nearest, as GPUs do; the interpreter cuts."""
    if not INTERPRETED:
        return
    from triton.runtime.interpreter import InterpreterBuilder

    from helpers.interpreter_rounding import nearest_bfloat16

    InterpreterBuilder.cast_impl = nearest_bfloat16(InterpreterBuilder.cast_impl)


@pytest.fixture
def fused_multiply_add(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round a multiply-add once, as GPUs do; the interpreter rounds the product first, which shows at large logits."""
    if not INTERPRETED:
        return
    from triton.runtime.interpreter import InterpreterBuilder

    from helpers.interpreter_rounding import create_fma

    monkeypatch.setattr(InterpreterBuilder, "create_fma", create_fma)
