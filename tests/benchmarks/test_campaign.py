"""A run of benchmarks: what is timed, what is not and why, resuming, crashes, budgets."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from benchmarks import bench as bench_module
from benchmarks import campaign as module
from benchmarks import cases, failures, floors, measure, peers, records, run
from benchmarks.cases import Case
from benchmarks.failures import Dead
from benchmarks.inputs import Inputs
from benchmarks.jobs import Effort
from benchmarks.peers.peer import Loss, Peer
from benchmarks.records import Key, Record, Results
from benchmarks.run import LossJob
from benchmarks.step.cases import TINY
from benchmarks.step.job import StepJob

CPU = torch.device("cpu")
LOGITS = cases.small("logits", 80, 64, 8)
LINEAR = cases.small("linear", 80, 64, 8, masked=0.4)
BF16_LOGITS, BF16_LINEAR = (cases.small(suite, 80, 64, 8, "bfloat16") for suite in ("logits", "linear"))
NAMES = ("caop_fast", "plain")

Change = Callable[[Loss, Inputs], Tensor]
Add = Callable[..., None]


@pytest.fixture
def implementation(monkeypatch: pytest.MonkeyPatch) -> Add:
    """Adds an implementation "other" made from ours: ``change(loss, inputs)`` is its loss."""

    def add(change: Change, suites: tuple[str, ...] = ("logits", "linear"), **options: Any) -> None:
        def build(case: Case) -> Loss:
            return partial(change, peers.ours.build(case))

        others = [peer for peer in peers.ALL if peer.name != "other"]
        monkeypatch.setattr(peers, "ALL", (*others, Peer("other", suites, build, **options)))

    return add


def campaign(results: Results, impls: tuple[str, ...], ended: str | None = None) -> module.Campaign:
    until = time.monotonic() + 300
    return module.Campaign(results, CPU, until, Effort(0.01, 3), impls, say=lambda text: None, ended=ended)


def start(folder: Path, *impls: str) -> module.Campaign:
    return campaign(Results(folder / "a.json", records.header(CPU)), impls or NAMES)


def resumed(folder: Path, ended: str | None = None) -> module.Campaign:
    """Another process with the same results."""
    return campaign(records.load(folder / "a.json"), ("other", *NAMES), ended)


def mark(run: module.Campaign, key: Key) -> None:
    """And here the process dies."""
    run._mark([Record(*key)])


def the(results: Results, impl: str) -> Record:
    (found,) = (r for r in results.records if r.impl == impl)
    return found


def statuses(results: Results) -> set[tuple[str, str]]:
    return {(r.impl, r.status) for r in results.records}


def only(folder: Path, case: Case) -> Record:
    """The record of "other"."""
    ours = start(folder, "other")
    assert ours.run([LossJob(case)])
    return the(ours.results, "other")


@pytest.mark.parametrize(
    "case", [LOGITS, LINEAR, cases.small("topk", 70, 90, 8), cases.small("linear-tokens", 9, 64, 8)]
)
def test_a_record_has_what_was_measured(tmp_path: Path, case: Case) -> None:
    ours = start(tmp_path)
    assert ours.run([LossJob(case)])
    for name in NAMES:
        found = the(records.load(tmp_path / "a.json"), name)
        assert found == the(ours.results, name)
        assert (found.status, found.shape) == ("ok", case.shape)
        assert found.time_low_ms is not None
        assert found.time_high_ms is not None
        assert 0 < found.time_low_ms <= found.ms <= found.time_high_ms
        assert found.rounds == 3
        assert found.floor == ("gemms" if case.linear else "copy")
        assert found.floor_ms
        assert (found.tflops is None) == (not case.linear)
        assert (found.gbps is None) == case.linear
        assert found.grad_error is not None
        assert 0 < found.grad_error < 1e-3
        assert set(found.extra["full_errors"]) == set(found.extra["errors"])
        assert max(found.extra["full_errors"].values()) < 1e-3
        again = {found.extra.get("again_ms"), found.extra.get("floor_again_ms")}
        assert all(again) if name == "caop_fast" else again == {None}, "the first is timed again after the others"


def test_the_peak_counts_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of an earlier step would be freed in this one and hide as much."""
    bench = bench_module.Bench(LINEAR, CPU, floors.Floors(CPU, 0.01))
    leaves, peak = bench.inputs.leaves(), measure.peak
    there: list[Tensor | None] = []

    def watched(step: measure.Step, device: torch.device) -> int:
        there.extend(leaf.grad for leaf in leaves.values())
        return peak(step, device)

    monkeypatch.setattr(measure, "peak", watched)
    ready = run.examine(bench, peers.named("plain"))
    assert there == [None, None]
    assert ready.peak > sum(t.nbytes for t in leaves.values())


class Constant(torch.autograd.Function):
    """The identity with a constant for a gradient: 1 ignores the upstream gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: float) -> Tensor:
        ctx.gradient = gradient
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return torch.full_like(grad_output, ctx.gradient), None


def no_upstream(loss: Loss, i: Inputs) -> Tensor:
    return Constant.apply(loss(i), 1.0)


def scaled(factor: float, loss: Loss, i: Inputs) -> Tensor:
    """A gradient times ``factor``."""
    return loss(i) + (factor - 1) * (loss(i) - loss(i).detach())


def chunk_lost(loss: Loss, i: Inputs) -> Tensor:
    """A part of grad_weight that is missing for all tokens only."""
    weight = i["weight"] * 1.0
    if i.case.n == LINEAR.n:
        weight.register_hook(lambda g: 0.9 * g)
    return loss(Inputs(i.case, {**i.tensors, "weight": weight}))


WRONG: dict[str, Change] = {
    "upstream": no_upstream,
    "gradient": partial(scaled, 1.05),
    "loss": lambda loss, i: loss(i) + 2 * loss(i).detach(),
    "nan": lambda loss, i: loss(i) * math.nan,
    "half the gradient": partial(scaled, 0.5),
    "all tokens": lambda loss, i: scaled(1.05 if i.case.n == LOGITS.n else 1.0, loss, i),
    "loss of all tokens": lambda loss, i: loss(i) + 0.1 * loss(i).detach() * float(i.case.n == LOGITS.n),
}
WRONG_LINEAR: dict[str, Change] = {
    "no gradient": lambda loss, i: loss(Inputs(i.case, {**i.tensors, "weight": i["weight"].detach()})),
    "not finite": lambda loss, i: loss(i) + 0 * Constant.apply(i["weight"], math.nan).sum(),
    "chunk of all tokens": chunk_lost,
}


@pytest.mark.parametrize("case", [LOGITS, BF16_LOGITS, BF16_LINEAR], ids=lambda c: f"{c.suite} {c.dtype}")
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_not_timed(tmp_path: Path, implementation: Add, name: str, case: Case) -> None:
    implementation(WRONG[name])
    found = only(tmp_path, case)
    assert (found.status, found.time_ms) == ("wrong", None), found
    assert found.reason is not None
    assert ("full size" in found.reason) == ("all tokens" in name)
    records.load(tmp_path / "a.json")


@pytest.mark.parametrize("name", WRONG_LINEAR)
def test_a_wrong_gradient_of_a_head_is_not_timed(tmp_path: Path, implementation: Add, name: str) -> None:
    implementation(WRONG_LINEAR[name], ("linear",))
    assert only(tmp_path, LINEAR).status == "wrong"


@pytest.mark.parametrize(
    ("change", "status"),
    [(partial(scaled, 1.0), "ok"), (no_upstream, "wrong"), (partial(scaled, 10.0), "wrong")],
    ids=["right", "upstream", "gradient"],
)
def test_rounded_logits_excuse_their_rounding_only(
    tmp_path: Path, implementation: Add, change: Change, status: str
) -> None:
    implementation(change, rounding=True)
    assert only(tmp_path, BF16_LINEAR).status == status


def raising(error: BaseException) -> Callable[..., NoReturn]:
    def call(*arguments: object) -> NoReturn:
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "oom"),
        (MemoryError(), "oom"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "oom"),
        (ValueError("bad shape\nmore"), "error"),
    ],
)
def test_what_fails_is_recorded_and_the_rest_goes_on(
    tmp_path: Path, implementation: Add, error: Exception, status: str
) -> None:
    implementation(raising(error))
    ours = start(tmp_path, "other", "plain")
    assert ours.run([LossJob(LOGITS)])
    assert the(ours.results, "other").status == status
    assert "\n" not in str(the(ours.results, "other").reason)
    assert the(ours.results, "plain").status == "ok"


def test_out_of_memory_is_not_a_dead_device(
    tmp_path: Path, implementation: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "dead", lambda error: True)
    implementation(raising(torch.OutOfMemoryError("CUDA out of memory")))
    assert only(tmp_path, LOGITS).status == "oom"
    monkeypatch.setattr(bench_module, "make", raising(torch.OutOfMemoryError("no")))
    assert only(tmp_path, LOGITS).status == "oom"


def test_what_is_not_installed_is_skipped_with_its_reason(tmp_path: Path, implementation: Add) -> None:
    implementation(lambda loss, i: loss(i), package="no_such_package")
    found = only(tmp_path, LOGITS)
    assert (found.status, found.reason) == ("skipped", "no_such_package is not installed")


def test_no_peer_is_imported_unless_it_is_measured() -> None:
    """``installed`` looks without importing; the packages are large, and may be broken."""
    names = ("trl", "liger_kernel", "flash_attn", "cut_cross_entropy")
    code = f"import sys, benchmarks.peers; print([m for m in {names} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=records.ROOT)
    assert done.stdout.strip() == "[]"


def test_nothing_starts_after_the_deadline(tmp_path: Path) -> None:
    ours = start(tmp_path)
    ours.deadline = time.monotonic() - 1
    assert not ours.run([LossJob(LOGITS)])
    assert ours.results.records == []


def test_a_run_is_resumed_and_a_crash_is_told(tmp_path: Path, implementation: Add) -> None:
    first = start(tmp_path, "plain")
    first.run([LossJob(LOGITS)])
    mark(first, ("logits", LOGITS.name, "caop_fast"))
    implementation(lambda loss, i: loss(i))
    again = resumed(tmp_path, ended="it died of SIGSEGV")
    before = the(again.results, "plain")
    assert again.run([LossJob(LOGITS)])
    assert the(again.results, "plain") == before
    assert the(again.results, "caop_fast").status == "crashed"
    assert "SIGSEGV" in str(the(again.results, "caop_fast").reason)
    assert the(again.results, "other").status == "ok"
    assert "running" not in json.loads((tmp_path / "a.json").read_text())["header"]


def test_what_was_stopped_from_outside_runs_again_but_once(tmp_path: Path) -> None:
    key = ("logits", LOGITS.name, "caop_fast")
    mark(start(tmp_path), key)  # a time limit kills everything
    mark(resumed(tmp_path), key)
    assert the(resumed(tmp_path).results, "caop_fast").status == "crashed"
    mark(start(tmp_path), key)
    again = resumed(tmp_path)
    assert again.run([LossJob(LOGITS)])
    assert the(again.results, "caop_fast").status == "ok"


def test_inputs_that_end_the_process_crash_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "make", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path).run([LossJob(LOGITS)])
    assert statuses(resumed(tmp_path, ended="it died of SIGKILL").results) == {(n, "crashed") for n in NAMES}


def test_a_deadline_behind_the_inputs_is_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = start(tmp_path)
    right = LossJob.prepare

    def late(*arguments: Any) -> bench_module.Bench:
        ours.deadline = time.monotonic() - 1
        return right(*arguments)

    monkeypatch.setattr(LossJob, "prepare", late)
    assert not ours.run([LossJob(LOGITS)])
    ours.results.save()
    assert "running" not in records.load(tmp_path / "a.json").header


def test_ceilings_that_fail_do_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors.Floors, "_copy", raising(torch.OutOfMemoryError("4 GiB")))
    ours = start(tmp_path)
    ours.ceilings(("float32",))
    assert ours.results.header["ceilings"] == {}


def test_ceilings_that_end_the_process_are_not_tried_again(tmp_path: Path) -> None:
    first = start(tmp_path)
    first.begin = raising(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        first.ceilings(("float32",))
    again = resumed(tmp_path)
    again.begin = first.begin
    again.ceilings(("float32",))
    assert again.results.header["ceilings"] == {}


def test_a_dead_device_is_recorded_and_ends_the_run(
    tmp_path: Path, implementation: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    implementation(raising(RuntimeError("illegal memory access")))
    monkeypatch.setattr(failures, "dead", lambda error: True)
    with pytest.raises(Dead, match="illegal"):
        start(tmp_path, "other", "plain").run([LossJob(LOGITS)])
    assert statuses(records.load(tmp_path / "a.json")) == {("plain", "ok"), ("other", "crashed")}


def test_a_device_that_dies_with_the_inputs_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "make", raising(RuntimeError("illegal memory access")))
    monkeypatch.setattr(failures, "dead", lambda error: True)
    with pytest.raises(Dead):
        start(tmp_path).run([LossJob(LOGITS)])
    assert statuses(records.load(tmp_path / "a.json")) == {(n, "crashed") for n in NAMES}


def test_a_device_that_dies_in_a_step_is_not_another_implementation_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepJob, "refusal", lambda *arguments: None)
    monkeypatch.setattr(StepJob, "prepare", lambda *arguments: "models")
    monkeypatch.setattr(StepJob, "measure", raising(Dead("illegal memory access")))
    ours = start(tmp_path, "caop_fast", "official")
    with pytest.raises(Dead, match="illegal"):
        ours.run([StepJob(TINY)])
    assert statuses(ours.results) == {("caop_fast", "crashed")}
    assert "running" not in ours.results.header


def test_every_shape_is_compiled_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that continues from shape to shape turns to dynamic shapes and then, silently, to eager mode."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    ours = start(tmp_path, "plain-compiled")
    with torch._dynamo.config.patch(recompile_limit=2):
        ours.run([LossJob(cases.small("logits", 70 + n, 32 + n, 8)) for n in range(4)])
    assert [r.status for r in ours.results.records] == ["ok"] * 4, [r.reason for r in ours.results.records]


def test_a_file_is_whole_or_as_before(tmp_path: Path) -> None:
    results = Results(tmp_path / "a.json", records.header(CPU))
    results.add(LOGITS.record("plain").failed("oom", "out of memory"))
    before = (tmp_path / "a.json").read_bytes()
    with pytest.raises(TypeError):
        results.add(Record("logits", "x", "y", extra={"t": torch.ones(1)}))
    with pytest.raises(ValueError, match="JSON compliant"):
        results.add(Record("logits", "x", "y", grad_error=math.nan))
    assert (tmp_path / "a.json").read_bytes() == before
    results.save()
    assert (tmp_path / "a.json").read_bytes() == before, "what could not be saved is not kept"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert records.load(tmp_path / "a.json").records == results.records
    (tmp_path / "b.json").write_text('{"header": {"format": 99}, "records": []}')
    with pytest.raises(ValueError, match=r"b\.json is not a results file"):
        records.load(tmp_path / "b.json")
