"""How the benchmarks run the correctness tests: whatever happens to a process, each test has its outcome."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools import device_tests

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


def run(folder: Path, *, seconds: float = 120.0, select: str | None = None, **files: str) -> dict[str, Any]:
    """The outcome of test files with these texts."""
    tests = folder / "tests"
    tests.mkdir(exist_ok=True)
    for name, text in files.items():
        (tests / f"{name}.py").write_text(text)
    return device_tests.check("cpu", folder / "outcomes.jsonl", seconds=seconds, select=select, tests=[tests])


def test_crashes_and_hangs_fail_their_test_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(device_tests.HANGING, "3")
    found = run(tmp_path, test_a=OUTCOMES, test_b="import nowhere_to_be_found")
    assert found["finished"]
    assert found["skipped"] == 1
    failures = dict(text.split(": ", 1) for text in found["failures"])
    assert {name.split("::")[-1].split("/")[-1] for name in failures} == {
        "test_bad", "test_crash", "test_hang", "test_teardown", "test_b.py"
    }  # fmt: skip
    assert found["failed"] == len(failures)
    assert found["passed"] >= 3  # test_good twice and test_last
    text = " ".join(found["failures"])
    assert all(part in text for part in ("sums", "crashed while running", "left behind", "nowhere_to_be_found"))


COUNTED = """
import pathlib, time
def test_quick():
    with open(pathlib.Path(__file__).with_name("count"), "a") as file: file.write("quick ")
def test_slow():
    with open(pathlib.Path(__file__).with_name("count"), "a") as file: file.write("slow ")
    time.sleep(SLEEP)
"""


def test_a_second_call_runs_what_the_first_did_not_decide(tmp_path: Path) -> None:
    found = run(tmp_path, seconds=15.0, test_a=COUNTED.replace("SLEEP", "100"))
    assert (found["passed"], found["failed"], found["finished"]) == (1, 0, False)
    outcomes = tmp_path / "outcomes.jsonl"
    (line,) = outcomes.read_text().split("\n")[1:-1]
    assert json.loads(line)["outcome"] == "passed"
    with outcomes.open("a") as file:
        file.write('{"name": "test_cut')  # the process was killed while it wrote
    found = run(tmp_path, test_a=COUNTED.replace("SLEEP", "0"))
    assert (found["passed"], found["failed"], found["finished"]) == (2, 0, True)
    assert (tmp_path / "tests" / "count").read_text() in ("quick slow slow ", "slow quick slow ")
    assert run(tmp_path)["finished"], "nothing is left"
    outcomes.write_text(outcomes.read_text().replace("passed", "failed"))
    assert run(tmp_path)["passed"] == 2, "what failed runs again"


SKIPS = """
import pytest
@pytest.mark.skip(reason="no device")
def test_kernel(): pass
def test_other(): pass
"""


def test_nothing_that_runs_is_a_failure(tmp_path: Path) -> None:
    found = run(tmp_path, select="kernel", test_a=SKIPS)
    assert (found["passed"], found["failed"], found["skipped"]) == (0, 1, 1)
    found = run(tmp_path, conftest="raise SystemError('no')")
    assert found["failed"] == 1
    assert "SystemError: no" in found["failures"][0]


def test_a_gpu_is_not_interpreted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    outcomes = tmp_path / "x"
    outcomes.touch()
    assert "TRITON_INTERPRET" not in device_tests.environment("cuda", outcomes)
    assert device_tests.environment("cpu", outcomes)["TRITON_INTERPRET"] == "1"
