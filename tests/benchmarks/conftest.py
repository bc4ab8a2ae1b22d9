"""What all tests of the benchmarks share: small floors, quick garbage collections, the state of the compiler."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch._dynamo

from benchmarks import measure


@pytest.fixture(scope="package", autouse=True)
def quick_collections() -> Iterator[None]:
    """Every measurement collects garbage; what was imported before need not be traversed each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def compiler_state() -> Iterator[None]:
    """``run.fresh_compiler`` changes a setting of the process."""
    config = torch._dynamo.config
    with config.patch(fail_on_recompile_limit_hit=config.fail_on_recompile_limit_hit):
        yield


@pytest.fixture(autouse=True)
def small_floors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers are not looked at, and a copy of 256 MiB takes longer than all else."""
    monkeypatch.setitem(measure.COPY_BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(measure.SQUARE, "cpu", 64)
    monkeypatch.setattr(measure, "FLOOR_ROUNDS", 3)
