"""Correctness of every kernel and loss on a device, by pytest on all cores: a crash or a hang fails one test only.

The kernels' own tests are in ``tests/kernels/device``, the checks of the losses in ``benchmarks/checks``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.checks.plugin import OUTCOMES
from benchmarks.peers.peer import interpreted
from benchmarks.records import ROOT

KERNELS, LOSSES = ROOT / "tests" / "kernels" / "device", ROOT / "benchmarks" / "checks"
LINES = 4  # of an error message that are kept


@dataclass
class Summary:
    """The outcome of the tests.

    Attributes:
        passed, failed, skipped: numbers of tests.
        failures: "name: message" of those that failed.
        skips: how many were skipped, by reason.
        finished: whether all ran; False if the time ran out.
    """

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)
    skips: dict[str, int] = field(default_factory=dict)
    finished: bool = True

    def fail(self, name: str, message: str) -> None:
        self.failed += 1
        self.failures.append(f"{name}: {message}"[:1000])

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def check(
    device: torch.device, *, seconds: float, select: str | None = None, folders: Sequence[Path] | None = None
) -> Summary:
    """Run the tests on ``device``.

    Args:
        device: a GPU, or the CPU, where the kernels' tests run in Triton's interpreter or not at all.
        seconds: after which the tests are stopped; the outcomes so far are kept.
        select: only tests whose names match, as with pytest's ``-k``.
        folders: of the tests.
    """
    if folders is None:
        folders = [KERNELS, LOSSES] if device.type == "cuda" or interpreted() else [LOSSES]
    there = [folder for folder in folders if folder.is_dir()]
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = Path(scratch, "outcomes")
        outcomes.touch()
        code, said = _pytest(command(there, device, select), environment(device, outcomes), seconds)
        found = _summary(outcomes.read_text(encoding="utf-8"))
    found.finished = code is not None
    for folder in folders:
        if folder not in there:
            found.skips[f"{folder.name} is not there: installed without the tests"] = 1
    if code not in (None, 0, 1):
        found.fail("pytest", f"exit code {code}: {said}")
    elif found.finished and not found.passed + found.failed:
        found.fail("pytest", "no test ran")
    return found


def command(folders: Sequence[Path], device: torch.device, select: str | None) -> list[str]:
    made = [sys.executable, "-m", "pytest", *map(str, folders), "-o", "addopts=", "-p", "no:cacheprovider"]
    made += ["-p", "benchmarks.checks.plugin", "--continue-on-collection-errors", "--tb=short"]
    made += ["-n", "auto"] if find_spec("xdist") is not None else []
    made += ["-k", select] if select is not None else []
    made += ["--bench-device", device.type] if LOSSES in folders else []
    return made


def environment(device: torch.device, outcomes: Path) -> dict[str, str]:
    """Of the tests' process: both packages can be imported; Triton is interpreted on a CPU only."""
    made = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET" or device.type == "cpu"}
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**made, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore", OUTCOMES: str(outcomes)}


def _pytest(command: Sequence[str], environment: Mapping[str, str], seconds: float) -> tuple[int | None, str]:
    """The exit code of pytest, None if it was stopped, and its last lines."""
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with its workers
            process.wait()
        out.seek(0)
        return code, last_lines(out.read().decode(errors="replace"))


def _summary(lines: str) -> Summary:
    tests = {test["name"]: test for test in map(json.loads, lines.splitlines())}
    found = Summary()
    for name, test in tests.items():
        if test["outcome"] == "failed":
            path, *rest = name.split("::", 1)
            found.fail("::".join([Path(path).name, *rest]), last_lines(test["detail"]))
        elif test["outcome"] == "skipped":
            found.skipped += 1
            found.skips[test["detail"]] = found.skips.get(test["detail"], 0) + 1
        else:
            found.passed += 1
    return found


def last_lines(text: str) -> str:
    """The lines that pytest marks as the error, or the last ones, in one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    marked = [line.removeprefix("E").strip() for line in lines if line.startswith("E ")]
    return " | ".join((marked or lines)[-LINES:])
