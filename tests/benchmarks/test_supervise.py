"""Whatever happens to a worker, the run continues in another one, and ends when a worker ends by itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol

import pytest

from benchmarks import supervise
from benchmarks.records import ROOT

# Each worker appends a line with what it was passed; ``number`` counts them from 1.
WORKER = """
import os, signal, subprocess, sys, time
from pathlib import Path
from benchmarks.supervise import Lifeline

log = Path({log!r})
before = log.read_text().splitlines() if log.exists() else []
number = len(before) + 1
told = [os.environ.get(f"CAOP_BENCH_{{name}}", "") for name in ("DEADLINE", "RESULT", "ENDED")]
log.write_text("\\n".join([*before, "|".join(told + sys.argv[1:])]))
lifeline = Lifeline.of_environment()
lifeline.results(Path("results-of-the-run.json"))
lifeline.begin("a contender", {seconds})
{body}
"""

STOPPED = """
import time
from pathlib import Path
from benchmarks.supervise import Lifeline
Lifeline.of_environment().begin("a long check", 100.0)
try:
    Path({folder!r}, "begun").touch()
    time.sleep(100)
finally:
    Path({folder!r}, "cleaned").touch()
"""


class Run(Protocol):
    def __call__(self, body: str, seconds: float = 30.0) -> tuple[int, list[str], list[list[str]]]: ...


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(supervise, "MOST_WORKERS", 3)
    said: list[str] = []

    def run(body: str, seconds: float = 30.0) -> tuple[int, list[str], list[list[str]]]:
        """Exit code, what was said, and what each worker was passed."""
        log = tmp_path / "log"
        (tmp_path / "worker.py").write_text(WORKER.format(log=str(log), body=body, seconds=seconds))
        code = supervise.supervise("worker", ["--fresh"], until=12.5, say=said.append)
        return code, said, [line.split("|") for line in log.read_text().splitlines()]

    return run


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_worker_that_ended_is_the_end(run: Run, code: int) -> None:
    assert run(f"sys.exit({code})") == (code, [], [["12.5", "", "", "--fresh"]])


@pytest.mark.parametrize(
    ("death", "why"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("os.abort()", "SIGABRT"),
        ("os._exit(9)", "exit code 9"),
        ("sys.exit(70)", "exit code 70"),
        ("sys.exit(75)", "the device was dead"),
        ("time.sleep(100)\nlifeline.begin('the rest', 30.0)", "a contender: nothing for 1 s"),
    ],
)
def test_another_goes_on_with_the_results(run: Run, death: str, why: str) -> None:
    code, said, told = run(f"if number == 1: {death}", 1.0 if "sleep" in death else 30.0)
    assert code == 0
    assert len(said) == 1
    assert why in said[0]
    (_, *first), (until, *second) = told
    assert first == ["", "", "--fresh"]
    assert until == "12.5", "no worker has more time than the run"
    assert second[0] == "results-of-the-run.json"
    assert why in second[1]


def test_reports_keep_a_worker_alive(run: Run) -> None:
    assert run("for _ in range(14): lifeline.begin('more', 5.0), time.sleep(0.5)")[:2] == (0, [])


def test_it_gives_up(run: Run) -> None:
    code, said, told = run("os._exit(9)")
    assert code == 2
    assert len(told) == 3
    assert "3 processes died" in said[-1]


def test_a_child_that_keeps_the_pipe_open_does_not_delay_the_end(run: Run) -> None:
    """As compilers' pools of forked processes do."""
    code, said, _ = run("if os.fork() == 0: time.sleep(30), os._exit(0)\nlifeline.begin('the end', 25.0)")
    assert (code, said) == (0, [])


def test_the_worker_is_stopped_with_the_run(tmp_path: Path) -> None:
    """By SIGTERM to the supervisor alone, as a job scheduler sends it; the worker cleans up."""
    (tmp_path / "worker.py").write_text(STOPPED.format(folder=str(tmp_path)))
    code = (
        "from benchmarks.supervise import supervise; import sys; sys.exit(supervise('worker', [], until=1, say=print))"
    )
    paths = os.pathsep.join([str(ROOT), str(tmp_path)])
    run = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE
    )
    try:
        limit = time.monotonic() + 60
        while not (tmp_path / "begun").exists():
            assert time.monotonic() < limit
            time.sleep(0.1)
        run.terminate()
        out, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130
    assert b"run it again" in out
    assert (tmp_path / "cleaned").exists()


def test_a_worker_notices_that_the_supervisor_is_gone() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        supervise.Lifeline(writer).begin("anything", 1.0)


def test_without_a_supervisor_nothing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(supervise.PIPE, raising=False)
    supervise.Lifeline.of_environment().begin("anything", 1.0)
