"""One whole step of on-policy distillation, timed by pytest-benchmark."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.conftest import SELECTION
from benchmarks.failures import Wrong, out_of_memory, release
from benchmarks.records import Record
from benchmarks.step.bench import FIRST_SEED, IMPLEMENTATIONS, Bench, Taken
from benchmarks.step.cases import SELECTIONS, StepCase
from benchmarks.step.job import Round, StepJob, examine, filled

ROUNDS = {"cuda": 3, "cpu": 2}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each implementation of each case of the selection."""
    pairs = [(case, name) for case in SELECTIONS[metafunc.config.stash[SELECTION]] for name in IMPLEMENTATIONS]
    metafunc.parametrize(("case", "name"), pairs, ids=[f"step: {case.name} - {name}" for case, name in pairs])


@functools.lru_cache(maxsize=1)  # the implementations of a case follow one another
def prepared(case: StepCase, device: torch.device) -> Bench:
    return StepJob(case).prepare(device)


def test_step(
    benchmark: BenchmarkFixture,
    capsys: pytest.CaptureFixture[str],
    device: torch.device,
    case: StepCase,
    name: str,
) -> None:
    pytest.importorskip("transformers")
    bench = prepared(case, device)
    try:
        found = measured(benchmark, bench, name)
    except Wrong as error:
        (pytest.fail if name.startswith("caop_fast") else pytest.xfail)(f"{name} is wrong: {error}")
    except Exception as error:
        if not out_of_memory(error):
            raise
        pytest.skip(f"{name}: out of memory")
    finally:
        bench.clear()
        release(device)
    benchmark.extra_info.update(found.row())
    with capsys.disabled():
        print(f"\n{found}  {found.extra['tokens_per_s']:.1f} tokens/s", end="")


def measured(benchmark: Any, bench: Bench, name: str) -> Record:
    implementation = IMPLEMENTATIONS[name]
    ready = examine(bench, implementation)
    taken: list[Taken] = []

    def setup() -> tuple[tuple[int], dict[str, object]]:
        bench.reset()
        return (FIRST_SEED + 1 + len(taken),), {}

    benchmark.group = f"step: {bench.case.name}"
    benchmark.pedantic(
        lambda seed: taken.append(bench.step(implementation, seed)),
        setup=setup,
        rounds=ROUNDS[bench.device.type],
        iterations=1,
    )
    return filled(bench.case.record(name), ready, [Round.of(t) for t in taken])
