"""A case on a device: inputs, truth and floor, made once for all contenders, and what a contender's errors are."""

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
from benchmarks.truth import Sample, Truth, sample, truth

CHECKED = 64  # tokens whose loss and gradients are compared with float64 as a whole
SAMPLED = 64  # of all tokens and all ids, those whose gradient is compared when all are there
UPSTREAM = 0.25  # a loss that ignores it is wrong by a factor of four: more than any rounding


@dataclass(frozen=True)
class Errors:
    """Relative errors against float64, of the gradients by the name of the input."""

    loss: float
    gradients: dict[str, float]

    @property
    def gradient(self) -> float:
        """The largest; infinite where one is not finite, which ``max`` would not see behind another."""
        found = list(self.gradients.values())
        return max(found) if all(map(math.isfinite, found)) else math.inf


@dataclass
class Bench:
    """A case on a device: inputs, truth and floor are made once for all contenders."""

    case: Case
    device: torch.device
    floors: Floors
    inputs: Inputs = field(init=False)
    small: Inputs = field(init=False)
    truth: Truth = field(init=False)
    sample: Sample = field(init=False)
    floor: Floor = field(init=False)

    def __post_init__(self) -> None:
        self.inputs = make(self.case, self.device)
        self.small = self.inputs.first(CHECKED)
        self.truth = truth(self.small)
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
        """Steps to time in turn: together, on a GPU, their inputs are more than its cache holds."""
        sets = [self.inputs]
        while self.device.type == "cuda" and sum(s.bytes() for s in sets) < 3 * measure.cache_bytes(self.device):
            sets.append(self.inputs.copy())
        return [self.step(loss, s) for s in sets]

    def errors(self, loss: Loss) -> Errors:
        """Loss and gradients of the first tokens against float64, at an upstream gradient that is not 1."""
        leaves = self.small.leaves()
        for leaf in leaves.values():
            leaf.grad = None
        value = loss(self.small)
        value.backward(torch.full_like(value, UPSTREAM))
        gradients = {name: leaf.grad / UPSTREAM for name, leaf in leaves.items() if leaf.grad is not None}
        for leaf in leaves.values():
            leaf.grad = None
        return Errors(self.truth.loss_error(value), self.truth.gradient_errors(gradients))

    def full_errors(self, value: Tensor) -> Errors:
        """Loss ``value`` of all tokens, and the gradients that lie in the inputs: rows from the first to the last."""
        found = self.inputs.leaves()
        gradients = {name: leaf.grad for name, leaf in found.items() if leaf.grad is not None}
        return Errors(self.sample.loss_error(value), self.sample.gradient_errors(gradients))

    def clear(self) -> None:
        """Drop the gradients."""
        for leaf in self.inputs.leaves().values():
            leaf.grad = None
