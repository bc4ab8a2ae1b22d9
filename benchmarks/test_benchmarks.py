"""Every implementation of every loss and of a training step under pytest-benchmark, once it was compared with float64.

    python -m pytest benchmarks --benchmark-columns=median,iqr,rounds     -k linear-topk selects a suite

On a GPU the reference cases, else small ones. The record is printed, and stored as ``extra_info`` in the JSON file.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import cases, measure, peers, step
from benchmarks.cases import Case
from benchmarks.run import Setting, measured, prepared
from benchmarks.step import FIRST_SEED, StepBench, StepCase

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SECONDS = {"cuda": 1.0, "cpu": 0.4}[DEVICE.type]  # of timed rounds
SELECTION, STEPS = (cases.targets(), "cuda") if DEVICE.type == "cuda" else (cases.quick(), "quick")
PAIRS: list[tuple[Case | StepCase, str]] = [
    *((case, p.name) for case in SELECTION for p in peers.of_case(case) if p.name != "official-compiled"),
    *((case, impl) for case in step.SELECTIONS[STEPS] for impl in step.IMPLEMENTATIONS),
]


def timed_by(benchmark: Any, steps: Sequence[Any], device: torch.device, *, seconds: float, rounds: int) -> list[float]:
    """In place of ``measure.timing``: milliseconds of each round of ``steps`` in turn."""
    turn = itertools.cycle(steps)
    once = measure.timing([next(turn)], device, seconds=0.0, warmup=1)[-1] / 1e3

    def run(step: Any) -> None:
        step()
        measure.synchronize(device)

    count = max(measure.MIN_ROUNDS, min(rounds, int(seconds / once)))
    benchmark.pedantic(run, setup=lambda: ((next(turn),), {}), rounds=count, iterations=1, warmup_rounds=1)
    return [1e3 * s for s in benchmark.stats.stats.data]


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting(DEVICE.type, measure.copy_gbps(DEVICE, SECONDS), SECONDS)


@pytest.mark.parametrize(("case", "impl"), PAIRS, ids=[f"{c.record('').suite}: {c.name} - {i}" for c, i in PAIRS])
def test_speed(
    benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], setting: Setting, case: Case | StepCase, impl: str
) -> None:
    benchmark.group = f"{case.record('').suite}: {case.name}"
    found = measured(case, impl, setting, *([partial(timed_by, benchmark)] if isinstance(case, Case) else []))
    if found.status != "ok":
        tell = pytest.skip if found.status in ("skipped", "oom") else pytest.xfail
        (pytest.fail if tell is pytest.xfail and impl.startswith("caop_fast") else tell)(str(found))
    if isinstance(bench := prepared(case, setting), StepBench):
        seeds = itertools.count(FIRST_SEED)
        benchmark.pedantic(bench.step, setup=lambda: ((impl, next(seeds)), {}), rounds=2, iterations=1)
    benchmark.extra_info.update(found.row())
    with capsys.disabled():
        print(f"\n{found}", end="")
