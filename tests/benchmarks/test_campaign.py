"""A run of benchmarks: what is timed, what is not and why, resuming, crashes, budgets."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import bench as bench_module
from benchmarks import campaign as module
from benchmarks import cases, command, floors, measure, peers, records, run, step
from benchmarks.peers.peer import Peer

CPU = torch.device("cpu")
LOGITS = cases.small("logits", 80, 64, 8)
LINEAR = cases.small("linear", 80, 64, 8, masked=0.4)
BF16_LOGITS, BF16_LINEAR = (cases.small(suite, 80, 64, 8, "bfloat16") for suite in ("logits", "linear"))
NAMES = ("caop_fast", "plain")


@pytest.fixture
def contender(monkeypatch):
    """Put a contender of one's own beside the others, built from ours: ``change(loss, inputs)`` is its loss."""

    def add(change, suites=("logits", "linear"), **options):
        def build(case):
            right = peers.ours.build(case)
            return lambda i: change(right, i)

        made = Peer("other", suites, build, **options)
        monkeypatch.setattr(peers, "ALL", (*peers.ALL, made))
        return made

    return add


def start(folder, *, impls=NAMES, minutes=5.0, header=None):
    found = records.header(CPU) if header is None else header
    results = records.Results(folder / "a.json", found)
    return module.Campaign(results, CPU, time.monotonic() + 60 * minutes, 0.01, 3, impls, say=lambda text: None)


def the(results, impl):
    (found,) = (r for r in results.records if r.impl == impl)
    return found


@pytest.mark.parametrize(
    "case", [LOGITS, LINEAR, cases.small("topk", 70, 90, 8), cases.small("linear-tokens", 9, 64, 8)]
)
def test_a_record_holds_what_was_measured(tmp_path, case):
    ours = start(tmp_path)
    assert ours.run([case])
    for name in NAMES:
        found = the(records.load(tmp_path / "a.json"), name)
        assert (found.status, found.n, found.v, found.model) == ("ok", case.n, case.v, "small")
        assert 0 < found.time_low_ms <= found.time_ms <= found.time_high_ms
        assert found.rounds == 3
        assert found.floor == ("gemms" if case.linear else "copy")
        assert found.floor_ms > 0
        assert (found.tflops is None) == (not case.linear)
        assert (found.gbps is None) == case.linear
        assert 0 < found.grad_error < 1e-3
        assert set(found.extra["full_errors"]) == set(found.extra["errors"])
        assert max(found.extra["full_errors"].values()) < 1e-3


def test_the_peak_counts_the_gradients(monkeypatch):
    """Those of an earlier step would be let go in this one, and hide as much."""
    bench = bench_module.Bench(LINEAR, CPU, floors.Floors(CPU, 0.01))
    leaves, peak, there = bench.inputs.leaves(), measure.peak, []

    def watched(step, device):
        there.extend(leaf.grad for leaf in leaves.values())
        return peak(step, device)

    monkeypatch.setattr(measure, "peak", watched)
    (plain,) = (p for p in peers.ALL if p.name == "plain")
    ready = run.examine(bench, plain)
    assert there == [None, None]
    assert ready.peak > sum(t.nbytes for t in leaves.values())


WRONG = {
    "gradient": lambda loss, i: loss(i) + 0.05 * (loss(i) - loss(i).detach()),
    "loss": lambda loss, i: loss(i) + 2 * loss(i).detach(),
    "nan": lambda loss, i: loss(i) * math.nan,
    "half the gradient": lambda loss, i: 0.5 * (loss(i) + loss(i).detach()),
    "all tokens": lambda loss, i: loss(i) + 0.05 * (loss(i) - loss(i).detach()) * float(i.case.n == LOGITS.n),
}


class NoUpstream(torch.autograd.Function):
    """A loss that takes the upstream gradient for 1."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, upstream):
        return torch.ones_like(upstream)


@pytest.mark.parametrize("case", [LOGITS, BF16_LOGITS, BF16_LINEAR], ids=lambda c: f"{c.suite} {c.dtype}")
@pytest.mark.parametrize("name", [*WRONG, "upstream"])
def test_what_is_wrong_is_not_timed(tmp_path, contender, name, case):
    contender((lambda loss, i: NoUpstream.apply(loss(i))) if name == "upstream" else WRONG[name])
    ours = start(tmp_path, impls=("other",))
    ours.run([case])
    found = the(ours.results, "other")
    assert found.status == "wrong", found
    assert found.time_ms is None
    assert ("full size" in found.reason) == (name == "all tokens")
    records.load(tmp_path / "a.json")


@pytest.mark.parametrize(
    "change",
    [lambda loss, i: NoUpstream.apply(loss(i)), lambda loss, i: loss(i) + 9 * (loss(i) - loss(i).detach())],
    ids=["upstream", "gradient"],
)
def test_rounded_logits_excuse_their_rounding_only(tmp_path, contender, change):
    contender(lambda loss, i: loss(i), rounding=True)
    ours = start(tmp_path, impls=("other",))
    ours.run([BF16_LINEAR])
    assert the(ours.results, "other").status == "ok"
    contender(change, rounding=True)
    ours.results.records.clear()
    ours.run([BF16_LINEAR])
    assert the(ours.results, "other").status == "wrong"


def test_what_lacks_a_gradient_is_wrong(tmp_path, contender):
    contender(lambda loss, i: loss(dataclasses.replace(i, weight=i.weight.detach())), ("linear",))
    ours = start(tmp_path, impls=("other",))
    ours.run([LINEAR])
    assert the(ours.results, "other").status == "wrong"


def raising_method(error):
    def method(self):
        raise error

    return method


def raising(error):
    def change(loss, i):
        raise error

    return change


@pytest.mark.parametrize(
    ("error", "status"), [(torch.OutOfMemoryError("no"), "oom"), (ValueError("bad shape\nmore"), "error")]
)
def test_what_fails_is_recorded_and_the_rest_goes_on(tmp_path, contender, error, status):
    contender(raising(error))
    ours = start(tmp_path, impls=("other", "plain"))
    assert ours.run([LOGITS])
    assert the(ours.results, "other").status == status
    assert "\n" not in the(ours.results, "other").reason
    assert the(ours.results, "plain").status == "ok"


def test_inputs_that_do_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_module, "make", raising(torch.OutOfMemoryError("no")))
    ours = start(tmp_path)
    assert ours.run([LOGITS])
    assert {r.status for r in ours.results.records} == {"oom"}


def test_what_is_not_installed_is_skipped_with_its_reason(tmp_path, contender):
    contender(lambda loss, i: loss(i), package="no_such_package")
    ours = start(tmp_path, impls=("other",))
    ours.run([LOGITS])
    assert (the(ours.results, "other").status, the(ours.results, "other").reason) == (
        "skipped",
        "no_such_package is not installed",
    )


def test_no_peer_is_imported_where_it_is_not_asked_for():
    """``installed`` looks without importing; the packages are heavy, and may be broken."""
    names = ("trl", "liger_kernel", "flash_attn", "cut_cross_entropy")
    code = f"import sys, benchmarks.peers; print([m for m in {names} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=records.ROOT)
    assert done.stdout.strip() == "[]"


def test_nothing_is_begun_after_the_deadline(tmp_path):
    ours = start(tmp_path, minutes=-1)
    assert not ours.run([LOGITS])
    assert ours.results.records == []


def goes_on(results, *, ended=None):
    """Another process with the same results."""
    chosen, until = ("other", *NAMES), time.monotonic() + 60
    return module.Campaign(results, CPU, until, 0.01, 3, chosen, say=lambda text: None, ended=ended)


def test_what_was_stopped_from_outside_runs_again_but_once(tmp_path):
    key = ("logits", LOGITS.name, "caop_fast")
    start(tmp_path)._mark(key)  # a time limit kills everything
    again = goes_on(records.load(tmp_path / "a.json"))
    again._mark(key)
    third = goes_on(records.load(tmp_path / "a.json"))
    assert the(third.results, "caop_fast").status == "crashed"
    start(tmp_path)._mark(key)
    again = goes_on(records.load(tmp_path / "a.json"))
    assert again.run([LOGITS])
    assert the(again.results, "caop_fast").status == "ok"


def test_inputs_that_end_a_process_are_met_by_all(tmp_path, monkeypatch):
    class Ended(BaseException):
        pass

    monkeypatch.setattr(bench_module, "make", raising(Ended()))
    with pytest.raises(Ended):
        start(tmp_path).run([LOGITS])
    again = goes_on(records.load(tmp_path / "a.json"), ended="it died of SIGKILL")
    assert {(r.impl, r.status) for r in again.results.records} == {(n, "crashed") for n in NAMES}


def test_a_deadline_behind_the_inputs_is_no_crash(tmp_path, monkeypatch):
    ours = start(tmp_path)
    right = module.Bench

    def late(*arguments):
        ours.deadline = time.monotonic() - 1
        return right(*arguments)

    monkeypatch.setattr(module, "Bench", late)
    assert not ours.run([LOGITS])
    ours.results.save()
    assert "running" not in records.load(tmp_path / "a.json").header


def test_ceilings_that_cannot_be_had_are_no_end(tmp_path, monkeypatch):
    monkeypatch.setattr(floors.Floors, "gemm_tflops", lambda self, dtype: 2.0)
    monkeypatch.setattr(floors.Floors, "_copy", raising_method(torch.OutOfMemoryError("4 GiB")))
    ours = start(tmp_path)
    ours.ceilings(("float32",))
    assert ours.results.header["ceilings"] == {}


def test_ceilings_that_end_a_process_are_not_begun_again(tmp_path, monkeypatch):
    def ends(what):
        raise KeyboardInterrupt

    first = start(tmp_path)
    first.begin = ends
    with pytest.raises(KeyboardInterrupt):
        first.ceilings(("float32",))
    again = goes_on(records.load(tmp_path / "a.json"))
    again.begin = ends
    again.ceilings(("float32",))
    assert again.results.header["ceilings"] == {}


def test_the_first_is_timed_once_more_behind_the_others(tmp_path):
    ours = start(tmp_path)
    ours.run([LOGITS, LINEAR])
    for record in ours.results.records:
        known = {name: record.extra.get(name) for name in ("again_ms", "floor_again_ms")}
        assert all(v > 0 for v in known.values()) if record.impl == "caop_fast" else not any(known.values())


def test_a_device_that_dies_in_a_step_is_not_another_contender_s(tmp_path, monkeypatch):
    case = step.SELECTIONS["tiny"][0]

    def dying(case, device, impls):
        yield step.blank(case, impls[0], "crashed", "illegal memory access")
        raise run.Dead("illegal memory access")

    monkeypatch.setattr(module.step, "records", dying)
    ours = start(tmp_path, impls=None)
    with pytest.raises(run.Dead, match="illegal"):
        ours.run([case])
    assert [(r.impl, r.status) for r in ours.results.records] == [("caop_fast", "crashed")]
    assert "running" not in ours.results.header


def test_a_full_memory_is_no_dead_device(tmp_path, contender, monkeypatch):
    monkeypatch.setattr(run, "dead", lambda error: True)
    monkeypatch.setattr(module, "dead", lambda error: True)
    contender(raising(torch.OutOfMemoryError("CUDA out of memory")))
    ours = start(tmp_path, impls=("other",))
    assert ours.run([LOGITS])
    assert the(ours.results, "other").status == "oom"
    monkeypatch.setattr(bench_module, "make", raising(torch.OutOfMemoryError("no")))
    ours.results.records.clear()
    assert ours.run([LOGITS])
    assert the(ours.results, "other").status == "oom"


def test_a_run_is_resumed_and_a_crash_is_told(tmp_path, contender):
    first = start(tmp_path, impls=("plain",))
    first.run([LOGITS])
    first._mark(("logits", LOGITS.name, "caop_fast"))  # and here the process dies
    calls = []
    contender(lambda loss, i: calls.append(1) or loss(i))
    found = records.load(tmp_path / "a.json")
    again = goes_on(found, ended="it died of SIGSEGV")
    before = the(again.results, "plain")
    assert again.run([LOGITS])
    assert the(again.results, "plain") == before
    assert the(again.results, "caop_fast").status == "crashed"
    assert "SIGSEGV" in the(again.results, "caop_fast").reason
    assert the(again.results, "other").status == "ok"
    assert "running" not in json.loads((tmp_path / "a.json").read_text())["header"]


def test_a_dead_device_is_recorded_and_ends_the_run(tmp_path, contender, monkeypatch):
    contender(raising(RuntimeError("illegal memory access")))
    monkeypatch.setattr(run, "dead", lambda error: True)
    ours = start(tmp_path, impls=("other", "plain"))
    with pytest.raises(run.Dead, match="illegal"):
        ours.run([LOGITS])
    told = [(r.impl, r.status) for r in records.load(tmp_path / "a.json").records]
    assert told == [("plain", "ok"), ("other", "crashed")]


def test_a_device_that_dies_with_the_inputs_is_not_begun_again(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_module, "make", raising(RuntimeError("illegal memory access")))
    monkeypatch.setattr(module, "dead", lambda error: True)
    ours = start(tmp_path)
    with pytest.raises(run.Dead):
        ours.run([LOGITS])
    assert {(r.impl, r.status) for r in records.load(tmp_path / "a.json").records} == {(n, "crashed") for n in NAMES}


def test_a_gradient_that_is_not_finite_is_seen_behind_a_good_one(tmp_path, contender):
    contender(lambda loss, i: loss(i) + Poison.apply(i.weight), ("linear",))
    ours = start(tmp_path, impls=("other",))
    ours.run([LINEAR])
    assert the(ours.results, "other").status == "wrong"


class Poison(torch.autograd.Function):
    """Zero, with a gradient of NaN."""

    @staticmethod
    def forward(ctx, weight):
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx, upstream):
        return torch.full((LINEAR.v, LINEAR.h), math.nan)


@pytest.mark.slow
def test_many_shapes_are_compiled_each_for_itself(tmp_path):
    """A compiler that goes on from shape to shape turns to dynamic shapes and then, silently, to eager code."""
    ours = start(tmp_path, impls=("plain-compiled",))
    with torch._dynamo.config.patch(recompile_limit=2):  # monkeypatch would delete the option at the end
        ours.run([cases.small("logits", 70 + n, 32 + n, 8) for n in range(4)])
    assert [r.status for r in ours.results.records] == ["ok"] * 4, [r.reason for r in ours.results.records]


def test_the_loss_of_all_tokens_is_looked_at(tmp_path, contender):
    contender(lambda loss, i: loss(i) + 0.1 * loss(i).detach() * float(i.case.n == LOGITS.n))
    ours = start(tmp_path, impls=("other",))
    ours.run([LOGITS])
    assert the(ours.results, "other").status == "wrong"


def test_a_head_s_gradient_is_looked_at_in_the_full_size(tmp_path, contender):
    """One chunk left out of grad_weight shows with all tokens only."""

    def change(loss, i):
        if i.case.n == LINEAR.n:
            i = dataclasses.replace(i, weight=i.weight * 1.0)
            i.weight.register_hook(lambda g: 0.9 * g)
        return loss(i)

    contender(change, ("linear",))
    ours = start(tmp_path, impls=("other",))
    ours.run([LINEAR])
    assert the(ours.results, "other").status == "wrong"


def test_a_file_is_whole_or_as_before(tmp_path, monkeypatch):
    ours = start(tmp_path)
    ours.run([LOGITS])
    before = (tmp_path / "a.json").read_bytes()
    with pytest.raises(TypeError):
        ours.results.add(records.Record("logits", "x", "y", extra={"t": torch.ones(1)}))
    with pytest.raises(ValueError, match="JSON compliant"):
        ours.results.add(records.Record("logits", "x", "y", grad_error=math.nan))
    assert (tmp_path / "a.json").read_bytes() == before
    ours.results.save()
    assert (tmp_path / "a.json").read_bytes() == before, "what could not be saved is not kept"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    (tmp_path / "b.json").write_text('{"header": {"format": 99}, "records": []}')
    with pytest.raises(ValueError, match=r"b\.json is not a results file"):
        records.load(tmp_path / "b.json")


def test_where_a_run_goes_on(tmp_path, monkeypatch):
    """In the file of the same device, commit and versions, and in no other."""
    first = command.open_results(tmp_path, CPU, fresh=False)
    first.save()
    assert command.open_results(tmp_path, CPU, fresh=False).path == first.path
    assert command.open_results(tmp_path, CPU, fresh=True).path.stem == f"{first.path.stem}-2"
    known = records.header(CPU)
    monkeypatch.setattr(command, "header", lambda device: {**known, "sources": "another"})
    assert command.open_results(tmp_path, CPU, fresh=False).path.stem == f"{first.path.stem}-2"


def test_the_command_names_no_folder_of_this_machine(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(records.ROOT / "benchmarks" / "cpu.py"), "--minutes", "3"])
    assert records.header(CPU)["command"] == "python -m benchmarks.cpu --minutes 3"
