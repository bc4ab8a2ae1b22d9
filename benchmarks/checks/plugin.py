"""A pytest plugin for ``benchmarks.correctness``: reports outcomes as they come, and ends processes that are stuck.

Under pytest-xdist a test fails whose process ends, and the others continue in a new process.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Generator

import pytest

OUTCOMES = "CAOP_OUTCOMES"  # file to append {"name", "outcome", "detail"} to, a JSON object a line
HANGING = "CAOP_HANGING_TEST_SECONDS"  # after which a test's process ends
SECONDS = 120.0  # by default; compiling a kernel takes a part of that
LENGTH = 4000  # of a detail
STDERR = os.dup(2)  # before pytest captures it
_worker = False


def pytest_configure(config: pytest.Config) -> None:
    global _worker
    _worker = hasattr(config, "workerinput")  # of pytest-xdist, whose controller gets all reports


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    faulthandler.dump_traceback_later(float(os.environ.get(HANGING, SECONDS)), exit=True, file=STDERR)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_exception_interact(report: pytest.TestReport | pytest.CollectReport) -> None:
    """A process whose device stopped working ends, since no further test could pass in it."""
    if "torch" in sys.modules:
        import torch

        from benchmarks.measure import alive

        if torch.cuda.is_initialized() and not alive(torch.device("cuda")):
            os.write(STDERR, report.longreprtext.encode())
            os._exit(1)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.outcome != "passed" or report.when == "call":
        tell(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.outcome != "passed":
        tell(report)


def tell(report: pytest.TestReport | pytest.CollectReport) -> None:
    """A later report of the same test, such as a failed teardown, replaces an earlier one."""
    if _worker or OUTCOMES not in os.environ:
        return
    detail = report.longreprtext
    if report.outcome == "skipped":
        detail = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(getattr(report, "wasxfail", ""))
    line = {"name": report.nodeid, "outcome": report.outcome, "detail": detail[-LENGTH:].removeprefix("Skipped: ")}
    with open(os.environ[OUTCOMES], "a", encoding="utf-8") as file:
        print(json.dumps(line), file=file)
