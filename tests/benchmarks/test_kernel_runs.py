"""How the benchmarks run the kernels' tests: whatever becomes of the process, each test has its outcome."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import interpreted  # noqa: E402

from benchmarks import kernel_tests  # noqa: E402
from benchmarks.correctness import OUT_OF_TIME, Check, summary  # noqa: E402

CPU = torch.device("cpu")
ALL_KINDS = """
import os, pytest

@pytest.mark.parametrize("text", ["a b", "c PASSED d"])
def test_good(text): pass
def test_bad(): assert 1 + 1 == 3, "sums"
@pytest.mark.skip(reason="not today")
def test_skipped(): pass
@pytest.fixture
def after():
    yield
    raise OSError("left behind")
def test_teardown(after): pass
def test_interpreted(): assert os.environ["TRITON_INTERPRET"] == "1"
"""
CRASH = """
import os, signal
def test_before(): pass
def test_crash(): os.kill(os.getpid(), signal.SIGSEGV)
def test_behind(): pass
"""
DEAD = """
state = []
def test_kills():
    state.append(1)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_behind(): assert not state
"""


def run(folder: Path, deadline: float | None = None, only: str | None = None, **files: str) -> dict[str, Check]:
    """{test: check} of test files with these texts."""
    folder.mkdir(exist_ok=True)
    (folder / "pytest.ini").write_text("[pytest]\n")  # its own root, so names are short
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    found = kernel_tests.check_kernels(CPU, only=only, deadline=deadline, folder=folder)
    assert len({c.name for c in found}) == len(found)
    return {c.name.split("::")[-1]: c for c in found}


def test_outcomes_and_details(tmp_path):
    found = run(tmp_path, test_kinds=ALL_KINDS)
    assert {name: check.outcome for name, check in found.items()} == {
        "test_good[a b]": "passed", "test_good[c PASSED d]": "passed", "test_bad": "failed", "test_skipped": "skipped",
        "test_teardown": "failed", "test_interpreted": "passed",
    }  # fmt: skip
    assert "sums" in found["test_bad"].detail
    assert "left behind" in found["test_teardown"].detail
    assert summary(found.values())["skips"] == {"not today": 1}


def test_a_crash_fails_its_test_and_another_process_goes_on(tmp_path):
    found = run(tmp_path, test_a=CRASH, test_b="def test_other(): pass")
    assert {name: check.outcome for name, check in found.items()} == {
        "test_before": "passed", "test_crash": "failed", "test_behind": "passed", "test_other": "passed",
    }  # fmt: skip
    assert "died with code -11" in found["test_crash"].detail


def test_a_dead_device_is_left_for_a_new_process(tmp_path):
    found = run(tmp_path, test_a=DEAD)
    assert [check.outcome for check in found.values()] == ["failed", "passed"]


def test_processes_that_die_one_after_another_are_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_tests, "PROCESSES", 2)
    text = "import os\n" + "".join(f"def test_{i}(): os._exit(3)\n" for i in range(4))
    found = run(tmp_path, test_a=text)
    assert [check.outcome for check in found.values()] == ["failed", "failed", "skipped", "skipped"]
    assert found["test_3"].detail == "too many processes died"


def test_what_was_told_before_the_deadline_is_kept(tmp_path):
    text = "import time\ndef test_quick(): pass\ndef test_slow(): time.sleep(60)\ndef test_behind(): pass"
    start = time.monotonic()
    found = run(tmp_path, start + 5, test_a=text)
    assert time.monotonic() - start < 20
    assert {name: check.outcome for name, check in found.items()} == {
        "test_quick": "passed", "test_slow": "skipped", "test_behind": "skipped",
    }  # fmt: skip
    assert found["test_slow"].detail == OUT_OF_TIME
    none = run(tmp_path, time.monotonic() - 1)
    assert [(c.outcome, c.detail) for c in none.values()] == [("skipped", OUT_OF_TIME)]


def test_a_test_that_hangs_fails(tmp_path, monkeypatch):
    """The deadline ends it; that it ran for longer than any test may is no matter of time."""
    monkeypatch.setattr(kernel_tests, "HUNG", 1.0)
    text = "import time\ndef test_quick(): pass\ndef test_stuck(): time.sleep(90)\ndef test_behind(): pass"
    found = run(tmp_path, time.monotonic() + 12, test_a=text)
    assert [check.outcome for check in found.values()] == ["passed", "failed", "skipped"]
    assert "still running" in found["test_stuck"].detail


def test_broken_files_and_none_at_all_fail(tmp_path):
    found = run(tmp_path, test_a="import nowhere_to_be_found", test_b="def test_fine(): pass")
    assert found["test_a.py"].outcome == "failed"
    assert "nowhere_to_be_found" in found["test_a.py"].detail
    assert found["test_fine"].outcome == "passed"
    assert run(tmp_path, only="nothing like it")["kernel tests"].outcome == "failed"
    assert run(tmp_path / "hollow", test_a="")["kernel tests"].outcome == "failed"
    broken = run(tmp_path / "conftest", test_a="def test_a(): pass", conftest="raise SystemError('no')")
    assert broken["kernel tests"].outcome == "failed"
    skips = "import pytest\n@pytest.mark.skip(reason='no device')\ndef test_a(): pass"
    assert "no test ran" in run(tmp_path / "skips", test_a=skips)["kernel tests"].detail


def test_an_absent_folder_is_skipped(tmp_path):
    (check,) = kernel_tests.check_kernels(CPU, only=None, deadline=None, folder=tmp_path / "none")
    assert check.outcome == "skipped"
    assert "installed without the tests" in check.detail


def test_a_gpu_is_not_interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" not in kernel_tests.environment(torch.device("cuda"))
    assert kernel_tests.environment(CPU)["TRITON_INTERPRET"] == "1"


@pytest.mark.slow
def test_the_kernels_own_tests_run():
    reason = interpreted.reason_to_skip()
    if reason is not None:
        pytest.skip(reason)
    seen = []
    found = kernel_tests.check_kernels(CPU, only="rows", deadline=time.monotonic() + 8, report=seen.append)
    assert seen == found
    assert summary(found)["failures"] == []
    assert summary(found)["passed"] > 0
