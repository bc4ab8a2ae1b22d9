"""The kernels' own tests on this device, in a process of their own: what it has told survives its death.

A test that takes the process with it (a crash, or an error after which the device is of no use) fails, and another
process goes on behind it.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.correctness import OUT_OF_TIME, Check, Report
from benchmarks.kernel_reports import DONE, PIPE

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "kernels" / "device"
FIRST = ("test_kernel_rows", "test_kernel_gradient", "test_kernel_mixture", "test_kernel_topk", "test_kernel_tokens")
PROCESSES = 6  # no more are begun when one after another dies
DEAD = ("CUDA error", "HIP error", "[CUDA]", "[HIP]", "AcceleratorError")  # in a failure: nothing works in that process
NOTHING_LEFT = 5  # pytest's exit code where all tests were left out
HUNG = 120.0  # seconds after which a test that the deadline ends has failed: compiling takes a part of that
GRACE = 60.0  # seconds a process may take to end after its last word


def check_kernels(
    device: torch.device,
    *,
    only: str | None,
    deadline: float | None,
    decided: Collection[str] = (),
    report: Report | None = None,
    folder: Path = FOLDER,
) -> list[Check]:
    """Run the kernels' tests on ``device``; a CPU means Triton's interpreter.

    Args:
        device: a GPU's type, or the CPU.
        only: take the test files whose name holds this; None for all.
        deadline: ``time.monotonic()`` at which the tests are stopped; None for none.
        decided: names of tests that are left out.
        report: called with each check as soon as it is known.
        folder: where the tests lie.

    Returns:
        One check a test, those that were not reached skipped with the reason.
    """
    run = _Run(report, frozenset(decided))
    if not folder.is_dir():
        run.add("kernel tests", "skipped", f"{folder} is not there: installed without the tests")
        return run.checks
    files = sorted(
        folder.glob("test_*.py"), key=lambda f: (f.stem not in FIRST, f.stem in FIRST and FIRST.index(f.stem))
    )
    files = [file for file in files if only is None or only in file.name]
    if not files:
        run.add("kernel tests", "failed", f"no test file in {folder}" + (f" has {only!r} in its name" if only else ""))
        return run.checks
    for _ in range(PROCESSES):
        if not _process(run, files, environment(device), deadline):
            break
    else:
        run.rest("too many processes died")
    if run.decided:
        return run.checks
    if not run.checks:
        run.add("kernel tests", "failed", "no test was found")
    elif all(check.outcome == "skipped" and check.detail != OUT_OF_TIME for check in run.checks):
        run.add("kernel tests", "failed", f"no test ran: {run.checks[0].detail}")
    return run.checks


def environment(device: torch.device) -> dict[str, str]:
    """With both packages to be found, and Triton interpreted on a CPU only."""
    made = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if device.type == "cpu":
        made["TRITON_INTERPRET"] = "1"
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**made, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}


@dataclass
class _Run:
    """What is known of the tests: checks, names that were collected, and the one that is running."""

    report: Report | None
    decided: frozenset[str]
    checks: list[Check] = field(default_factory=list)
    collected: list[str] = field(default_factory=list)
    running: str | None = None
    since: float = 0.0  # time.monotonic() when it began

    def add(self, name: str, outcome: Any, detail: str) -> None:
        """A failed teardown takes the place of the test that had passed."""
        check = Check(name, outcome, detail)
        if self.checks and self.checks[-1].name == name:
            if self.checks[-1].outcome == "failed":
                return
            self.checks.pop()
        self.checks.append(check)
        if self.report is not None:
            self.report(check)

    def rest(self, reason: str) -> None:
        """All that have not been run are skipped."""
        done = {check.name for check in self.checks}
        for name in self.collected:
            if name not in done:
                self.add(name, "skipped", reason)

    def take(self, event: dict[str, Any]) -> bool:
        """One event; whether it says that the device is of no use any more in that process."""
        kind = event["event"]
        if kind == "collected":
            self.collected += [name for name in event["tests"] if name not in self.collected]
        elif kind == "started":
            self.running, self.since = event["test"], time.monotonic()
        elif kind == "broken":
            self.add(event["test"], "failed", f"cannot be collected: {event['detail']}")
        else:
            self.running = None
            self.add(event["test"], event["outcome"], event["detail"])
            return event["outcome"] == "failed" and any(mark in event["detail"] for mark in DEAD)
        return False


def _process(run: _Run, files: list[Path], environment: dict[str, str], deadline: float | None) -> bool:
    """Run what has not been run in one process; whether another one should go on."""
    reader, writer = os.pipe()
    with (
        tempfile.TemporaryDirectory() as scratch,
        open(Path(scratch, "out"), "w+b") as out,
        os.fdopen(reader),
    ):
        done = Path(scratch, "done")
        done.write_text("\n".join([*run.decided, *(check.name for check in run.checks)]), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "benchmarks.kernel_reports"]
        process = subprocess.Popen(
            [*command, "-o", "addopts=", "--tb=short", "--continue-on-collection-errors", *map(str, files)],
            cwd=ROOT, env={**environment, PIPE: str(writer), DONE: str(done)}, pass_fds=[writer],
            stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        os.close(writer)
        dead = late = False
        try:
            for event in _events(reader, deadline):
                if event is None:
                    late = True
                    break
                if run.take(event):
                    dead = True
                    break
            if not (dead or late):
                process.wait(GRACE)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _kill(process)
        out.seek(0)
        said = out.read().decode(errors="replace").strip().splitlines()[-3:]
    if late:
        name, run.running = run.running, None
        lasted = time.monotonic() - run.since
        if name is not None and lasted > HUNG:
            run.add(name, "failed", f"it was still running after {lasted:.0f} s")
        if not run.collected:
            run.add("kernel tests", "skipped", OUT_OF_TIME)
        run.rest(OUT_OF_TIME)
        return False
    if dead:
        return True
    if run.running is not None:  # it died in a test
        name, run.running = run.running, None
        run.add(name, "failed", f"the process died with code {process.returncode}: {' | '.join(said)}"[:1000])
        return True
    fine = (0, 1, NOTHING_LEFT) if run.decided else (0, 1)
    if process.returncode not in fine and not any(check.outcome == "failed" for check in run.checks):
        run.add("kernel tests", "failed", f"pytest ended with code {process.returncode}: {' | '.join(said)}"[:1000])
    run.rest("the process ended before it")
    return False


def _events(reader: int, deadline: float | None) -> Iterator[dict[str, Any] | None]:
    """Events until the writers are gone; None at the deadline."""
    held = b""
    with selectors.DefaultSelector() as selector:
        selector.register(reader, selectors.EVENT_READ)
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                yield None
                return
            if not selector.select(left):
                continue
            chunk = os.read(reader, 1 << 16)
            if not chunk:
                return
            *lines, held = (held + chunk).split(b"\n")
            for line in lines:
                yield json.loads(line)


def _kill(process: subprocess.Popen) -> None:
    """The process and what it has begun, if it has not ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
