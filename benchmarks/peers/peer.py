"""The interface that everything measured stands behind."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.inputs import Inputs

WRONG = 0.02  # relative error of loss or gradient from which a contender is not timed, unless something is known of it
Loss = Callable[[Inputs], Tensor]  # inputs to a scalar, the mean over the tokens that count


def no_refusal(case: Case, device: torch.device) -> str | None:
    return None


def no_traffic(case: Case, rows: int) -> int | None:
    return None


@dataclass(frozen=True)
class Peer:
    """One implementation of a suite's loss.

    Attributes:
        name: in tables.
        suites: those it has a loss for.
        build: the loss of a case, through the implementation's own public API with its defaults.
        gives: what a call returns beside the gradient, or that by the kind of suite ("tokens" for "linear-tokens" too).
        limit: relative error of loss or gradient from which it is not timed.
        rounding: it rounds the logits of bfloat16 heads to bfloat16.
        refuses: why it cannot do a case on a device, or None.
        package: import name of what must be installed.
        traffic: bytes it is known to read and write for a case's ``rows`` that count.
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
        return self.gives if isinstance(self.gives, str) else self.gives[case.suite.removeprefix("linear-")]

    def rounds(self, case: Case) -> bool:
        """Whether logits are rounded to bfloat16 before they are compared with a near model's."""
        return self.rounding and case.dtype == "bfloat16" and case.suite in ("linear", "linear-topk")

    def refusal(self, case: Case, device: torch.device) -> str | None:
        """Why ``case`` is not measured with it on ``device``; None when it is."""
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
    """Whether Triton's interpreter plays the GPU in this process."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def needs_gpu(case: Case, device: torch.device) -> str | None:
    """A Triton kernel of a peer's: run on a CPU only by the interpreter."""
    return None if device.type == "cuda" or interpreted() else "a Triton kernel: needs a GPU"
