"""How the benchmarks run the correctness tests: whatever happens to a process, each test has its outcome."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import correctness
from benchmarks.correctness import Summary

CPU = torch.device("cpu")
OUTCOMES = """
import os, signal, time, pytest

@pytest.mark.parametrize("text", ["a b", "c PASSED d"])
def test_good(text): pass
def test_bad(): assert 1 + 1 == 3, "sums"
@pytest.mark.skip(reason="not today")
def test_skipped(): pass
def test_crash(): os.kill(os.getpid(), signal.SIGSEGV)
def test_hang(): time.sleep(100)
@pytest.fixture
def after():
    yield
    raise OSError("left behind")
def test_teardown(after): pass
def test_last(): pass
"""


def run(folder: Path, *, select: str | None = None, **files: str) -> Summary:
    """The outcome of test files with these texts."""
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return correctness.check(CPU, seconds=120.0, select=select, folders=[folder, folder.parent / "none"])


def test_crashes_and_hangs_fail_their_test_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAOP_HANGING_TEST_SECONDS", "3")
    found = run(tmp_path / "tests", test_a=OUTCOMES, test_b="import nowhere_to_be_found")
    assert found.finished
    assert found.skips == {"not today": 1, "none is not there: installed without the tests": 1}
    failures = dict(text.split(": ", 1) for text in found.failures)
    assert {name.split("::")[-1] for name in failures} == {
        "test_bad", "test_crash", "test_hang", "test_teardown", "test_b.py"
    }  # fmt: skip
    assert found.failed == len(failures)
    assert found.passed >= 3  # test_good twice and test_last
    text = " ".join(found.failures)
    assert all(part in text for part in ("sums", "crashed while running", "left behind", "nowhere_to_be_found"))


SLOW = """
import json, os, time
with open(os.environ["CAOP_OUTCOMES"], "a") as file:
    print(json.dumps({"name": "test_a.py::test_quick", "outcome": "passed", "detail": ""}), file=file)
time.sleep(100)
"""


def test_what_ended_before_the_deadline_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correctness, "command", lambda *arguments: [sys.executable, "-c", SLOW])
    found = correctness.check(CPU, seconds=4.0, folders=[tmp_path])
    assert (found.passed, found.failed, found.finished) == (1, 0, False)


SKIPS = """
import pytest
@pytest.mark.skip(reason="no device")
def test_kernel(): pass
def test_other(): pass
"""


def test_nothing_that_runs_is_a_failure(tmp_path: Path) -> None:
    found = run(tmp_path, select="kernel", test_a=SKIPS)
    assert (found.passed, found.failed, found.skipped) == (0, 1, 1)
    assert "no device" in found.skips
    assert found.failures == ["pytest: no test ran"]
    found = run(tmp_path, conftest="raise SystemError('no')")
    assert found.failed == 1
    assert "SystemError: no" in found.failures[0]


def test_a_gpu_is_not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" not in correctness.environment(torch.device("cuda"), Path("x"))
    assert correctness.environment(CPU, Path("x"))["TRITON_INTERPRET"] == "1"
