from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock, Timeout

from caop_fast.calibration import calibration_metrics
from caop_fast.cli import main
from caop_fast.demo.base import BaseConfig
from caop_fast.demo.methods import MethodJob
from caop_fast.demo.run import ALL_METHODS, DemoConfig, _method_process, prepare_folder, run_demo
from caop_fast.training import TrainConfig
from caop_fast.training.checkpoint import load_checkpoint

BASE = BaseConfig(hidden_size=64, num_layers=1, steps=60, bare_per_step=32, example_per_step=16, warmup_steps=5)
TRAIN = TrainConfig(steps=3, prompts_per_step=4, rollouts_per_prompt=4, log_every=2, checkpoint_every=1)


def config(out: Path, **overrides) -> DemoConfig:
    return DemoConfig(out=out, base=BASE, train=TRAIN, heldout=60, **overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "run"
    return out, run_demo(config(out))


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_summary_has_its_published_form(finished):
    out, summary = finished
    assert json.loads((out / "summary.json").read_text()) == summary
    assert {"task", "seed", "seconds", "methods", "history"} <= set(summary)
    assert [method["name"] for method in summary["methods"]] == list(ALL_METHODS)
    metrics = {"accuracy", "mean_confidence", "overconfidence_gap", "ece", "brier", "spr", "auroc"}
    for method in summary["methods"]:
        assert metrics | {"answer_entropy", "confidence_entropy"} <= set(method)
        assert metrics <= set(method["expected"])
        assert metrics <= set(method["greedy"])
    for name in ALL_METHODS[1:]:
        records = [r for r in summary["history"] if r["method"] == name]
        assert [r["step"] for r in records] == [0, 2, 3]
        assert {"accuracy", "gap", "ece", "answer_entropy", "confidence_entropy"} <= set(records[0])


def test_the_numbers_are_those_of_the_answers_on_disk(finished):
    out, summary = finished
    for method in summary["methods"]:
        for entry, suffix in ((method, ""), (method["greedy"], "-greedy")):
            records = lines(out / "answers" / f"{method['name']}{suffix}.jsonl")
            assert len(records) == 60
            correct = [r["correct"] for r in records]
            for reading, key in ((entry, "confidence"), (entry["expected"], "expected")):
                stated = [np.nan if r[key] is None else r[key] for r in records]
                metrics = calibration_metrics(correct, stated)
                for name in ("accuracy", "ece", "brier", "spr"):
                    assert reading[name] == pytest.approx(metrics[name], abs=1e-5)


def test_all_arms_answer_the_same_prompts_and_learn_something_else(finished):
    out, _ = finished
    answers = {name: lines(out / "answers" / f"{name}.jsonl") for name in ALL_METHODS}
    ids = [[r["prompt_id"] for r in records] for records in answers.values()]
    assert all(i == ids[0] for i in ids)
    assert len({json.dumps([r["expected"] for r in records]) for records in answers.values()}) == len(ALL_METHODS)


def test_the_audit_reads_what_the_demo_wrote(finished, capsys):
    out, summary = finished
    assert main(["audit", str(out / "answers" / "caop.jsonl"), "--json", "--resamples", "10"]) == 0
    report = json.loads(capsys.readouterr().out)
    text = json.dumps(report)
    caop = next(method for method in summary["methods"] if method["name"] == "caop")
    assert report
    assert str(caop["ece"])[:8] in text


def test_the_page_is_there_and_shows_the_verdict(finished):
    out, _ = finished
    page = (out / "demo.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "CaOP" in page


def test_the_same_seed_gives_the_same_numbers(finished, tmp_path):
    _, summary = finished
    again = run_demo(config(tmp_path / "again", methods=("opd",)))
    assert again["methods"][0] == summary["methods"][1]


def test_a_finished_run_is_moved_aside_never_overwritten(finished, tmp_path):
    first = config(tmp_path / "run")
    assert prepare_folder(first) is None
    (first.out / "summary.json").write_text("{}")
    assert prepare_folder(first) == tmp_path / "run.1"
    assert (tmp_path / "run.1" / "summary.json").exists()
    assert prepare_folder(config(tmp_path / "run", seed=1)) == tmp_path / "run.2"  # another recipe
    assert prepare_folder(config(tmp_path / "run", seed=1)) is None  # unfinished, the same: goes on


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="folder with other things"):
        prepare_folder(config(tmp_path))


@pytest.mark.parametrize(
    "bad", [{"task": "chess"}, {"methods": ("sft",)}, {"methods": ()}, {"methods": ("opd", "opd")}, {"seed": -1}]
)
def test_bad_options_are_named(bad, tmp_path):
    with pytest.raises(ValueError, match=next(iter(bad))):
        DemoConfig(out=tmp_path, **bad)


SCRIPT = """
from pathlib import Path
from caop_fast.demo.base import BaseConfig
from caop_fast.demo.run import DemoConfig, run_demo
from caop_fast.training import TrainConfig
if __name__ == "__main__":
    base = BaseConfig(hidden_size=32, num_layers=1, steps=3, bare_per_step=8, example_per_step=8, warmup_steps=1)
    train = TrainConfig(steps=100000, prompts_per_step=2, rollouts_per_prompt=2, checkpoint_every=1)
    run_demo(DemoConfig(out=Path({out!r}), base=base, train=train, methods=("opd", "caop"), heldout=4))
"""


pytestmark = pytest.mark.long


def group_ends(group: int, seconds: float = 120.0) -> bool:
    """Whether every process of the group ends; multiprocessing's own helper takes a moment after its parent."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@contextlib.contextmanager
def two_arms_at_work(tmp_path: Path) -> Iterator[tuple[subprocess.Popen, list[Path]]]:
    """A demo in a process group of its own, once both its methods have saved; with the methods' checkpoints."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(out=str(tmp_path / "run")))
    process = subprocess.Popen([sys.executable, str(script)], start_new_session=True, stderr=subprocess.PIPE)
    checkpoints = [tmp_path / "run" / "methods" / method / "checkpoint.pt" for method in ("opd", "caop")]
    try:
        deadline = time.monotonic() + 120
        while not all(c.exists() for c in checkpoints):
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield process, checkpoints
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_ctrl_c_leaves_checkpoints_and_no_process_behind(tmp_path):
    with two_arms_at_work(tmp_path) as (process, checkpoints):
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group
        assert process.wait(timeout=60) != 0
        assert group_ends(process.pid), "processes were left behind"
    assert all(load_checkpoint(c)["step"] >= 1 for c in checkpoints)
    assert (tmp_path / "run" / "base" / "model.safetensors").exists()


def test_arms_whose_parent_is_killed_save_and_end_and_keep_the_folder_until_then(tmp_path):
    with two_arms_at_work(tmp_path) as (process, checkpoints):
        with pytest.raises(ValueError, match=r"out='.*run' is in use by another demo"):
            run_demo(config(tmp_path / "run", seed=1))
        assert not (tmp_path / "run.1").exists()
        method_locks = [c.with_name(".lock") for c in checkpoints]
        for lock in method_locks:
            with pytest.raises(Timeout):
                FileLock(lock, timeout=0).acquire()
        process.terminate()
        assert process.wait(timeout=60) == -signal.SIGTERM
        assert group_ends(process.pid), "methods go on without their parent"
    assert all(load_checkpoint(c)["step"] >= 1 for c in checkpoints)
    for lock in method_locks:
        FileLock(lock, timeout=0).acquire()


HOLDER = (
    "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); sys.stdin.read()"
)


@pytest.mark.parametrize("lock", [".run.lock", "run/methods/opd/.lock"])
def test_a_folder_in_use_is_refused_untouched_and_a_lock_left_behind_is_none(lock, tmp_path, monkeypatch):
    done = config(tmp_path / "run")
    prepare_folder(done)
    (done.out / "methods" / "opd").mkdir(parents=True)
    (done.out / "summary.json").write_text("{}")  # the next run would move it
    monkeypatch.setattr("caop_fast.demo.run.STOP_SECONDS", 0.2)
    monkeypatch.setattr("caop_fast.demo.run._train_base", lambda config, task, progress: 1 / 0)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline()
        (tmp_path / "link").symlink_to(done.out)
        for out in (done.out, tmp_path / "run" / ".." / "run", tmp_path / "link"):  # all the same folder
            with pytest.raises(ValueError, match="is in use by another demo"):
                run_demo(config(out))
        assert not (tmp_path / "run.1").exists()
    finally:
        holder.kill()
        holder.communicate()
    assert (tmp_path / lock).exists()
    for _ in range(2):  # a run that fails lets go of its lock
        with pytest.raises(ZeroDivisionError):
            run_demo(done)
    assert (tmp_path / "run.1" / "summary.json").exists()


@pytest.mark.parametrize("name", ["link", "."])
def test_a_folder_by_another_name_is_moved_itself(name, tmp_path, monkeypatch):
    done = config(tmp_path / "run")
    prepare_folder(done)
    (done.out / "summary.json").write_text("{}")
    (tmp_path / "link").symlink_to(done.out)
    monkeypatch.setattr("caop_fast.demo.run._train_base", lambda config, task, progress: 1 / 0)
    monkeypatch.chdir(tmp_path if name == "link" else done.out)
    with pytest.raises(ZeroDivisionError):
        run_demo(config(Path(name)))
    assert (tmp_path / "run.1" / "summary.json").exists()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "run" / "run.json").exists()


class TestMethodProcess:
    @pytest.fixture
    def ended(self, tmp_path, monkeypatch):
        """Run a method's process in this one: (its work, whether the parent lives, whether to stop) -> its messages."""

        def run(work, *, parent_lives=True, stopped=False):
            parent = types.SimpleNamespace(is_alive=lambda: parent_lives)
            monkeypatch.setattr("multiprocessing.parent_process", lambda: parent)
            monkeypatch.setattr("caop_fast.demo.run.run_method", work)
            sent = []
            messages = types.SimpleNamespace(put=sent.append, cancel_join_thread=lambda: None)
            stop = types.SimpleNamespace(is_set=lambda: stopped)
            job = MethodJob(name="opd", task="pronounce", seed=0, folder=tmp_path, train=TRAIN)
            previous = signal.getsignal(signal.SIGINT)
            try:
                _method_process(job, messages, stop)
            finally:
                signal.signal(signal.SIGINT, previous)
            return sent

        return run

    @pytest.mark.parametrize("told", [{"parent_lives": False}, {"stopped": True}])
    def test_it_does_not_start_when_its_parent_is_gone_or_stopping(self, told, ended):
        """It may come to life after its parent died; a successor may then be at work in the folder."""
        with pytest.raises(SystemExit) as exit_:
            ended(lambda job, report: pytest.fail("started"), **told)
        assert exit_.value.code == 130, "a method that ended without its result must not look done"

    def test_ctrl_c_is_left_to_the_parent(self, ended):
        def work(job, report):
            signal.raise_signal(signal.SIGINT)
            report("evaluate", 1)

        assert ended(work) == [("opd", "evaluate", 1), ("opd", "done", None)]

    def test_a_failure_is_sent_as_text(self, ended):
        (message,) = ended(lambda job, report: 1 / 0)
        assert message[:2] == ("opd", "failed")
        assert "ZeroDivisionError" in message[2]


class TestCommand:
    def test_a_file_is_no_folder(self, tmp_path, capsys):
        (tmp_path / "notes").write_text("mine")
        for out in (tmp_path / "notes", tmp_path / "notes" / "run"):
            assert main(["demo", "--out", str(out)]) == 2
            assert str(tmp_path / "notes") in capsys.readouterr().err
        assert (tmp_path / "notes").read_text() == "mine"

    @pytest.mark.parametrize("content", [b'{"task": ', b"\xff\xfe{"])
    def test_a_broken_record_is_named_and_nothing_moved(self, content, tmp_path, capsys):
        record = tmp_path / "run" / "run.json"
        record.parent.mkdir()
        record.write_bytes(content)
        assert main(["demo", "--out", str(record.parent)]) == 2
        error = capsys.readouterr().err
        assert f"{record} is broken" in error
        assert error.count("\n") == 1
        assert record.read_bytes() == content

    def test_bad_seeds_are_refused(self, tmp_path, capsys):
        assert main(["demo", "--seed", "-1", "--out", str(tmp_path / "run")]) == 2
        assert "seed must lie in" in capsys.readouterr().err

    def test_a_failed_arm_is_told_with_its_own_traceback(self, tmp_path, capsys, monkeypatch):
        out = tmp_path / "run"
        monkeypatch.setattr("caop_fast.demo.run.DemoConfig", lambda **told: config(tmp_path / "run", methods=("opd",)))
        prepare_folder(config(out))
        (out / "base").mkdir()  # no model in it: the method cannot load it
        assert main(["demo", "--out", str(out)]) == 1
        error = capsys.readouterr().err
        assert "caop-fast demo: method opd failed:\nTraceback" in error
        assert "run_method" in error
        assert "_run_methods" not in error, "the parent's own frames say nothing"

    def test_a_closed_pipe_ends_without_a_traceback(self, tmp_path):
        code = (
            "import sys, caop_fast.demo.run as r, caop_fast.demo.page as p; from caop_fast.cli import main\n"
            "r.run_demo = lambda config: {'seconds': 1.0}; p.demo_table = p.demo_verdict = lambda s: 'x' * 100\n"
            "sys.exit(main(['demo']))"
        )
        read, write = os.pipe()
        os.close(read)
        try:
            done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, check=False)
        finally:
            os.close(write)
        assert done.returncode == 141
        assert done.stderr == b""


def test_the_command_line_offers_what_there_is():
    """The names stand there a second time so that ``--help`` need not load torch."""
    from caop_fast.demo import command, tasks

    assert command.TASKS == tasks.TASK_NAMES
    assert command.METHODS == ALL_METHODS
