"""Correctness of every kernel and loss on a device, by pytest on all cores: a crash or a hang fails one test only.

Run are the kernels' own tests, ``tests/kernels/device``, and the checks of the losses, ``tests/losses/device``. Each
outcome is appended to a file as soon as it is known, and what is decided there is not run again. This module is also
the pytest plugin that does so; under pytest-xdist a test fails whose process ends, and another process goes on.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Generator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TESTS = (ROOT / "tests" / "kernels" / "device", ROOT / "tests" / "losses" / "device")
OUTCOMES = "CAOP_OUTCOMES"  # file to append {"name", "outcome", "detail"} to, a JSON object a line
KNOWN = "CAOP_KNOWN_OUTCOMES"  # number of its lines at the start: a process that starts later must find the same tests
HANGING = "CAOP_HANGING_TEST_SECONDS"  # after which a test's process ends
SECONDS = 90.0  # by default; compiling a kernel takes a part of that
LENGTH = 4000  # characters of a detail
STDERR = os.dup(2)  # before pytest captures it


def check(
    device: str, outcomes: Path, *, seconds: float, select: str | None = None, tests: Sequence[Path] = TESTS
) -> dict[str, Any]:
    """Run the tests on ``device``, "cuda" or "cpu"; on a CPU in Triton's interpreter, if that is on.

    Args:
        device: that the tests use by themselves; it decides what environment they get.
        outcomes: file of the outcomes, those of an earlier call included.
        seconds: after which the tests are stopped.
        select: only tests whose names match, as with pytest's ``-k``.
        tests: files or folders.

    Returns:
        "passed", "failed", "skipped": numbers of tests; "failures": "name: message" of those that failed; "finished":
        whether all ran.
    """
    made = [sys.executable, "-m", "pytest", *map(str, tests), "-o", "addopts=", "-p", "no:cacheprovider"]
    made += ["-p", "tools.device_tests", "--continue-on-collection-errors", "--tb=short", "-q"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    made += ["-n", str(cores), "--max-worker-restart", "9999"] if find_spec("xdist") is not None else []
    made += ["-k", select] if select is not None else []
    outcomes.parent.mkdir(parents=True, exist_ok=True)
    with outcomes.open("a", encoding="utf-8") as file:
        file.write("\n")  # behind a line that was cut off
    code, said = _stopped_after(seconds, made, environment(device, outcomes))
    found = summary(outcomes)
    found["finished"] = code in (0, 1, 5)
    if code not in (None, 0, 1, 5) or (code is not None and not found["passed"] + found["failed"]):
        found["failed"] += 1
        found["failures"].append(f"pytest, exit code {code}: {said}")
    return found


def environment(device: str, outcomes: Path) -> dict[str, str]:
    """Of the tests' process: the packages can be imported; Triton is interpreted on a CPU only."""
    made = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}  # of an outer one
    if device != "cpu":
        made.pop("TRITON_INTERPRET", None)
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    made |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore", OUTCOMES: str(outcomes.absolute())}
    return {**made, KNOWN: str(len(outcomes.read_text(encoding="utf-8").splitlines()))}


def _stopped_after(seconds: float, command: Sequence[str], env: dict[str, str]) -> tuple[int | None, str]:
    """The exit code, None if it had to be stopped, and the end of the output."""
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        code: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with its workers
            process.wait()
        out.seek(0)
        return code, last_lines(out.read().decode(errors="replace"))


def decided(outcomes: Path, lines: int | None = None) -> dict[str, dict[str, str]]:
    """The outcomes in the first lines of a file by test; the last one counts, and a line that was cut off does not."""
    found = {}
    for line in outcomes.read_text(encoding="utf-8").splitlines()[:lines]:
        with contextlib.suppress(json.JSONDecodeError):
            test = json.loads(line)
            found[test["name"]] = test
    return found


def summary(outcomes: Path) -> dict[str, Any]:
    """See ``check``."""
    tests = decided(outcomes)
    counts = Counter(test["outcome"] for test in tests.values())
    failures = [f"{n}: {last_lines(t['detail'])}"[:1000] for n, t in tests.items() if t["outcome"] == "failed"]
    return {**{kind: counts[kind] for kind in ("passed", "failed", "skipped")}, "failures": failures}


def last_lines(text: str, most: int = 4) -> str:
    """The lines that pytest marks as the error, or the last ones, in one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    marked = [line.removeprefix("E").strip() for line in lines if line.startswith("E ")]
    return " | ".join((marked or lines)[-most:])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if KNOWN in os.environ:
        known = decided(Path(os.environ[OUTCOMES]), int(os.environ[KNOWN]))
        again = {"outcome": "failed"}  # it may be right by now
        items[:] = [item for item in items if known.get(item.nodeid, again)["outcome"] == "failed"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    faulthandler.dump_traceback_later(float(os.environ.get(HANGING, SECONDS)), exit=True, file=STDERR)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_exception_interact(report: pytest.TestReport | pytest.CollectReport) -> None:
    """A process whose device stopped working ends, since no further test could pass in it."""
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized() and not alive():
        os.write(STDERR, report.longreprtext.encode())
        os._exit(1)


def alive() -> bool:
    """Whether the GPU still works in this process; after an illegal memory access no call succeeds."""
    import torch

    try:
        return torch.ones(2, device="cuda").sum().item() == 2
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:
        return False


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.outcome != "passed" or report.when == "call":
        _tell(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.outcome != "passed":
        _tell(report)


def _tell(report: pytest.TestReport | pytest.CollectReport) -> None:
    if OUTCOMES not in os.environ or "PYTEST_XDIST_WORKER" in os.environ:  # whose controller gets all reports
        return
    detail = report.longreprtext
    if report.outcome == "skipped":
        detail = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(getattr(report, "wasxfail", ""))
    line = {"name": report.nodeid, "outcome": report.outcome, "detail": detail[-LENGTH:].removeprefix("Skipped: ")}
    with open(os.environ[OUTCOMES], "a", encoding="utf-8") as file:
        print(json.dumps(line), file=file)
