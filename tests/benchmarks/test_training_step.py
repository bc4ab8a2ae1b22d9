"""The benchmark of a training step: its contenders agree, what disagrees or fails is not timed, nothing leaks."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from transformers import Qwen3ForCausalLM  # noqa: E402

from benchmarks import step, step_bench  # noqa: E402
from benchmarks.run import Dead  # noqa: E402
from benchmarks.step_bench import CONTENDERS, FIRST_SEED, STAGES, Bench, Contender, reference  # noqa: E402

CPU = torch.device("cpu")
CASE = step.TINY
OFFICIAL = CONTENDERS["official"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return step.prepared(CASE, CPU)


@pytest.fixture(scope="module")
def both() -> dict[str, step.Record]:
    return {record.impl: record for record in step.records(CASE, CPU, 5)}


@pytest.fixture
def planted(monkeypatch):
    """Put a contender in the registry, in front of the others."""

    def plant(contender: Contender) -> None:
        monkeypatch.setattr(step, "CONTENDERS", {"planted": contender, **CONTENDERS})

    return plant


def outcome(case: step.StepCase = CASE, impl: str = "planted") -> step.Record:
    (found,) = step.records(case, CPU, 1, [impl])
    return found


def scaled(factor: float) -> Contender:
    """The official loop with a loss that is off by a factor."""
    return Contender(OFFICIAL.forward, lambda *sides: factor * OFFICIAL.loss(*sides))


def raising(error: Exception) -> Contender:
    def forward(*_):
        raise error

    return Contender(forward, OFFICIAL.loss)


class WrongGradient(torch.autograd.Function):
    """Identity with half the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 0.5 * gradient


def test_records_hold_what_the_tables_read(both):
    assert list(both) == ["caop_fast", "official"]
    for found in both.values():
        assert (found.status, found.reason, found.rounds) == ("ok", None, 5)
        assert found.key == ("step", CASE.name, found.impl)
        assert (found.v, found.h, found.head_trained, found.n) == (211, 32, True, found.extra["tokens"])
        assert found.peak_bytes > 0
        assert found.time_low_ms <= found.time_ms <= found.time_high_ms
        assert found.extra["tokens_per_s"] == pytest.approx(1e3 * found.n / found.time_ms, rel=0.5)
        assert (found.extra["layers"], found.extra["layers_published"]) == (2, 2)
        json.dumps(dataclasses.asdict(found), allow_nan=False)


def test_both_do_the_same_step(both):
    ours, theirs = both.values()
    assert ours.extra["sampled"] == theirs.extra["sampled"]
    assert ours.extra["loss"] == pytest.approx(theirs.extra["loss"], rel=1e-4)
    assert max(ours.loss_error, theirs.loss_error) < 1e-4
    assert max(ours.grad_error, theirs.grad_error) < 1e-4


def test_the_split_adds_up(both):
    for found in both.values():
        assert tuple(found.extra["split_ms"]) == STAGES
        assert min(found.extra["split_ms"].values()) > 0
        assert sum(found.extra["split_ms"].values()) == pytest.approx(found.time_ms, rel=0.3)


@pytest.mark.parametrize("beta", [0.5, 1.0])
@pytest.mark.parametrize("tied", [True, False])
def test_agreement_in_every_gradient_with_ragged_rollouts(monkeypatch, beta, tied):
    monkeypatch.setitem(step.MODELS, "ragged", dataclasses.replace(step.MODELS["small"], vocab=97, tied=tied))
    bench = Bench(dataclasses.replace(CASE, model="ragged", beta=beta), CPU)
    generator = torch.Generator().manual_seed(3)
    lengths = [1, 6, 4, 2, 6, 5]
    ids = [torch.randint(2, 97, (n,), generator=generator).tolist() for n in lengths]
    batch = bench.batch(ids, [0, 0, 1, 1, 2, 2])
    weights = list(bench.student.parameters())
    loss, gradients = reference(bench.student, bench.teacher, batch, weights)
    for contender in CONTENDERS.values():
        with torch.no_grad():
            teacher = contender.forward(bench.teacher, batch.teacher_prompts, batch)
        found = contender.loss(contender.forward(bench.student, batch.prompts, batch), teacher, batch)
        assert found.item() == pytest.approx(loss, rel=1e-4)
        for mine, right in zip(torch.autograd.grad(found, weights), gradients, strict=True):
            assert (mine - right).norm() <= 1e-3 * right.norm()
    assert batch.tokens == sum(lengths)


def test_bfloat16():
    for found in step.records(dataclasses.replace(CASE, dtype="bfloat16"), CPU, 1):
        assert (found.status, found.dtype) == ("ok", "bfloat16")
        assert found.grad_error < 2e-2


@pytest.mark.parametrize("factor", [1.01, 0.0, float("nan")])
def test_a_wrong_loss_is_not_timed(planted, factor):
    planted(scaled(factor))
    found = outcome()
    assert found.status == "wrong"
    assert "loss error" in found.reason
    assert (found.time_ms, found.rounds, found.peak_bytes) == (None, 0, None)


def test_a_wrong_gradient_is_not_timed(planted):
    planted(Contender(OFFICIAL.forward, lambda *sides: WrongGradient.apply(OFFICIAL.loss(*sides))))
    found = outcome()
    assert (found.status, found.time_ms) == ("wrong", None)
    assert found.reason.startswith("gradient error 0.5")


def test_a_gradient_that_stops_at_the_prompt_is_not_timed(planted):
    """As it would with a detached key-value cache: only gradients tell."""

    def forward(model, prompts, batch):
        hidden, head = CONTENDERS["caop_fast"].forward(model, prompts, batch)
        return (hidden.detach() + 0 * hidden if hidden.requires_grad else hidden), head

    planted(Contender(forward, CONTENDERS["caop_fast"].loss))
    found = outcome()
    assert (found.status, found.time_ms) == ("wrong", None)
    assert "first layer" in found.reason


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "oom"),
        (MemoryError(), "oom"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "oom"),
        (ZeroDivisionError("division by zero"), "error"),
    ],
)
def test_what_fails_is_recorded(planted, error, status):
    planted(raising(error))
    found = outcome()
    assert (found.status, found.time_ms) == (status, None)
    assert found.reason


def test_a_dead_device_is_recorded_and_ends_the_run(planted, monkeypatch):
    planted(raising(RuntimeError("an illegal memory access was encountered")))
    monkeypatch.setattr(step, "dead", lambda error: True)
    records = step.records(CASE, CPU, 1)
    assert next(records).status == "crashed"
    with pytest.raises(Dead):
        next(records)


def test_models_that_do_not_fit_are_a_record_for_each(monkeypatch):
    def make_model(case, device):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(step_bench, "make_model", make_model)
    assert [(r.impl, r.status) for r in step.records(CASE, CPU, 1)] == [("caop_fast", "oom"), ("official", "oom")]


def test_no_transformers(monkeypatch):
    monkeypatch.setattr(step, "installed", lambda package: False)
    assert [r.status for r in step.records(CASE, CPU, 1)] == ["skipped", "skipped"]


def test_unknown_contender():
    with pytest.raises(ValueError, match="nonsense"):
        next(step.records(CASE, CPU, 1, ["nonsense"]))


def test_nothing_of_a_contender_reaches_the_next(planted, both):
    """Neither its updates nor weights that it breaks: loss and rollouts are those of a run without it."""

    def forward(model, prompts, batch):
        if model.training:
            with torch.no_grad():
                model.lm_head.weight.mul_(3)
        return OFFICIAL.forward(model, prompts, batch)

    planted(Contender(forward, OFFICIAL.loss))
    first, second = step.records(CASE, CPU, 5, ["planted", "official"])
    assert first.status == "wrong"  # and the next one goes on
    assert second.status == "ok"
    assert second.extra["loss"] == both["official"].extra["loss"]
    assert second.extra["sampled"] == both["official"].extra["sampled"]


def test_a_step_updates_and_reset_takes_it_back(bench):
    bench.reset()
    before = [p.clone() for p in bench.student.parameters()]
    held = {id(t) for state in bench.optimizer.state.values() for t in state.values()}
    bench.step(OFFICIAL, FIRST_SEED)
    assert not any(torch.equal(p, b) for p, b in zip(bench.student.parameters(), before, strict=True))
    assert held == {id(t) for state in bench.optimizer.state.values() for t in state.values()}
    bench.reset()
    assert all(torch.equal(p, b) for p, b in zip(bench.student.parameters(), before, strict=True))
    assert all(p.grad is None for p in bench.student.parameters())
    assert not any(t.any() for state in bench.optimizer.state.values() for t in state.values())


def test_gradients_are_held_only_on_request(bench):
    bench.reset()
    assert bench.step(OFFICIAL, FIRST_SEED).gradients == {}
    bench.reset()
    kept = bench.step(OFFICIAL, FIRST_SEED, keep=True).gradients
    assert list(kept) == list(bench.compared())
    assert all(g is not None and g.any() for g in kept.values())


def test_the_model_is_what_transformers_makes_of_its_weights():
    mine = step_bench.make_model(CASE, CPU)
    other = Qwen3ForCausalLM(mine.config)
    other.load_state_dict(mine.state_dict())
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(mine(input_ids=ids).logits, other(input_ids=ids).logits)
    assert mine.lm_head.weight is mine.model.embed_tokens.weight
    again = step_bench.make_model(CASE, CPU)
    assert all(torch.equal(p, q) for p, q in zip(mine.parameters(), again.parameters(), strict=True))
    assert not any(t.is_meta for t in (*mine.parameters(), *mine.buffers()))


def test_presets():
    cases = [case for chosen in step.SELECTIONS.values() for case in chosen]
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert 0 < case.layers <= case.architecture.layers
        assert case.teacher_prompt_tokens > case.prompt_tokens
    assert set(step.SELECTIONS) == {"gpu", "cpu", "quick", "tiny"}


def test_prompts(bench):
    lengths = [len(p) for p in bench.prompts]
    assert (min(lengths), max(lengths)) == (6, CASE.prompt_tokens)
    assert max(map(len, bench.teacher_prompts)) == CASE.teacher_prompt_tokens
    ids = {i for p in (*bench.prompts, *bench.teacher_prompts) for i in p}
    assert not ids & {CASE.architecture.pad, CASE.architecture.eos}
    assert min(ids) < 30 < 180 < max(ids)


def test_command(capsys):
    assert step.main(["--selection", "tiny", "--device", "cpu", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(CASE.name)
    assert [line.split()[0] for line in lines[-2:]] == ["caop_fast", "official"]
