"""Options of the benchmarks under pytest: cases, device and timer."""

from __future__ import annotations

import pytest
import torch

from benchmarks import cases
from benchmarks.measure import EventTimer

DEVICE = pytest.StashKey[torch.device]()
SELECTION = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("caop_fast benchmarks")
    group.addoption("--quick", action="store_true", help="the cases that take two minutes on a CPU")
    group.addoption("--selection", choices=sorted(cases.SELECTIONS), help="cases (default: gpu on a GPU, else quick)")
    group.addoption("--bench-device", choices=("cuda", "cpu"), help="default: cuda if there is a GPU, else cpu")


def pytest_configure(config: pytest.Config) -> None:
    kind = config.getoption("--bench-device") or ("cuda" if torch.cuda.is_available() else "cpu")
    default = "gpu" if kind == "cuda" else "quick"
    config.stash[DEVICE] = torch.device(kind)
    config.stash[SELECTION] = "quick" if config.getoption("--quick") else config.getoption("--selection") or default


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.stash[DEVICE].type == "cuda":
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=EventTimer()))


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return pytestconfig.stash[DEVICE]
