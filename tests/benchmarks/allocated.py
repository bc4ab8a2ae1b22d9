"""Allocations of every loss on fixed shapes, for a guard that needs no clock; prints them as JSON when run.

After a deliberate change: ``python tests/benchmarks/allocated.py > tests/benchmarks/allocations.json``, and say why in
the commit.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import cases, peers
from benchmarks.cases import Case
from benchmarks.inputs import make
from benchmarks.measure import Allocations, allocations
from benchmarks.run import release

N, V, H = 300, 128256, 16  # linear losses: two chunks of tokens and, for "min", several of ids
ROWS = 64
VARIANTS = ("caop_fast-min", "caop_fast-rows", "caop_fast-bf16-logits")


def shapes() -> Iterator[Case]:
    for suite in cases.LOGITS:
        yield cases.small(suite, ROWS, V, H)
    for suite in cases.LINEAR:
        yield cases.small(suite, N, V, H)
    yield cases.small("logits", ROWS, V, H, beta=0.5)
    yield cases.small("logits", ROWS, V, H, dtype="bfloat16")
    yield cases.small("linear", N, V, H, beta=0.5)
    yield cases.small("linear", N, V, H, head_trained=False, masked=cases.MASKED)
    yield cases.small("linear", N, V, H, dtype="bfloat16")


def measured(case: Case, impl: str) -> Allocations:
    """Of a forward and backward, beyond inputs that are there before."""
    device = torch.device("cpu")
    inputs, loss = make(case, device), peers.BY_NAME[impl].build(case)

    def step() -> None:
        loss(inputs).backward()

    step()  # first-use allocations
    for leaf in inputs.leaves().values():
        leaf.grad = None
    release(device)
    return allocations(step)


def everything() -> dict[str, dict[str, int]]:
    """By "suite: case - implementation", on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {}
    try:
        for case in shapes():
            for impl in ("caop_fast", *(VARIANTS if case.head_trained and case.beta == 0 else ())):
                if peers.BY_NAME[impl].refusal(case, torch.device("cpu")) is None:
                    found[f"{case.suite}: {case.name} - {impl}"] = dataclasses.asdict(measured(case, impl))
    finally:
        torch.set_num_threads(threads)
    return found


if __name__ == "__main__":
    json.dump({"torch": torch.__version__.split("+")[0], "cases": everything()}, sys.stdout, indent=1)
    print()
