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
