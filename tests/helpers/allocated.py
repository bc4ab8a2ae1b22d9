"""Allocations of every loss on fixed shapes: a guard of memory that needs no clock.

After a deliberate change, record them anew and say why in the commit::

    PYTHONPATH=.:tests python -m helpers.allocated > tests/benchmarks/allocations.json
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable

import torch

from benchmarks import cases, peers
from benchmarks.cases import Case
from benchmarks.inputs import make
from benchmarks.measure import allocations

CPU = torch.device("cpu")
N, V, H = 300, 128256, 16  # linear losses: two chunks of tokens and, with memory="min", several vocabulary blocks
ROWS = 64
WARM_UP = 2  # tokens
VARIANTS = ("caop_fast-min", "caop_fast-rows", "caop_fast-bf16-logits")


@dataclasses.dataclass(frozen=True)
class Allocations:
    """Number of allocations, bytes of all, most bytes at one time, and bytes of the largest."""

    count: int
    total: int
    peak: int
    largest: int

    @classmethod
    def of(cls, call: Callable[[], object]) -> Allocations:
        changes = allocations(call)
        taken = [size for size in changes if size > 0]
        return cls(len(taken), sum(taken), max(0, *itertools.accumulate(changes)), max(taken, default=0))


def measured(case: Case, impl: str) -> Allocations:
    """Of a forward and backward, beyond the inputs."""
    inputs, loss = make(case, CPU), peers.named(impl).build(case)
    loss(inputs.rows(torch.arange(WARM_UP))).backward()  # allocations of the first use
    return Allocations.of(lambda: loss(inputs).backward())


def pairs() -> dict[str, tuple[Case, str]]:
    """Cases and implementations, by "suite: case - implementation"."""
    shapes = [
        *(cases.small(suite, ROWS, V, H) for suite in cases.LOGITS),
        *(cases.small(suite, N, V, H) for suite in cases.LINEAR),
        cases.small("logits", ROWS, V, H, beta=0.5),
        cases.small("logits", ROWS, V, H, dtype="bfloat16"),
        cases.small("linear", N, V, H, beta=0.5),
        cases.small("linear", N, V, H, head_trained=False, masked=cases.MASKED),
        cases.small("linear", N, V, H, dtype="bfloat16"),
    ]
    found = {}
    for case in shapes:
        plain = case.suite == "linear" and case.head_trained and case.beta == 0
        for impl in ("caop_fast", *(VARIANTS if plain else ())):
            if peers.named(impl).refusal(case, CPU) is None:
                found[f"{case.suite}: {case.name} - {impl}"] = case, impl
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {name: dataclasses.asdict(measured(*pair)) for name, pair in pairs().items()}
    json.dump({"torch": torch.__version__.split("+")[0], "cases": found}, sys.stdout, indent=1)
    print()
