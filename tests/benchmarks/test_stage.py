"""The correctness stage within a run: what was decided stays, whatever ended the process."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import correctness, records, stage  # noqa: E402
from benchmarks.checks.closeness import Wrong  # noqa: E402
from benchmarks.checks.trial import Trial  # noqa: E402
from benchmarks.run import Dead  # noqa: E402

CPU = torch.device("cpu")
NAMES = ("first", "second", "third")


class Killed(BaseException):
    """What no check catches, as little as the end of the process."""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Another process in the same file: which checks it began, and how many have failed."""
    path = tmp_path / "a.json"
    records.Results(path, records.header(CPU)).save()

    def run(outcomes, *, seconds=60.0, ended=None, most=99) -> tuple[list[str], int]:
        begun = []

        def trial(name):
            def body(setting):
                error = outcomes.get(name)
                if error is not None:
                    raise error

            return Trial(name, body)

        def begin(name, more):
            begun.append(name)
            if len(begun) > most:
                raise Killed

        monkeypatch.setattr(correctness, "trials", lambda sizes: [trial(name) for name in NAMES])
        results = records.load(path)
        made = stage.Stage(results, CPU, time.monotonic() + 60, seconds, begin, lambda text: None, ended)
        return begun, made.run()

    run.header = lambda: records.load(path).header
    return run


def test_a_whole_stage_is_not_run_again(run):
    assert run({"second": Wrong("by far")}) == ([*NAMES], 1)
    assert stage.CHECKS not in run.header()
    assert run.header()["correctness"]["failures"] == ["second: by far"]
    assert run({}) == ([], 1), "and its failures stay"


def test_a_stage_that_was_cut_off_goes_on(run, monkeypatch):
    now = iter([0.0, 0.0, 0.0, 999.0, *[999.0] * 9])
    monkeypatch.setattr(stage.time, "monotonic", lambda: 0.0)
    monkeypatch.setattr(correctness.time, "monotonic", lambda: next(now))
    begun, failed = run({"first": Wrong("by far")})
    assert begun
    assert len(begun) < len(NAMES)
    assert failed == 1
    assert correctness.OUT_OF_TIME in run.header()["correctness"]["skips"]
    monkeypatch.undo()
    rest, failed = run({})
    assert [*begun, *rest] == [*NAMES]
    assert failed == 1, "a failure is not forgotten"
    assert run.header()["correctness"]["passed"] == 2
    assert run.header()["correctness"]["skips"] == {}


def test_a_check_that_ends_the_process_fails_and_the_next_go_on(run):
    with pytest.raises(Killed):
        run({}, most=1)
    begun, failed = run({}, ended="it died of SIGSEGV")
    assert (begun, failed) == (["third"], 1)
    assert "SIGSEGV" in run.header()["correctness"]["failures"][0]


def test_a_check_that_was_stopped_from_outside_runs_again_but_once(run):
    for _ in range(2):
        with pytest.raises(Killed):
            run({}, most=0)
    assert run({}) == (["second", "third"], 1)


def test_a_dead_device_is_left_to_the_next_process(run, monkeypatch):
    monkeypatch.setattr(stage, "alive", lambda device: False)
    monkeypatch.setattr(correctness, "alive", lambda device: False)
    with pytest.raises(Dead):
        run({"second": RuntimeError("illegal memory access")})
    monkeypatch.undo()
    monkeypatch.setattr(correctness, "trials", lambda sizes: [])
    assert run.header()["correctness"]["passed"] == 1
    assert stage.CHECKS in run.header()


def test_processes_of_one_command_share_the_time(run):
    with pytest.raises(Killed):
        run({}, most=0)
    time.sleep(1.0)
    assert run({}, seconds=0.5, ended="it hung") == ([], 1)
    assert run.header()["correctness"]["skips"] == {correctness.OUT_OF_TIME: 2}
    assert run({}, seconds=60.0) == (["second", "third"], 1), "the next command has time of its own"


@pytest.mark.parametrize("outcome", ["skipped", "passed"])
def test_kernels_of_which_nothing_ran_fail(run, monkeypatch, outcome):
    """Although losses were checked before them."""
    folder = Path(run.header.__closure__[0].cell_contents).parent / "kernels"
    folder.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\n")
    mark = "@pytest.mark.skip(reason='no device')" if outcome == "skipped" else ""
    (folder / "test_it.py").write_text(f"import pytest\n{mark}\ndef test_one(): pass\n")
    monkeypatch.setattr(stage, "backend", lambda: "triton")
    check = stage.kernel_tests.check_kernels
    monkeypatch.setattr(stage.kernel_tests, "check_kernels", lambda *a, **k: check(*a, **k, folder=folder))
    monkeypatch.setattr(correctness, "_run", lambda trial, setting: (correctness.Check(trial.name, "passed"), False))
    _, failed = run({})
    assert failed == (outcome == "skipped")


def test_no_time_for_it(run):
    assert run({}, seconds=0.0) == ([], 0)
    assert "correctness" not in run.header()
