"""The benchmark of a training step: implementations agree, what disagrees or fails is not timed, nothing leaks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
from benchmarks.failures import Dead
from benchmarks.step.bench import FIRST_SEED, IMPLEMENTATIONS, STAGES, Batch, Bench, Implementation, Prompts, reference
from benchmarks.step.cases import MODELS, SELECTIONS, TINY, StepCase
from benchmarks.step.job import StepJob
from transformers import Qwen3ForCausalLM

from benchmarks.records import Record
from benchmarks.step import bench as bench_module
from benchmarks.step import job as module

CPU = torch.device("cpu")
OFFICIAL, OURS = IMPLEMENTATIONS["official"], IMPLEMENTATIONS["caop_fast"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.ROUNDS, "cpu", 1)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return StepJob(TINY).prepare(CPU)


@pytest.fixture(scope="module")
def both(bench: Bench) -> dict[str, Record]:
    """In five rounds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module.ROUNDS, "cpu", 5)
        return {name: StepJob(TINY).measure(bench, name) for name in IMPLEMENTATIONS}


@pytest.fixture
def outcome(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Callable[[Implementation], Record]:
    """The record of an implementation of one's own."""

    def measure(implementation: Implementation) -> Record:
        monkeypatch.setitem(IMPLEMENTATIONS, "other", implementation)
        return StepJob(TINY).measure(bench, "other")

    return measure


def scaled(factor: float) -> Implementation:
    """The official loop with a loss times ``factor``."""
    return Implementation(OFFICIAL.forward, lambda *sides: factor * OFFICIAL.loss(*sides))


def raising(error: Exception) -> Callable[..., NoReturn]:
    def call(*arguments: object) -> NoReturn:
        raise error

    return call


class HalfGradient(torch.autograd.Function):
    """The identity with half the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return 0.5 * grad_output


def test_records_have_what_the_tables_show(both: dict[str, Record]) -> None:
    assert list(both) == ["caop_fast", "official"]
    for found in both.values():
        assert (found.status, found.reason, found.rounds) == ("ok", None, 5)
        assert found.key == ("step", TINY.name, found.impl)
        shape = found.shape
        assert (shape.v, shape.h, shape.head_trained, shape.n) == (211, 32, True, found.extra["tokens"])
        assert found.peak_bytes
        assert found.time_low_ms is not None
        assert found.time_high_ms is not None
        assert found.time_low_ms <= found.ms <= found.time_high_ms
        assert found.extra["tokens_per_s"] > 0
        assert (found.extra["layers"], found.extra["layers_published"]) == (2, 2)
        assert tuple(found.extra["split_ms"]) == STAGES
        assert min(found.extra["split_ms"].values()) > 0
        json.dumps(found.row(), allow_nan=False)


def test_the_stages_of_a_round_add_up() -> None:
    rounds = [module.Round(dict.fromkeys(STAGES, ms), tokens=100, sampled=1) for ms in (1.0, 2.0, 3.0)]
    found = module.filled(TINY.record("official"), module.Examined(0.0, {"head": 0.0}, 1.0, 1), rounds)
    assert found.time_ms == 2.0 * len(STAGES)
    assert found.extra["split_ms"] == dict.fromkeys(STAGES, 2.0)
    assert found.extra["tokens_per_s"] == pytest.approx(1e3 * 100 / (2.0 * len(STAGES)))
    assert found.extra["tokens_per_s_without_rollout"] == pytest.approx(1e3 * 100 / (2.0 * (len(STAGES) - 1)))


def test_both_do_the_same_step(both: dict[str, Record]) -> None:
    ours, theirs = both.values()
    assert ours.extra["sampled"] == theirs.extra["sampled"]
    assert ours.extra["loss"] == pytest.approx(theirs.extra["loss"], rel=1e-4)
    for found in both.values():
        assert found.loss_error is not None
        assert found.grad_error is not None
        assert max(found.loss_error, found.grad_error) < 1e-4


@pytest.mark.parametrize(("beta", "tied"), [(0.5, True), (1.0, False)])
def test_every_gradient_agrees_for_ragged_rollouts(monkeypatch: pytest.MonkeyPatch, beta: float, tied: bool) -> None:
    monkeypatch.setitem(MODELS, "ragged", dataclasses.replace(MODELS["small"], vocab=97, tied=tied))
    bench = Bench(dataclasses.replace(TINY, model="ragged", beta=beta), CPU)
    generator = torch.Generator().manual_seed(3)
    lengths = [1, 6, 4, 2, 6, 5]
    ids = [torch.randint(2, 97, (n,), generator=generator).tolist() for n in lengths]
    batch = bench.batch(ids, [0, 0, 1, 1, 2, 2])
    weights = list(bench.student.parameters())
    loss, gradients = reference(bench.student, bench.teacher, batch, weights)
    for implementation in IMPLEMENTATIONS.values():
        with torch.no_grad():
            teacher = implementation.forward(bench.teacher, batch.teacher_prompts, batch)
        found = implementation.loss(implementation.forward(bench.student, batch.prompts, batch), teacher, batch)
        assert found.item() == pytest.approx(loss, rel=1e-4)
        for mine, right in zip(torch.autograd.grad(found, weights), gradients, strict=True):
            assert (mine - right).norm() <= 1e-3 * right.norm()
    assert batch.tokens == sum(lengths)


def test_bfloat16() -> None:
    job = StepJob(dataclasses.replace(TINY, dtype="bfloat16"))
    bench = job.prepare(CPU)
    for name in IMPLEMENTATIONS:
        found = job.measure(bench, name)
        assert (found.status, found.shape.dtype) == ("ok", "bfloat16")
        assert found.grad_error is not None
        assert found.grad_error < 2e-2


def stopped_at_the_prompt(model: Qwen3ForCausalLM, prompts: Prompts, batch: Batch) -> tuple[Tensor, Tensor]:
    """As with a detached key-value cache: only gradients show it."""
    hidden, head = OURS.forward(model, prompts, batch)
    return (hidden.detach() + 0 * hidden if hidden.requires_grad else hidden), head


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (scaled(1.01), "loss error"),
        (scaled(float("nan")), "loss error"),
        (Implementation(OFFICIAL.forward, lambda *s: HalfGradient.apply(OFFICIAL.loss(*s))), "gradient error 0.5"),
        (Implementation(stopped_at_the_prompt, OURS.loss), "first layer"),
    ],
    ids=["loss", "nan", "gradient", "prompt"],
)
def test_what_is_wrong_is_not_timed(
    outcome: Callable[[Implementation], Record], wrong: Implementation, reason: str
) -> None:
    found = outcome(wrong)
    assert (found.status, found.time_ms, found.rounds, found.peak_bytes) == ("wrong", None, 0, None)
    assert reason in str(found.reason)


@pytest.mark.parametrize(("error", "status"), [(torch.OutOfMemoryError("no"), "oom"), (ZeroDivisionError(), "error")])
def test_what_fails_is_recorded(outcome: Callable[[Implementation], Record], error: Exception, status: str) -> None:
    found = outcome(Implementation(raising(error), OFFICIAL.loss))
    assert (found.status, found.time_ms) == (status, None)
    assert found.reason


def test_a_dead_device_is_not_an_error(
    outcome: Callable[[Implementation], Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.failures.dead", lambda error: True)
    with pytest.raises(Dead, match="illegal"):
        outcome(Implementation(raising(RuntimeError("an illegal memory access")), OFFICIAL.loss))


def test_without_transformers_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert StepJob(TINY).refusal("official", CPU) is None
    monkeypatch.setattr(module, "installed", lambda package: False)
    assert StepJob(TINY).refusal("official", CPU) == "transformers is not installed"


def test_nothing_of_one_implementation_reaches_the_next(
    outcome: Callable[[Implementation], Record], bench: Bench, both: dict[str, Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its updates nor weights that it modifies: loss and rollouts are those of a run without it."""

    def forward(model: Qwen3ForCausalLM, prompts: Prompts, batch: Batch) -> Any:
        if model.training:
            with torch.no_grad():
                model.lm_head.weight.mul_(3)
        return OFFICIAL.forward(model, prompts, batch)

    assert outcome(Implementation(forward, OFFICIAL.loss)).status == "wrong"
    monkeypatch.setitem(module.ROUNDS, "cpu", 5)
    found = StepJob(TINY).measure(bench, "official")
    assert found.status == "ok"
    assert found.extra["loss"] == both["official"].extra["loss"]
    assert found.extra["sampled"] == both["official"].extra["sampled"]


def test_a_step_updates_and_reset_undoes_it(bench: Bench) -> None:
    bench.reset()
    before = [p.clone() for p in bench.student.parameters()]
    held = {id(t) for state in bench.optimizer.state.values() for t in state.values()}
    assert bench.step(OFFICIAL, FIRST_SEED).gradients == {}
    assert not any(torch.equal(p, b) for p, b in zip(bench.student.parameters(), before, strict=True))
    assert held == {id(t) for state in bench.optimizer.state.values() for t in state.values()}
    bench.reset()
    assert all(torch.equal(p, b) for p, b in zip(bench.student.parameters(), before, strict=True))
    assert all(p.grad is None for p in bench.student.parameters())
    assert not any(t.any() for state in bench.optimizer.state.values() for t in state.values())
    kept = bench.step(OFFICIAL, FIRST_SEED, keep=True).gradients
    assert list(kept) == list(bench.compared())
    assert all(g is not None and g.any() for g in kept.values())


def test_the_model_is_that_of_transformers(bench: Bench) -> None:
    mine = bench_module.make_model(TINY, CPU)
    other = Qwen3ForCausalLM(mine.config)
    other.load_state_dict(mine.state_dict())
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(mine(input_ids=ids).logits, other(input_ids=ids).logits)
    assert mine.config.get_text_config().rope_parameters["rope_theta"] == 1e6
    assert mine.lm_head.weight is mine.model.embed_tokens.weight
    assert all(torch.equal(p, q) for p, q in zip(mine.parameters(), bench.teacher.parameters(), strict=True))
    assert not any(t.is_meta for t in (*mine.parameters(), *mine.buffers()))


def test_selections() -> None:
    cases: list[StepCase] = [case for chosen in SELECTIONS.values() for case in chosen]
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert 0 < case.layers <= case.architecture.layers
        assert case.teacher_prompt_tokens > case.prompt_tokens


def test_prompts(bench: Bench) -> None:
    lengths = [len(p) for p in bench.prompts]
    assert (min(lengths), max(lengths)) == (6, TINY.prompt_tokens)
    assert max(map(len, bench.teacher_prompts)) == TINY.teacher_prompt_tokens
    ids = {i for p in (*bench.prompts, *bench.teacher_prompts) for i in p}
    assert not ids & {TINY.architecture.pad, TINY.architecture.eos}
    assert min(ids) < 30 < 180 < max(ids)
