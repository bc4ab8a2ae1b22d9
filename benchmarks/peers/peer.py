"""The interface of the implementations that are measured."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.inputs import Inputs

WRONG = 0.02  # relative error of loss or gradient above which an implementation is not timed, unless it has a limit
Loss = Callable[[Inputs], Tensor]  # maps inputs to a scalar, the mean over the unmasked tokens


def no_refusal(case: Case, device: torch.device) -> str | None:
    return None


def no_traffic(case: Case, rows: int) -> int | None:
    return None


@dataclass(frozen=True)
class Peer:
    """One implementation of a suite's loss.

    Attributes:
        name: in tables.
        suites: that it has a loss for.
        build: the loss of a case, through the public API of the implementation with its defaults.
        gives: what a call returns besides the gradient; where that differs, by ``Case.kind``.
        limit: relative error of loss or gradient above which it is not timed.
        rounding: whether it rounds the logits of bfloat16 heads to bfloat16.
        refuses: why it does not support a case on a device, or None.
        package: import name of the package that must be installed.
        traffic: bytes it is known to read and write for a case with ``rows`` unmasked tokens.
    """

    name: str
    suites: tuple[str, ...]
    build: Callable[[Case], Loss]
    gives: str | Mapping[str, str] = "loss"
    limit: float = WRONG
    rounding: bool = False
    refuses: Callable[[Case, torch.device], str | None] = no_refusal
    package: str | None = None
    traffic: Callable[[Case, int], int | None] = no_traffic

    def gives_for(self, case: Case) -> str:
        return self.gives if isinstance(self.gives, str) else self.gives[case.kind]

    def rounds(self, case: Case) -> bool:
        """Whether logits are rounded to bfloat16, which is coarse for models that are near."""
        return self.rounding and case.dtype == "bfloat16" and case.suite in ("linear", "linear-topk")

    def refusal(self, case: Case, device: torch.device) -> str | None:
        """Why ``case`` is not measured on ``device``, or None."""
        if case.suite not in self.suites:
            return f"has no loss for the suite {case.suite}"
        if self.package is not None and not installed(self.package):
            return f"{self.package} is not installed"
        return self.refuses(case, device)


def installed(package: str) -> bool:
    """Whether ``package`` could be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def interpreted() -> bool:
    """Whether Triton runs its kernels in the interpreter in this process."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def needs_gpu(case: Case, device: torch.device) -> str | None:
    """A peer's Triton kernel runs on a CPU only in the interpreter."""
    return None if device.type == "cuda" or interpreted() else "a Triton kernel: needs a GPU"
