"""One whole step of on-policy distillation."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

from benchmarks import step
from benchmarks.run import Wrong, release
from benchmarks.step_bench import CONTENDERS, FIRST_SEED, Bench, Taken

ROUNDS = {"cuda": 3, "cpu": 2}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each contender of each case of the selection."""
    pairs = [(case, name) for case in step.SELECTIONS[metafunc.config.bench_selection] for name in CONTENDERS]
    metafunc.parametrize(("case", "name"), pairs, ids=[f"step: {case.name} - {name}" for case, name in pairs])


@functools.lru_cache(maxsize=1)  # the contenders of a case follow one another
def made(case: step.StepCase, device: torch.device) -> Bench:
    return step.prepared(case, device)


def test_step(benchmark, capsys, device, case, name):
    pytest.importorskip("transformers")
    bench = made(case, device)
    try:
        found = _run(benchmark, bench, name)
    except Wrong as error:
        (pytest.fail if name.startswith("caop_fast") else pytest.xfail)(f"{name} is wrong: {error}")
    except torch.OutOfMemoryError:
        pytest.skip(f"{name}: out of memory")
    finally:
        bench.clear()
        release(device)
    benchmark.extra_info.update(dataclasses.asdict(found))
    with capsys.disabled():
        print(f"\n{found}  {found.extra['tokens_per_s']:.1f} tokens/s", end="")


def _run(benchmark: Any, bench: Bench, name: str) -> step.Record:
    ready = step.examine(bench, CONTENDERS[name])
    taken: list[Taken] = []
    benchmark.group = f"step: {bench.case.name}"
    benchmark.pedantic(
        lambda seed: taken.append(bench.step(CONTENDERS[name], seed)),
        setup=lambda: (bench.reset(), ((FIRST_SEED + 1 + len(taken),), {}))[1],
        rounds=ROUNDS[bench.device.type],
        iterations=1,
    )
    return step.filled(bench.case, name, ready, [step.Round.of(t) for t in taken])
