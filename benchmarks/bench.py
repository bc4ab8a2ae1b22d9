"""A case of a loss on a device: inputs, reference and floor, shared by all implementations, and their errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.cases import Case
from benchmarks.floors import Floor, Floors
from benchmarks.inputs import Inputs, make
from benchmarks.peers.peer import Loss
from benchmarks.reference import Reference, Sample, reference, sample

CHECKED = 64  # tokens whose loss and whole gradients are compared with float64
SAMPLED = 64  # tokens and ids, of all, whose rows of the gradients are compared
UPSTREAM = 0.25  # upstream gradient: a loss that ignores it is wrong by a factor of four


@dataclass(frozen=True)
class Errors:
    """Relative errors against float64; of the gradients by the name of the input."""

    loss: float
    gradients: dict[str, float]

    @property
    def gradient(self) -> float:
        """The largest; infinite if one is not finite, which ``max`` may miss."""
        found = list(self.gradients.values())
        return max(found) if all(map(math.isfinite, found)) else math.inf


@dataclass
class Bench:
    """A case on a device, prepared once for all implementations."""

    case: Case
    device: torch.device
    floors: Floors
    inputs: Inputs = field(init=False)
    small: Inputs = field(init=False)
    reference: Reference = field(init=False)
    sample: Sample = field(init=False)
    floor: Floor = field(init=False)

    def __post_init__(self) -> None:
        self.inputs = make(self.case, self.device)
        self.small = self.inputs.first(CHECKED)
        self.reference = reference(self.small)
        self.sample = sample(self.inputs, SAMPLED)
        self.floor = self.floors.of(self.case)

    def step(self, loss: Loss, inputs: Inputs) -> Callable[[], Tensor]:
        """Forward and backward with fresh gradients; returns the loss."""
        leaves = list(inputs.leaves().values())

        def run() -> Tensor:
            for leaf in leaves:
                leaf.grad = None
            value = loss(inputs)
            value.backward()
            return value.detach()

        return run

    def steps(self, loss: Loss) -> list[Callable[[], Tensor]]:
        """Steps to time in turn; on a GPU, their inputs together are larger than its cache."""
        sets = [self.inputs]
        while self.device.type == "cuda" and sum(s.bytes() for s in sets) < 3 * measure.cache_bytes(self.device):
            sets.append(self.inputs.copy())
        return [self.step(loss, s) for s in sets]

    def errors(self, loss: Loss) -> Errors:
        """Loss and gradients of the first tokens against float64, for an upstream gradient other than 1."""
        self.small.clear()
        value = loss(self.small)
        value.backward(torch.full_like(value, UPSTREAM))
        gradients = {name: gradient / UPSTREAM for name, gradient in self.small.gradients().items()}
        self.small.clear()
        return Errors(self.reference.loss_error(value), self.reference.gradient_errors(gradients))

    def full_errors(self, value: Tensor) -> Errors:
        """Of the loss ``value`` of all tokens, and of rows of the gradients that the inputs hold."""
        return Errors(self.sample.loss_error(value), self.sample.gradient_errors(self.inputs.gradients()))

    def clear(self) -> None:
        """Drop the gradients."""
        self.inputs.clear()
