"""Every implementation of every loss and of a training step under pytest-benchmark, once it was compared with float64.

    python -m pytest benchmarks --benchmark-columns=median,iqr,rounds     -k linear-topk selects a suite

On a GPU the reference cases, else small ones that take minutes. The record is printed, and stored as ``extra_info`` in
the JSON file of pytest-benchmark.
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
from benchmarks.run import Setting, last_line, out_of_memory, prepared, refusal, release
from benchmarks.step import FIRST_SEED, StepBench, StepCase

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SECONDS = {"cuda": 1.0, "cpu": 0.4}[DEVICE.type]  # of timed rounds
SELECTION = cases.targets() if DEVICE.type == "cuda" else cases.quick()
STEPS = step.SELECTIONS["cuda" if DEVICE.type == "cuda" else "quick"]
PAIRS: list[tuple[Case | StepCase, str]] = [
    *((case, p.name) for case in SELECTION for p in peers.of_case(case) if p.name != "official-compiled"),
    *((case, impl) for case in STEPS for impl in step.IMPLEMENTATIONS),
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
    reason = refusal(case, impl, DEVICE)
    if reason is not None:
        pytest.skip(f"{impl}: {reason}")
    mine = impl.startswith("caop_fast")
    benchmark.group = f"{case.record('').suite}: {case.name}"
    try:
        bench = prepared(case, setting)
        if isinstance(bench, StepBench):
            found, seeds = bench.measure(impl), itertools.count(FIRST_SEED)
            benchmark.pedantic(bench.step, setup=lambda: ((impl, next(seeds)), {}), rounds=2, iterations=1)
        else:
            found = bench.measure(impl, partial(timed_by, benchmark))
    except measure.Wrong as error:
        (pytest.fail if mine else pytest.xfail)(f"{impl} is wrong: {error}")
    except Exception as error:
        if out_of_memory(error):
            pytest.skip(f"{impl}: out of memory")
        if mine:
            raise
        pytest.xfail(f"{impl}: {last_line(error)}")  # such as a missing compiler
    finally:
        release()
    benchmark.extra_info.update(found.row())
    with capsys.disabled():
        print(f"\n{found}", end="")
