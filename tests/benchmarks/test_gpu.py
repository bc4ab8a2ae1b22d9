"""`python -m benchmarks.gpu` from the first line to the last."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cases, gpu, records, run
from benchmarks.records import Record, Results
from helpers import interpreted
from tools import device_tests

QUICKLY = ("--device", "cpu", "--cases", "tiny", "--seconds", "0.01", "--rounds", "3", "--minutes", "8")
MEASURED = run.measured


def command(folder: Path, *arguments: str) -> int:
    return gpu.main(["--out", str(folder), *QUICKLY, *arguments])


def results(folder: Path) -> Results:
    (path,) = folder.glob("*.json")
    return records.load(path)


def statuses(found: Results) -> set[tuple[str, str]]:
    return {(r.impl, r.status) for r in found.records}


def test_every_stage_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--impls", "caop_fast", "plain", "--correctness-tests", "calibration")
    assert command(tmp_path, *arguments) == 0
    found = results(tmp_path)
    head = found.header
    assert head["finished"]
    assert head["correctness"]["passed"] > 0
    assert set(head["ceilings"]) == {"copy_gbps", "gemm_tflops", "bfloat16_to_float32"}
    assert set(head["stage_seconds"]) == set(gpu.ORDER)
    (profile,) = head["profile"].values()
    assert profile["rows"][0]["ms"] > 0
    assert head["command"].startswith(f"python -m benchmarks.gpu --out {tmp_path.name} --device cpu")
    ours = [r for r in found.records if r.impl == "caop_fast"]
    assert {(r.suite, r.case) for r in ours if r.suite != "step"} == {(c.suite, c.name) for c in cases.tiny()}
    assert {r.suite for r in ours} == {*cases.SUITES, "step"}
    assert statuses(found) == {("caop_fast", "ok"), ("plain", "ok")}
    assert all("again_ms" in r.extra for r in ours if r.suite != "step"), "ours is timed again after the others"
    assert capsys.readouterr().out.count("caop_fast") >= len(ours)
    assert command(tmp_path, *arguments) == 0
    assert results(tmp_path).records == found.records, "a second call has nothing to do"


def faulty(case: Any, impl: str, setting: run.Setting) -> Record:
    """In the worker, in place of ``run.measured``."""
    if (case.suite, impl) == ("tokens", "plain"):
        os._exit(7)
    if (case.suite, impl) == ("topk", "plain"):
        time.sleep(1000)
    return MEASURED(case, impl, setting)


def test_a_crash_or_a_hang_costs_one_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "measured", faulty)
    chosen = ("--stages", "targets", "--suites", "tokens", "topk", "--impls", "plain", "caop_fast")
    command(tmp_path, *chosen, "--patience", "20")
    found = results(tmp_path)
    assert {key for key in found.done() if key[2] == "plain"} == set(), "what crashed is tried again"
    assert {(r.suite, r.impl): (r.status, r.reason) for r in found.records} == {
        ("topk", "caop_fast"): ("ok", None),
        ("topk", "plain"): ("crashed", "no answer within 20 s"),
        ("tokens", "caop_fast"): ("ok", None),
        ("tokens", "plain"): ("crashed", "the process ended: exit code 7"),
    }


def told(case: Any, impl: str, setting: run.Setting) -> Record:
    """In the worker: what of the environment reached it."""
    from triton.runtime.jit import DependenciesFinder

    settled = getattr(DependenciesFinder._update_hash, "settled", False)
    return case.record(impl).failed("skipped", f"{os.environ['TRITON_CACHE_DIR']} {settled}")


def test_the_worker_finds_the_compiled_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unpacked = []
    for name in ("TRITON_CACHE_DIR", "TRITON_CACHE_SETTLED_KEYS", "PYTHONPATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(gpu, "unpack", lambda pack, folder: unpacked.append(folder) or {})
    monkeypatch.setattr(gpu, "foreign", lambda manifest: {"triton": ("3.6.0", "3.7.1")})
    monkeypatch.setattr(run, "measured", told)
    command(tmp_path, "--stages", "targets", "--suites", "topk", "--impls", "plain", "--triton-cache", "x")
    (record,) = results(tmp_path).records
    assert record.reason == f"{unpacked[0]} True"
    assert "triton is 3.7.1, it was 3.6.0" in capsys.readouterr().out
    assert not unpacked[0].exists(), "it is of this run"


def test_nothing_starts_after_the_deadline(tmp_path: Path) -> None:
    assert command(tmp_path, "--stages", "targets", "profile", "--minutes", "0") == 0
    found = results(tmp_path)
    assert found.records == []
    assert not found.header["finished"]


def test_a_failed_test_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stays in the results, until it passes; a stage that finished is not repeated, unless for other tests."""
    calls: list[str | None] = []

    def check(device: str, outcomes: Path, **options: Any) -> dict[str, Any]:
        calls.append(options["select"])
        failures = ["a loss: is wrong"] if len(calls) < 3 else []
        counts = {"passed": 1, "failed": len(failures), "skipped": 0, "failures": failures}
        return {**counts, "finished": len(calls) > 1}

    monkeypatch.setattr(device_tests, "check", check)
    for finished, count, code in ((False, 1, 1), (True, 2, 1), (True, 3, 0), (True, 3, 0)):
        assert command(tmp_path, "--stages", "correctness") == code
        assert len(calls) == count
        assert results(tmp_path).header["correctness"]["finished"] == finished
    assert command(tmp_path, "--stages", "correctness", "--correctness-tests", "some") == 0
    assert calls == [None, None, None, "some"]
    said = capsys.readouterr()
    assert "FAILED  a loss: is wrong" in said.out
    assert "FAILED" in said.err


PLANTED = "kernels/caop_kernels/gradient.py"
WRONG = ("e_s = tl.exp2(u_s)", "e_s = 1.01 * tl.exp2(u_s)")


def interpreted_command(root: Path, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """With Triton's interpreter in place of a GPU."""
    reason = interpreted.reason_to_skip()
    if reason is not None:
        pytest.skip(reason)
    full = [sys.executable, "-m", "benchmarks.gpu", "--out", str(out), *QUICKLY, *arguments]
    paths = os.pathsep.join([str(root), str(root / "kernels")])
    env = {**interpreted.environment(), "PYTHONPATH": paths}
    return subprocess.run(full, capture_output=True, text=True, cwd=root, env=env, check=False)


def test_a_wrong_kernel_fails_the_correctness_stage(tmp_path: Path) -> None:
    copy = tmp_path / "project"
    for folder in ("benchmarks", "caop_fast", "kernels", "tests", "tools"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(records.ROOT / folder, copy / folder, ignore=ignored)
    shutil.copy(records.ROOT / "pyproject.toml", copy)
    text = (copy / PLANTED).read_text()
    assert WRONG[0] in text
    (copy / PLANTED).write_text(text.replace(*WRONG))
    chosen = ("--stages", "correctness", "--correctness-tests", "test_each_output_alone")
    wrong = interpreted_command(copy, tmp_path / "wrong", *chosen)
    assert wrong.returncode == 1, wrong.stdout + wrong.stderr
    assert "FAILED" in wrong.stdout


@pytest.mark.slow
def test_everything_in_the_interpreter(tmp_path: Path) -> None:
    """The whole command; the report refuses its times."""
    impls = ("caop_fast", "official", "plain", "liger-fused-linear-jsd", "trl-chunked")
    chosen = ("--impls", *impls, "--correctness-minutes", "4", "--correctness-tests", "bins or calibration")
    done = interpreted_command(records.ROOT, tmp_path, *chosen)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    found = results(tmp_path)
    assert found.header["finished"]
    assert found.header["interpreted"]
    assert found.path.name.startswith(f"{found.header['date'][:10]}-interpreted-cpu-")
    assert {status for _, status in statuses(found)} <= {"ok", "skipped"}
    report = [sys.executable, "-m", "benchmarks.report", "--results", str(tmp_path)]
    done = subprocess.run(report, capture_output=True, text=True, cwd=records.ROOT, check=False)
    assert done.returncode == 2
    assert "interpret" in done.stderr


def test_without_a_gpu_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "--device cpu" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_which_file_is_resumed(tmp_path: Path) -> None:
    """That of the same device, code and versions, and no other."""
    head = {**records.header("cpu"), "cases": "cpu", "seconds": 1.0, "rounds": 50}
    first = gpu.open_results(tmp_path, head, fresh=False)
    assert gpu.open_results(tmp_path, head, fresh=False).path == first.path
    assert gpu.open_results(tmp_path, head, fresh=True).path.stem == f"{first.path.stem}-2"
    for number, change in enumerate(({"sources": "another"}, {"seconds": 0.1}), 3):
        other = gpu.open_results(tmp_path, {**head, **change}, fresh=False)
        assert other.path.stem == f"{first.path.stem}-{number}"
    (tmp_path / "no.json").write_text("{}")
    assert gpu.open_results(tmp_path, head, fresh=False).path in (first.path, tmp_path / f"{first.path.stem}-2.json")


def test_a_file_is_whole_or_as_before(tmp_path: Path) -> None:
    found = gpu.open_results(tmp_path, records.header("cpu"), fresh=False)
    found.add(Record("logits", "a", "plain"))
    before = found.path.read_text()
    with pytest.raises(TypeError):
        found.add(Record("logits", "b", "plain", extra={"x": object()}))
    assert found.path.read_text() == before
    assert records.load(found.path).records == [Record("logits", "a", "plain")]
