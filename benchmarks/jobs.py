"""What a campaign needs to know of a suite: the implementations of a case, and how to measure one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from benchmarks.floors import Floors
from benchmarks.records import Record

B = TypeVar("B")


@dataclass(frozen=True)
class Effort:
    """How long to measure each implementation.

    Attributes:
        seconds: of timed rounds, about.
        rounds: at most.
    """

    seconds: float = 2.0
    rounds: int = 50


class Job(Protocol[B]):
    """A case of a suite. ``B`` holds its inputs and reference on a device, shared by all implementations."""

    def record(self, impl: str) -> Record:
        """The record of an implementation, nothing measured yet."""

    def implementations(self) -> list[str]:
        """Names of all that have the suite, caop_fast first."""

    def refusal(self, impl: str, device: torch.device) -> str | None:
        """Why an implementation cannot run the case on ``device``, or None."""

    def prepare(self, device: torch.device, floors: Floors) -> B:
        """Inputs, reference and lower bound of the time."""

    def measure(self, bench: B, impl: str, effort: Effort) -> Record:
        """The record of an implementation; what goes wrong becomes its status. ``Dead`` if the device is."""

    def again(self, bench: B, found: Record, effort: Effort) -> Record:
        """``found`` with the time measured again after all other implementations, where that makes sense."""
