"""`python -m benchmarks.gpu` and `benchmarks.cpu` from the first line to the last."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import pytest
import torch

import caop_fast
from benchmarks import cases, command, correctness, records, supervise
from benchmarks.correctness import Summary
from benchmarks.failures import Dead
from benchmarks.records import Results
from benchmarks.run import LossJob
from benchmarks.supervise import Lifeline
from helpers import interpreted

CPU = torch.device("cpu")
QUICKLY = ("--device", "cpu", "--selection", "tiny", "--seconds", "0.01", "--rounds", "3", "--minutes", "8")
IMPLS = ("caop_fast", "official", "plain", "liger-fused-linear-jsd", "trl-chunked")


def options(folder: Path, *arguments: str) -> command.Options:
    told = ["--out", str(folder), *QUICKLY, "--correctness-minutes", "0", *arguments]
    return command.Options(**vars(command.parser("cpu", "tiny", 5.0).parse_args(told)))


def work(folder: Path, *arguments: str) -> int:
    """One process of the command, in this one."""
    return command.work(options(folder, *arguments), time.time() + 300, Lifeline())


def results(folder: Path) -> Results:
    (path,) = folder.glob("*.json")
    return records.load(path)


def everything_is_measured(found: Results) -> None:
    assert found.header["finished"]
    assert set(found.header["ceilings"]) == {"copy_gbps", "gemm_tflops"}
    ours = [r for r in found.records if r.impl == "caop_fast"]
    assert {(r.suite, r.case) for r in ours if r.suite != "step"} == {(c.suite, c.name) for c in cases.tiny()}
    assert {r.suite for r in ours} == {*cases.SUITES, "step"}
    assert {(r.impl, r.status) for r in found.records if r.status not in ("ok", "skipped")} == set()
    for record in found.records:
        assert (record.status == "ok") == (record.time_ms is not None)
        assert (record.status == "ok") == (record.reason is None)


def test_everything_is_measured_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert work(tmp_path, "--impls", "caop_fast", "official", "plain") == 0
    found = results(tmp_path)
    everything_is_measured(found)
    assert capsys.readouterr().out.count("caop_fast") >= len(cases.tiny())
    assert work(tmp_path, "--impls", "caop_fast", "official", "plain") == 0
    assert results(tmp_path).records == found.records, "a second call has nothing to do"


@pytest.mark.slow
def test_everything_in_the_interpreter(tmp_path: Path) -> None:
    """The whole command with Triton's interpreter in place of a GPU; the report refuses its times."""
    reason = interpreted.reason_to_skip()
    if reason is not None:
        pytest.skip(reason)
    run = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path), *QUICKLY, "--impls", *IMPLS]
    run += ["--correctness-minutes", "4", "--correctness-tests", "bins or calibration"]
    done = subprocess.run(
        run, capture_output=True, text=True, cwd=records.ROOT, env=interpreted.environment(), check=False
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    found = results(tmp_path)
    everything_is_measured(found)
    assert found.header["interpreted"]
    assert found.path.name.startswith(f"{found.header['date'][:10]}-interpreted-cpu-")
    checked = found.header["correctness"]
    assert (checked["failed"], checked["finished"]) == (0, True)
    assert checked["passed"] > 10
    report = [sys.executable, "-m", "benchmarks.report", "--results", str(tmp_path)]
    done = subprocess.run(report, capture_output=True, text=True, cwd=records.ROOT, check=False)
    assert done.returncode == 2
    assert "interpret" in done.stderr


def test_a_failed_check_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stays in the results, is not repeated, and a check that did not finish is."""
    calls = []

    def check(device: torch.device, *, seconds: float, select: str | None) -> Summary:
        calls.append(seconds)
        return Summary(passed=1, failed=1, failures=["a loss: is wrong"], finished=len(calls) > 1)

    monkeypatch.setattr(correctness, "check", check)
    arguments = ("--suites", "tokens", "--impls", "plain", "--correctness-minutes", "1")
    for finished, count in ((False, 1), (True, 2), (True, 2)):
        assert work(tmp_path, *arguments) == 1
        assert len(calls) == count
        assert results(tmp_path).header["correctness"]["finished"] == finished
    assert calls == [60.0, 60.0]
    said = capsys.readouterr()
    assert "FAILED  a loss: is wrong" in said.out
    assert "FAILED" in said.err


def test_a_wrong_loss_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient of caop_fast that is 3 % too large."""
    right = caop_fast.distillation_loss
    monkeypatch.setattr(
        caop_fast, "distillation_loss", lambda s, *rest, **more: right(s + 0.03 * (s - s.detach()), *rest, **more)
    )
    work(tmp_path, "--suites", "logits", "--impls", "caop_fast", "plain")
    found = [r for r in results(tmp_path).records if r.shape.dtype == "float32"]
    assert {(r.impl, r.status) for r in found} == {("caop_fast", "wrong"), ("plain", "ok")}


def test_a_dead_device_is_told_and_its_results_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*arguments: object) -> NoReturn:
        raise Dead("illegal memory access")

    monkeypatch.setattr(LossJob, "measure", dies)
    assert work(tmp_path, "--suites", "logits", "--impls", "plain", "--fresh") == supervise.AGAIN
    found = results(tmp_path)
    assert [r.status for r in found.records] == ["crashed"]
    monkeypatch.setenv(supervise.RESULT, str(found.path))
    again = command.open_results(tmp_path, CPU, fresh=True)
    assert again.path == found.path, "--fresh would begin again and again"
    assert again.records == found.records


HANGS = """
import sys, time
from pathlib import Path
from benchmarks import command
from benchmarks.campaign import Campaign
from benchmarks.run import LossJob
right, flag = LossJob.measure, Path(__file__).with_suffix(".hung")

def measure(self, bench, impl, effort):
    if impl == "plain" and not flag.exists():
        flag.touch()
        time.sleep(600)
    return right(self, bench, impl, effort)

LossJob.measure = measure
Campaign.ceilings = lambda *arguments: None
sys.exit(command.main(None, device="cpu", selection="tiny", minutes=5.0))
"""


@pytest.mark.slow
def test_an_implementation_that_hangs_costs_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hangs.py").write_text(HANGS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    arguments = ["--out", str(tmp_path), *QUICKLY, "--suites", "topk", "--impls", "caop_fast", "plain"]
    arguments += ["--correctness-minutes", "0", "--patience", "20"]
    said: list[str] = []
    assert supervise.supervise("hangs", arguments, until=time.time() + 300, say=said.append) == 0, said
    assert len(said) == 1
    assert "nothing for 20 s" in said[0]
    found = results(tmp_path)
    (case,) = [c for c in cases.tiny() if c.suite == "topk"]
    assert {(r.case, r.impl, r.status) for r in found.records} == {
        (case.name, "caop_fast", "ok"), (case.name, "plain", "crashed")
    }  # fmt: skip
    assert "nothing for 20 s" in str(next(r for r in found.records if r.impl == "plain").reason)
    assert found.header["finished"]


def test_without_a_gpu_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert command.main(["--out", str(tmp_path)], device="cuda", selection="gpu", minutes=1) == 2
    assert "--device cpu" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_which_file_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the same device, code and versions, and no other."""
    first = command.open_results(tmp_path, CPU, fresh=False)
    first.save()
    assert command.open_results(tmp_path, CPU, fresh=False).path == first.path
    assert command.open_results(tmp_path, CPU, fresh=True).path.stem == f"{first.path.stem}-2"
    monkeypatch.setattr(command, "header", lambda device: {**first.header, "sources": "another"})
    assert command.open_results(tmp_path, CPU, fresh=False).path.stem == f"{first.path.stem}-2"


def test_the_command_names_no_folder_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(records.ROOT / "benchmarks" / "cpu.py"), "--minutes", "3"])
    assert records.header(CPU)["command"] == "python -m benchmarks.cpu --minutes 3"
