"""`python -m benchmarks.gpu` from its first line to its last, with Triton's interpreter as the GPU."""

from __future__ import annotations

import subprocess
import sys
import time

import interpreted
import pytest
import torch

from benchmarks import cases, command, records, run, supervise
from benchmarks.supervise import Lifeline

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


def options(folder, *arguments):
    told = ["--out", str(folder), *QUICKLY, "--suites", "logits", "--impls", "plain", "--correctness-minutes", "0"]
    return command.parsed([*told, *arguments], "cpu", "tiny", 5.0)


def test_a_failed_check_fails_the_command(tmp_path, monkeypatch, capsys):
    """And its name is in the results; the contender itself is held to float64 once more and not timed."""
    import caop_fast

    right = caop_fast.distillation_loss

    def wrong(student, *arguments, **options):
        """A gradient 3 % too large."""
        return right(student + 0.03 * (student - student.detach()), *arguments, **options)

    monkeypatch.setattr(caop_fast, "distillation_loss", wrong)
    told = options(tmp_path, "--impls", "caop_fast", "plain", "--correctness-minutes", "1")
    code = command.work(told, time.time() + 300, Lifeline())
    assert code == 1
    assert "FAILED" in capsys.readouterr().err
    (path,) = tmp_path.glob("*.json")
    results = records.load(path)
    assert results.header["correctness"]["failed"] > 0
    assert {r.status for r in results.records if r.impl == "caop_fast" and r.dtype == "float32"} == {"wrong"}
    assert {r.status for r in results.records if r.impl == "plain"} == {"ok"}


def test_a_dead_device_is_told_and_its_results_are_kept(tmp_path, monkeypatch):
    def dies(bench, peer, **options):
        raise run.Dead("illegal memory access")

    monkeypatch.setattr("benchmarks.campaign.record", dies)
    assert command.work(options(tmp_path, "--fresh"), time.time() + 60, Lifeline()) == supervise.AGAIN
    (path,) = tmp_path.glob("*.json")
    assert [r.status for r in records.load(path).records] == ["crashed"]
    monkeypatch.setenv(supervise.RESULT, str(path))
    again = command.open_results(tmp_path, torch.device("cpu"), fresh=True)
    assert again.path == path, "--fresh would begin again and again"
    assert again.done()


HANGS = """
import sys, time
from pathlib import Path
from benchmarks import campaign, command
right, flag = campaign.record, Path(__file__).with_suffix(".hung")

def record(bench, peer, **options):
    if peer.name == "plain" and not flag.exists():
        flag.touch()
        time.sleep(600)
    return right(bench, peer, **options)

campaign.record = record
campaign.Campaign.ceilings = lambda *arguments: None  # bfloat16 products take long on some CPUs
sys.exit(command.main(None, device="cpu", selection="tiny", minutes=5.0))
"""


def test_a_contender_that_never_returns_costs_its_record(tmp_path, monkeypatch):
    (tmp_path / "hangs.py").write_text(HANGS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    arguments = ["--out", str(tmp_path), *QUICKLY, "--suites", "topk", "--impls", "caop_fast", "plain"]
    arguments += ["--correctness-minutes", "0", "--patience", "20"]
    said = []
    code = supervise.supervise("hangs", arguments, until=time.time() + 300, say=said.append)
    assert code == 0, said
    assert len(said) == 1
    assert "nothing for 20 s" in said[0]
    (path,) = tmp_path.glob("*.json")
    results = records.load(path)
    expected = {(c.name, i) for c in cases.tiny() if c.suite == "topk" for i in ("caop_fast", "plain")}
    assert {(r.case, r.impl) for r in results.records} == expected
    (lost,) = [r for r in results.records if r.status != "ok"]
    assert (lost.impl, lost.status) == ("plain", "crashed")
    assert "nothing for 20 s" in lost.reason
    assert results.header["finished"]


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert command.main(["--out", str(tmp_path)], device="cuda", selection="gpu", minutes=1) == 2
    assert "--device cpu" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
