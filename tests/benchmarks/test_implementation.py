"""One implementation on one case: what is timed, what is not and why; and the process in which that happens."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import pytest
import torch
import torch._dynamo
from torch import Tensor

from benchmarks import cases, measure, peers, records, run
from benchmarks.cases import Case
from benchmarks.inputs import Inputs
from benchmarks.peers import Loss, Peer
from benchmarks.records import Record
from benchmarks.run import Bench, Lost, Setting, Worker

CPU = torch.device("cpu")
SETTING = Setting("cpu", 10.0, 0.01, 3)
LOGITS = cases.small("logits", 80, 64, 8)
LINEAR = cases.small("linear", 80, 64, 8, masked=0.4)
BF16_LOGITS, BF16_LINEAR = (cases.small(suite, 80, 64, 8, "bfloat16") for suite in ("logits", "linear"))

Change = Callable[[Loss, Inputs], Tensor]
Other = Callable[..., None]


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Other:
    """Adds an implementation "other" made from ours: ``change(loss, inputs)`` is its loss."""

    def add(change: Change, **options: Any) -> None:
        def build(case: Case) -> Loss:
            return partial(change, peers.ours(case))

        monkeypatch.setattr(peers, "ALL", (*peers.ALL, Peer("other", cases.SUITES, build, **options)))

    return add


def measured(case: Case) -> Record:
    return run.measured(case, "other", SETTING)


@pytest.mark.parametrize(
    "case", [LOGITS, LINEAR, cases.small("topk", 70, 90, 8), cases.small("linear-tokens", 9, 64, 8)]
)
@pytest.mark.parametrize("impl", ["caop_fast", "plain"])
def test_a_record_has_what_was_measured(case: Case, impl: str) -> None:
    found = run.measured(case, impl, SETTING)
    assert (found.status, found.reason, found.shape, found.rounds) == ("ok", None, case.shape, 3)
    assert found.time_low_ms is not None
    assert found.time_high_ms is not None
    assert 0 < found.time_low_ms <= found.ms <= found.time_high_ms
    assert found.floor == ("gemms" if case.linear else "copy")
    assert found.floor_ms
    assert (found.tflops is None) == (not case.linear)
    assert (found.gbps is None) == case.linear
    assert (found.traffic_gbps is None) == (case.linear or case.suite == "topk" or impl != "caop_fast")
    assert found.loss_error is not None
    assert found.grad_error is not None
    assert 0 < found.grad_error < 1e-3
    assert found.loss_error < 1e-3
    again = run.called(case, SETTING, "again", impl)
    assert set(again) == {"again_ms", "floor_again_ms"}
    assert min(again.values()) > 0


def test_the_peak_counts_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of an earlier step would be freed in this one and hide as much."""
    bench = Bench(LINEAR, SETTING)
    leaves, peak = bench.inputs.leaves(), measure.peak
    there: list[Tensor | None] = []

    def watched(step: measure.Step, device: torch.device) -> int:
        there.extend(leaf.grad for leaf in leaves.values())
        return peak(step, device)

    monkeypatch.setattr(measure, "peak", watched)
    found = bench.measure("plain")
    assert there == [None, None]
    assert found.peak_bytes is not None
    assert found.peak_bytes > sum(t.nbytes for t in leaves.values())


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


def masked_rows_leak(loss: Loss, i: Inputs) -> Tensor:
    return loss(i) + 1e-3 * i["hidden"].sum() - 1e-3 * i["hidden"].sum().detach()


WRONG: dict[str, Change] = {
    "upstream": no_upstream,
    "gradient": partial(scaled, 1.05),
    "loss": lambda loss, i: loss(i) + 2 * loss(i).detach(),
    "nan": lambda loss, i: loss(i) * math.nan,
    "half the gradient": partial(scaled, 0.5),
}
WRONG_LINEAR: dict[str, Change] = {
    "no gradient": lambda loss, i: loss(Inputs(i.case, {**i.tensors, "weight": i["weight"].detach()})),
    "not finite": lambda loss, i: loss(i) + 0 * Constant.apply(i["weight"], math.nan).sum(),
    "masked rows": masked_rows_leak,
}


@pytest.mark.parametrize("case", [LOGITS, BF16_LOGITS, BF16_LINEAR], ids=lambda c: f"{c.suite} {c.dtype}")
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_not_timed(other: Other, name: str, case: Case) -> None:
    other(WRONG[name])
    found = measured(case)
    assert (found.status, found.time_ms) == ("wrong", None), found
    assert "error" in str(found.reason)


@pytest.mark.parametrize("name", WRONG_LINEAR)
def test_a_wrong_gradient_of_a_linear_loss_is_not_timed(other: Other, name: str) -> None:
    other(WRONG_LINEAR[name])
    assert measured(LINEAR).status == "wrong"


@pytest.mark.parametrize(
    ("change", "status"), [(partial(scaled, 1.0), "ok"), (no_upstream, "wrong"), (partial(scaled, 10.0), "wrong")]
)
def test_rounded_logits_excuse_their_rounding_only(other: Other, change: Change, status: str) -> None:
    other(change, rounding=True)
    assert measured(BF16_LINEAR).status == status


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
@pytest.mark.parametrize("where", ["loss", "inputs"])
def test_what_fails_is_recorded(
    other: Other, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str, where: str
) -> None:
    other(raising(error) if where == "loss" else lambda loss, i: loss(i))
    if where == "inputs":
        monkeypatch.setattr(run, "_current", None)
        monkeypatch.setattr(run, "make", raising(error))
    found = measured(LOGITS)
    assert found.status == status
    assert "\n" not in str(found.reason)


def test_a_dead_device_is_told_from_a_full_one(other: Other, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "dead", lambda error: True)
    other(raising(torch.OutOfMemoryError("CUDA out of memory")))
    assert measured(LOGITS).status == "oom"
    other(raising(RuntimeError("illegal memory access")))
    monkeypatch.setattr(peers, "named", lambda name: peers.ALL[-1])
    assert measured(LOGITS).status == "crashed"


def test_what_is_not_installed_is_skipped_with_its_reason(other: Other) -> None:
    other(lambda loss, i: loss(i), package="no_such_package")
    found = measured(LOGITS)
    assert (found.status, found.reason) == ("skipped", "no_such_package is not installed")


def test_no_peer_is_imported_unless_it_is_measured() -> None:
    """``installed`` looks without importing; the packages are large, and may be broken."""
    names = ("trl", "liger_kernel", "flash_attn", "cut_cross_entropy")
    code = f"import sys, benchmarks.peers; print([m for m in {names} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=records.ROOT)
    assert done.stdout.strip() == "[]"


def test_every_shape_is_compiled_by_itself() -> None:
    """And falling back to eager mode would be an error, not a slow record."""
    with torch._dynamo.config.patch(recompile_limit=2):
        for n in range(80, 84):
            assert run.measured(cases.small("tokens", n, 64, 8), "plain-compiled", SETTING).status == "ok"


def exits(code: int) -> None:
    os._exit(code)


def crashes() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def raises() -> None:
    raise ValueError("no\nnever")


def test_a_worker_survives_everything() -> None:
    worker = Worker()
    try:
        first = worker.call(60, os.getpid)
        assert first != os.getpid()
        with pytest.raises(RuntimeError, match="ValueError: no"):
            worker.call(60, raises)
        assert worker.call(60, os.getpid) == first, "an exception does not end it"
        for function, arguments, reason in (
            (exits, (3,), "exit code 3"), (crashes, (), "SIGSEGV"), (time.sleep, (100,), "no answer within 1 s"),
        ):  # fmt: skip
            with pytest.raises(Lost, match=reason):
                worker.call(1 if function is time.sleep else 60, function, *arguments)
        last = worker.call(60, os.getpid)
        assert last != first
    finally:
        worker.stop(5.0)
    with pytest.raises(ProcessLookupError):
        os.kill(last, 0)
