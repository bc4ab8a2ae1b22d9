"""What the pytest-benchmark suites share: a contender is held to float64, then pytest-benchmark times it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import pytest
import torch

from benchmarks import measure
from benchmarks.bench import Bench
from benchmarks.cases import Case
from benchmarks.floors import Floors
from benchmarks.peers.peer import Peer
from benchmarks.records import Record
from benchmarks.run import Wrong, examine, filled, last_line, release

SECONDS = {"cuda": 1.0, "cpu": 0.4}  # of timed rounds


@functools.lru_cache(maxsize=1)
def floors(device: torch.device) -> Floors:
    return Floors(device, 0.3)


_made: list[Bench] = []


def made(case: Case, device: torch.device) -> Bench:
    """The bench of a case, whose contenders follow one another; that of the case before goes first."""
    if not _made or (_made[0].case, _made[0].device) != (case, device):
        _made.clear()
        release(device)
        _made.append(Bench(case, device, floors(device)))
    return _made[0]


def run(benchmark: Any, capsys: Any, device: torch.device, case: Case, peer: Peer) -> None:
    """Benchmark ``peer`` on ``case``: the record is printed, and kept as ``extra_info`` of the benchmark's JSON."""
    refusal = peer.refusal(case, device)
    if refusal is not None:
        pytest.skip(f"{peer.name} {refusal}")
    try:
        found = _run(benchmark, device, case, peer)
    except Wrong as error:
        (pytest.fail if peer.name.startswith("caop_fast") else pytest.xfail)(f"{peer.name} is wrong: {error}")
    except torch.OutOfMemoryError:
        pytest.skip(f"{peer.name}: out of memory")
    except Exception as error:  # a peer's own trouble, such as a missing compiler, is not ours
        if peer.name.startswith("caop_fast"):
            raise
        pytest.xfail(f"{peer.name}: {last_line(error)}")
    finally:
        release(device)
    benchmark.extra_info.update(dataclasses.asdict(found))
    with capsys.disabled():
        print(f"\n{found}", end="")


def _run(benchmark: Any, device: torch.device, case: Case, peer: Peer) -> Record:
    bench = made(case, device)
    try:
        ready = examine(bench, peer)
        turn = itertools.cycle(ready.steps)
        once = measure.timing([next(turn)], device, seconds=0.0, warmup=1).median / 1e3
        benchmark.group = f"{case.suite}: {case.name}"
        benchmark.pedantic(
            lambda step: step(),
            setup=lambda: ((next(turn),), {}),
            rounds=max(measure.MIN_ROUNDS, min(50, int(SECONDS[device.type] / once))),
            iterations=1,
            warmup_rounds=1,
        )
    finally:
        bench.clear()
    return filled(bench, peer, ready, measure.Timing(tuple(1e3 * s for s in benchmark.stats.stats.data)))
