"""Options of the whole suite, and how pytest-xdist spreads it over the cores."""

from __future__ import annotations

import os

import pytest

pytest.register_assert_rewrite("helpers")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full-grid",
        action="store_true",
        help="every combination of the losses' options instead of a pairwise cover, and every kernel variant for every "
        "target instead of a choice that covers their branches",
    )
    parser.addoption("--part", metavar="I/N", help="only every N-th test, from the I-th on (0 to N - 1)")


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each process, or they wait for each other's
        os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (part := config.getoption("--part")) is not None:
        index, count = (int(number) for number in part.split("/"))
        items[:] = items[index::count]
    # A file's tests share fixtures that are costly to make, so one worker takes them together; those marked `spread`
    # are independent. What takes long comes first, so that no worker is left with it at the end.
    for item in items:
        if item.get_closest_marker("spread") is None:
            item.add_marker(pytest.mark.xdist_group(str(item.path)))
    first = {item.path for item in items if item.get_closest_marker("long") is not None}
    items.sort(key=lambda item: (item.get_closest_marker("spread") is None, item.path not in first))
