from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from caop_fast.calibration import calibration_metrics
from caop_fast.cli import main
from caop_fast.demo.base import BaseConfig
from caop_fast.demo.run import ALL_ARMS, DemoConfig, prepare_folder, run_demo
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
    assert {"task", "seed", "seconds", "arms", "history"} <= set(summary)
    assert [arm["name"] for arm in summary["arms"]] == list(ALL_ARMS)
    metrics = {"accuracy", "mean_confidence", "overconfidence_gap", "ece", "brier", "spr", "auroc"}
    for arm in summary["arms"]:
        assert metrics | {"answer_entropy", "confidence_entropy"} <= set(arm)
        assert metrics <= set(arm["expected"])
        assert metrics <= set(arm["greedy"])
    for name in ALL_ARMS[1:]:
        records = [r for r in summary["history"] if r["arm"] == name]
        assert [r["step"] for r in records] == [0, 2, 3]
        assert {"accuracy", "gap", "ece", "answer_entropy", "confidence_entropy"} <= set(records[0])


def test_the_numbers_are_those_of_the_answers_on_disk(finished):
    out, summary = finished
    for arm in summary["arms"]:
        for entry, suffix in ((arm, ""), (arm["greedy"], "-greedy")):
            records = lines(out / "answers" / f"{arm['name']}{suffix}.jsonl")
            assert len(records) == 60
            correct = [r["correct"] for r in records]
            for reading, key in ((entry, "confidence"), (entry["expected"], "expected")):
                stated = [np.nan if r[key] is None else r[key] for r in records]
                metrics = calibration_metrics(correct, stated)
                for name in ("accuracy", "ece", "brier", "spr"):
                    assert reading[name] == pytest.approx(metrics[name], abs=1e-5)


def test_all_arms_answer_the_same_prompts_and_learn_something_else(finished):
    out, _ = finished
    answers = {name: lines(out / "answers" / f"{name}.jsonl") for name in ALL_ARMS}
    ids = [[r["prompt_id"] for r in records] for records in answers.values()]
    assert all(i == ids[0] for i in ids)
    assert len({json.dumps([r["expected"] for r in records]) for records in answers.values()}) == len(ALL_ARMS)


def test_the_audit_reads_what_the_demo_wrote(finished, capsys):
    out, summary = finished
    assert main(["audit", str(out / "answers" / "caop.jsonl"), "--json", "--resamples", "10"]) == 0
    report = json.loads(capsys.readouterr().out)
    text = json.dumps(report)
    caop = next(arm for arm in summary["arms"] if arm["name"] == "caop")
    assert report
    assert str(caop["ece"])[:8] in text


def test_the_page_is_there_and_shows_the_verdict(finished):
    out, _ = finished
    page = (out / "demo.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "CaOP" in page


def test_the_same_seed_gives_the_same_numbers(finished, tmp_path):
    _, summary = finished
    again = run_demo(config(tmp_path / "again", arms=("opd",)))
    assert again["arms"][0] == summary["arms"][1]


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
    "bad", [{"task": "chess"}, {"arms": ("sft",)}, {"arms": ()}, {"arms": ("opd", "opd")}, {"seed": -1}]
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
    run_demo(DemoConfig(out=Path({out!r}), base=base, train=train, arms=("opd", "caop"), heldout=4))
"""


def group_ends(group: int, seconds: float = 20.0) -> bool:
    """Whether every process of the group ends; multiprocessing's own helper takes a moment after its parent."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_ctrl_c_leaves_checkpoints_and_no_process_behind(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(out=str(tmp_path / "run")))
    process = subprocess.Popen([sys.executable, str(script)], start_new_session=True, stderr=subprocess.PIPE)
    checkpoints = [tmp_path / "run" / "arms" / arm / "checkpoint.pt" for arm in ("opd", "caop")]
    try:
        deadline = time.monotonic() + 120
        while not all(c.exists() for c in checkpoints):
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group
        assert process.wait(timeout=60) != 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert group_ends(process.pid), "processes were left behind"
    assert all(load_checkpoint(c)["step"] >= 1 for c in checkpoints)
    assert (tmp_path / "run" / "base" / "model.safetensors").exists()
