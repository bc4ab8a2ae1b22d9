"""Every implementation of every loss, compared with float64 and then timed by pytest-benchmark.

``-k linear-topk`` selects a suite.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import cases, measure, peers
from benchmarks.bench import Bench
from benchmarks.cases import Case
from benchmarks.conftest import SELECTION
from benchmarks.failures import Wrong, last_line, out_of_memory, release
from benchmarks.floors import Floors
from benchmarks.peers.peer import Peer
from benchmarks.records import Record
from benchmarks.run import examine, filled

SECONDS = {"cuda": 1.0, "cpu": 0.4}  # of timed rounds
FLOOR_SECONDS = 0.3


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each implementation of each case of the selection."""
    selection = metafunc.config.stash[SELECTION]
    quick = selection == "quick"
    pairs = [(case, peer) for case in cases.SELECTIONS[selection]() for peer in peers.for_case(case, quick=quick)]
    metafunc.parametrize(("case", "peer"), pairs, ids=[f"{c.suite}: {c.name} - {p.name}" for c, p in pairs])


class Benches:
    """The bench of the current case; its implementations follow one another."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.floors = device, Floors(device, FLOOR_SECONDS)
        self.made: Bench | None = None

    def of(self, case: Case) -> Bench:
        if self.made is None or self.made.case != case:
            self.made = None  # freed before the next one is made
            release(self.device)
            self.made = Bench(case, self.device, self.floors)
        return self.made


@pytest.fixture(scope="module")
def benches(device: torch.device) -> Benches:
    return Benches(device)


def test_loss(
    benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], benches: Benches, case: Case, peer: Peer
) -> None:
    """The record is printed, and stored as ``extra_info`` in the JSON file of pytest-benchmark."""
    refusal = peer.refusal(case, benches.device)
    if refusal is not None:
        pytest.skip(f"{peer.name} {refusal}")
    ours = peer.name.startswith("caop_fast")
    try:
        found = measured(benchmark, benches.of(case), peer)
    except Wrong as error:
        (pytest.fail if ours else pytest.xfail)(f"{peer.name} is wrong: {error}")
    except Exception as error:
        if out_of_memory(error):
            pytest.skip(f"{peer.name}: out of memory")
        if ours:
            raise
        pytest.xfail(f"{peer.name}: {last_line(error)}")  # such as a missing compiler
    finally:
        release(benches.device)
    benchmark.extra_info.update(found.row())
    with capsys.disabled():
        print(f"\n{found}", end="")


def measured(benchmark: Any, bench: Bench, peer: Peer) -> Record:
    try:
        ready = examine(bench, peer)
        turn = itertools.cycle(ready.steps)
        once = measure.timing([next(turn)], bench.device, seconds=0.0, warmup=1).median / 1e3
        benchmark.group = f"{bench.case.suite}: {bench.case.name}"
        benchmark.pedantic(
            lambda step: step(),
            setup=lambda: ((next(turn),), {}),
            rounds=max(measure.MIN_ROUNDS, min(50, int(SECONDS[bench.device.type] / once))),
            iterations=1,
            warmup_rounds=1,
        )
    finally:
        bench.clear()
    return filled(bench, peer, ready, measure.Timing(tuple(1e3 * s for s in benchmark.stats.stats.data)))
