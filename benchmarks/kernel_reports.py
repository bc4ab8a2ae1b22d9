"""A pytest plugin that tells another process what happens, as it happens: one JSON line an event, into an open pipe.

    {"event": "collected", "tests": [...]}   {"event": "started", "test": ...}   {"event": "broken", "test", "detail"}
    {"event": "finished", "test": ..., "outcome": "passed" | "failed" | "skipped", "detail": ...}

``benchmarks.kernel_tests`` reads them. Lines of text would not do: names of tests hold spaces, and a process that dies
takes its summary along.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

PIPE = "CAOP_KERNEL_TESTS_PIPE"  # number of the file descriptor to write to
DONE = "CAOP_KERNEL_TESTS_DONE"  # file with the names of tests that are not to be run again, one a line
DETAIL = 1000  # characters of a failure that are told


def tell(event: str, **values: Any) -> None:
    os.write(int(os.environ[PIPE]), (json.dumps({"event": event, **values}) + "\n").encode())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    done = set(Path(os.environ[DONE]).read_text(encoding="utf-8").splitlines())
    dropped = [item for item in items if item.nodeid in done]
    items[:] = [item for item in items if item.nodeid not in done]
    if dropped:
        config.hook.pytest_deselected(items=dropped)


def pytest_collection_finish(session: pytest.Session) -> None:
    tell("collected", tests=[item.nodeid for item in session.items])


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        tell("broken", test=report.nodeid, detail=last(str(report.longrepr)))
    elif report.skipped:
        tell("finished", test=report.nodeid, outcome="skipped", detail=reason(report))


def pytest_runtest_logstart(nodeid: str) -> None:
    tell("started", test=nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Only of the call where all is well; of setup and teardown where they are not."""
    if report.failed:
        where = "" if report.when == "call" else f"{report.when}: "
        tell("finished", test=report.nodeid, outcome="failed", detail=where + last(report.longreprtext))
    elif report.skipped:
        tell("finished", test=report.nodeid, outcome="skipped", detail=reason(report))
    elif report.when == "call":
        tell("finished", test=report.nodeid, outcome="passed", detail="")


def reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "expected failure")
    return text.removeprefix("Skipped: ")


def last(text: str) -> str:
    """What went wrong in one line: the lines that pytest marks, else the last ones."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    marked = [line.removeprefix("E").strip() for line in lines if line.startswith("E ")]
    return " | ".join((marked or lines)[-4:])[-DETAIL:]
