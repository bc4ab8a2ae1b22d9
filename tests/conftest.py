"""Options of the whole suite, and how pytest-xdist spreads it over the cores."""

from __future__ import annotations

import importlib.util
import os

import pytest

pytest.register_assert_rewrite("helpers")
if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: the workers' threads would wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET", "0") == "1" and importlib.util.find_spec("triton") is not None:
        from helpers import gpu_arithmetic

        gpu_arithmetic.install()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full-grid",
        action="store_true",
        help="every combination of the losses' options instead of a pairwise cover, and every kernel variant for every "
        "target instead of a choice that covers their branches",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # pytest-xdist gives whole files to its workers, whose fixtures are costly to make. Those that take long come first,
    # so that no worker is left with one at the end.
    first = {item.path for item in items if item.get_closest_marker("long") is not None}
    items.sort(key=lambda item: item.path not in first)
