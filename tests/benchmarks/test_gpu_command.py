"""`python -m benchmarks.gpu` from its first line to its last, with Triton's interpreter as the GPU."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

import interpreted
import pytest
import torch

from benchmarks import cases, command, records, run

pytestmark = pytest.mark.slow
QUICKLY = ("--device", "cpu", "--selection", "tiny", "--seconds", "0.01", "--rounds", "3", "--minutes", "8")
IMPLS = ("caop_fast", "official", "plain", "liger-fused-linear-jsd", "trl-chunked")


def gpu(folder, *arguments, **environment):
    """The command on the interpreter; everything it leaves goes to ``folder``."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(folder), *QUICKLY, *arguments],
        capture_output=True, text=True, cwd=records.ROOT, env={**interpreted.environment(), **environment}, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run: correctness of every loss and of one kernel's tests, then every suite and the training step."""
    reason = interpreted.reason_to_skip()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("results")
    done = gpu(folder, "--correctness-minutes", "4", "--kernel-tests", "bins", "--impls", *IMPLS)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    (path,) = folder.glob("*.json")
    return folder, records.load(path), done


def test_everything_is_measured(finished):
    _, results, _ = finished
    assert results.header["interpreted"]
    assert results.header["finished"]
    assert results.path.name.startswith(f"{results.header['date'][:10]}-interpreted-cpu-")
    ours = [r for r in results.records if r.impl == "caop_fast"]
    assert {(r.suite, r.case) for r in ours if r.suite != "step"} == {(c.suite, c.name) for c in cases.tiny()}
    assert {r.suite for r in ours} == {*cases.SUITES, "step"}
    assert {(r.impl, r.status) for r in results.records if r.status not in ("ok", "skipped")} == set()
    for record in results.records:
        assert (record.status == "ok") == (record.time_ms is not None)
        assert (record.status == "ok") == (record.reason is None)


def test_the_correctness_stage_ran_the_kernels(finished):
    _, results, _ = finished
    found = results.header["correctness"]
    assert found["failed"] == 0
    assert found["passed"] > 150
    assert set(results.header["ceilings"]) == {"copy_gbps", "gemm_tflops"}


def test_a_second_call_has_nothing_to_do(finished):
    folder, results, _ = finished
    done = gpu(folder, "--impls", *IMPLS)
    assert done.returncode == 0
    again = records.load(results.path)
    assert again.records == results.records
    assert again.header["correctness"] == results.header["correctness"]


def test_the_report_refuses_the_interpreter_s_times(finished):
    folder, _, _ = finished
    command = [sys.executable, "-m", "benchmarks.report", "--results", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=records.ROOT, check=False)
    assert done.returncode == 2
    assert "interpret" in done.stderr


def test_a_failed_check_fails_the_command(tmp_path, monkeypatch, capsys):
    """And its name is in the results; the contender itself is held to float64 once more and not timed."""
    import caop_fast

    right = caop_fast.distillation_loss

    def wrong(student, *arguments, **options):
        """A gradient 3 % too large."""
        return right(student + 0.03 * (student - student.detach()), *arguments, **options)

    monkeypatch.setattr(caop_fast, "distillation_loss", wrong)
    arguments = ["--out", str(tmp_path), *QUICKLY, "--suites", "logits", "--impls", "caop_fast", "plain"]
    code = command.main([*arguments, "--correctness-minutes", "1"], device="cpu", selection="tiny", minutes=5)
    assert code == 1
    assert "FAILED" in capsys.readouterr().err
    (path,) = tmp_path.glob("*.json")
    results = records.load(path)
    assert results.header["correctness"]["failed"] > 0
    assert {r.status for r in results.records if r.impl == "caop_fast" and r.dtype == "float32"} == {"wrong"}
    assert {r.status for r in results.records if r.impl == "plain"} == {"ok"}


def test_a_dead_device_goes_on_in_a_new_process(tmp_path, monkeypatch):
    begun = []

    def dies(bench, peer, **options):
        raise run.Dead("illegal memory access")

    monkeypatch.setattr("benchmarks.campaign.record", dies)
    monkeypatch.setattr(os, "execv", lambda program, arguments: begun.append(arguments) or sys.exit(7))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    arguments = ["--out", str(tmp_path), *QUICKLY, "--suites", "logits", "--impls", "plain", "--fresh"]
    with pytest.raises(SystemExit) as stopped:
        command.main([*arguments, "--correctness-minutes", "0"], device="cuda", selection="tiny", minutes=5)
    assert stopped.value.code == 7
    assert begun[0][1:3] == ["-m", "benchmarks.gpu"]
    (path,) = tmp_path.glob("*.json")
    assert [r.status for r in records.load(path).records] == ["crashed"]
    assert os.environ[command.RESULT] == str(path), "--fresh would begin again and again"
    assert float(os.environ[command.DEADLINE]) > 0
    again = command.open_results(tmp_path, torch.device("cpu"), fresh=True)
    assert again.path == path
    assert again.done()


def test_a_process_that_ended_in_a_check_does_not_begin_it_again(tmp_path):
    results = command.open_results(tmp_path, torch.device("cpu"), fresh=False)
    results.header["correctness_begun"] = True
    options = argparse.Namespace(correctness_minutes=1, kernel_tests=None)
    assert command.check(results, torch.device("cpu"), options, time.monotonic() + 60) == 1
    assert "ended during" in records.load(results.path).header["correctness"]["failures"][0]


def test_a_check_that_kills_the_device_is_not_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "alive", lambda device: False)
    results = command.open_results(tmp_path, torch.device("cpu"), fresh=False)
    options = argparse.Namespace(correctness_minutes=0.001, kernel_tests=None)
    with pytest.raises(run.Dead):
        command.check(results, torch.device("cpu"), options, time.monotonic())
    assert records.load(results.path).header["correctness"]["skipped"] > 0


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert command.main(["--out", str(tmp_path)], device="cuda", selection="gpu", minutes=1) == 2
    assert "--device cpu" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
