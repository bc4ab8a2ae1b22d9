"""Which cases the suites run, on what, and by which clock."""

from __future__ import annotations

import pytest
import torch

from benchmarks import cases, peers
from benchmarks.measure import EventTimer


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("caop_fast benchmarks")
    group.addoption("--quick", action="store_true", help="the selection that ends within two minutes on a CPU")
    group.addoption("--selection", choices=sorted(cases.SELECTIONS), help="cases (gpu where there is one, else quick)")
    group.addoption("--bench-device", choices=("cuda", "cpu"), help="cuda where there is one, else cpu")


def pytest_configure(config: pytest.Config) -> None:
    gpu = torch.cuda.is_available()
    config.bench_device = torch.device(config.getoption("--bench-device") or ("cuda" if gpu else "cpu"))
    default = "gpu" if config.bench_device.type == "cuda" else "quick"
    config.bench_selection = "quick" if config.getoption("--quick") else config.getoption("--selection") or default


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each contender of each case of the module's ``SUITES``."""
    if "peer" not in metafunc.fixturenames:
        return
    selection = metafunc.config.bench_selection
    chosen = cases.of_suites(cases.SELECTIONS[selection](), metafunc.module.SUITES)
    pairs = [(case, peer) for case in chosen for peer in peers.for_case(case, quick=selection == "quick")]
    metafunc.parametrize(("case", "peer"), pairs, ids=[f"{c.suite}: {c.name} - {p.name}" for c, p in pairs])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.bench_device.type == "cuda":
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=EventTimer()))


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return pytestconfig.bench_device
