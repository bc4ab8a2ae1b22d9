"""The benchmark of a training step: implementations agree, what is wrong or too large is not timed, nothing leaks."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from benchmarks import run, step
from benchmarks.measure import Wrong, peak
from benchmarks.step import FIRST_SEED, IMPLEMENTATIONS, MODELS, SELECTIONS, STAGES, Implementation, StepBench, StepCase
from caop_fast.training import Rollout

CPU, TINY = torch.device("cpu"), SELECTIONS["tiny"][0]
FORWARD, LOSS = IMPLEMENTATIONS["official"]


@pytest.fixture(scope="module", autouse=True)
def one_round() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(step.ROUNDS, "cpu", 1)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bench() -> StepBench:
    return StepBench(TINY, CPU)


def half_gradient(*sides: Any) -> Tensor:
    loss = LOSS(*sides)
    return loss.detach() + 0.5 * (loss - loss.detach())


def stopped_at_the_prompt(*arguments: Any) -> tuple[Tensor, Tensor]:
    """As with a detached key-value cache: only gradients show it."""
    hidden, head = IMPLEMENTATIONS["caop_fast"][0](*arguments)
    return (hidden.detach() + 0 * hidden if hidden.requires_grad else hidden), head


def test_both_do_the_same_step(bench: StepBench) -> None:
    ours, theirs = (bench.measure(impl) for impl in ("caop_fast", "official"))
    assert ours.extra["sampled"] == theirs.extra["sampled"]
    assert ours.extra["loss"] == pytest.approx(theirs.extra["loss"], rel=1e-4)
    for found in (ours, theirs):
        assert (found.status, found.rounds, found.key) == ("ok", 1, ("step", TINY.name, found.impl))
        assert max(found.loss_error or 0, found.grad_error or 0) < 1e-4
        n, split = found.extra["tokens"], found.extra["split_ms"]
        assert (found.shape.n, tuple(split), min(split.values()) > 0) == (n, STAGES, True)
        assert sum(split.values()) == pytest.approx(found.ms)
        assert found.extra["tokens_per_s"] == pytest.approx(1e3 * n / found.ms)
        assert found.extra["tokens_per_s_without_rollout"] == pytest.approx(1e3 * n / (found.ms - split["rollout"]))


@pytest.mark.parametrize(("beta", "tied"), [(0.5, True), (1.0, False)])
def test_every_gradient_agrees_for_ragged_rollouts(monkeypatch: pytest.MonkeyPatch, beta: float, tied: bool) -> None:
    lengths = [1, 6, 4, 2, 6, 5]
    drawn = [Rollout(i // 2, [(40 * i + 7 * j) % 97 for j in range(n)], True, "") for i, n in enumerate(lengths)]
    monkeypatch.setattr("caop_fast.training.sample_rollouts", lambda *_, **__: drawn)
    changed = {"vocab_size": 97, "pad_token_id": 20, "eos_token_id": 21, "tie_word_embeddings": tied}
    monkeypatch.setitem(MODELS, "ragged", MODELS["small"] | changed)
    bench = StepBench(dataclasses.replace(TINY, model="ragged", beta=beta), CPU)
    batch, weights = bench.sample(0), list(bench.student.parameters())
    assert max(max(p) for p in (*bench.prompts, *bench.teacher_prompts)) < 20
    right, *gradients = bench.refer(batch, weights)
    for forward, loss in IMPLEMENTATIONS.values():
        teacher = forward(bench.teacher, bench.teacher_prompts, batch)
        found = loss(forward(bench.student, bench.prompts, batch), teacher, batch)
        torch.testing.assert_close(found, right, rtol=1e-4, atol=0.0)
        for mine, gradient in zip(torch.autograd.grad(found, weights), gradients, strict=True):
            assert (mine - gradient).norm() <= 1e-3 * gradient.norm()


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ((FORWARD, lambda *sides: 1.01 * LOSS(*sides)), r"^error 0\.01 of loss"),
        ((FORWARD, lambda *sides: float("nan") * LOSS(*sides)), "^error nan of loss"),
        ((FORWARD, half_gradient), r"gradient error 0\.5"),
        ((stopped_at_the_prompt, IMPLEMENTATIONS["caop_fast"][1]), "gradient .* of model.layers.0"),
    ],
    ids=["loss", "nan", "gradient", "prompt"],
)
def test_what_is_wrong_is_not_timed(
    bench: StepBench, monkeypatch: pytest.MonkeyPatch, wrong: Implementation, reason: str
) -> None:
    monkeypatch.setitem(IMPLEMENTATIONS, "other", wrong)
    with pytest.raises(Wrong, match=reason):
        bench.measure("other")


def test_nothing_of_one_implementation_reaches_the_next(bench: StepBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its updates nor weights that it modifies nor gradients: the next step is that from the first weights."""

    def loss(*sides: Any) -> Tensor:
        LOSS(*sides).backward()
        with torch.no_grad():
            bench.student.lm_head.weight.mul_(3)
        raise ZeroDivisionError

    monkeypatch.setitem(IMPLEMENTATIONS, "other", (FORWARD, loss))
    with pytest.raises(ZeroDivisionError):
        bench.measure("other")
    assert all(p.grad is None for p in bench.student.parameters())
    found = bench.measure("official")
    assert max(found.loss_error or 0, found.grad_error or 0) < 1e-4


def test_a_step_updates_and_reset_undoes_it(bench: StepBench) -> None:
    bench.reset()
    before = [p.clone() for p in bench.student.parameters()]
    held = [t for state in bench.optimizer.state.values() for t in state.values()]
    gradients = bench.step("official", FIRST_SEED)[2][1:]
    assert all(g is not None and g.any() for g in gradients)
    assert not any(torch.equal(p, b) for p, b in zip(bench.student.parameters(), before, strict=True))
    assert all(t.any() for t in held)
    bench.reset()
    assert all(torch.equal(p, b) for p, b in zip(bench.student.parameters(), before, strict=True))
    assert not any(t.any() for t in held)


def test_the_model_is_that_of_transformers_and_the_same_every_time(bench: StepBench) -> None:
    mine, again = bench.teacher, StepBench(dataclasses.replace(TINY, dtype="bfloat16"), CPU)
    assert (type(mine).__name__, mine.config.rope_parameters["rope_theta"]) == ("Qwen3ForCausalLM", 1e6)
    assert (len(mine.model.layers), mine.lm_head.weight.shape) == (2, (211, 32))
    assert mine.lm_head.weight is mine.model.embed_tokens.weight
    for first, same in zip(mine.parameters(), again.student.parameters(), strict=True):
        torch.testing.assert_close(first.bfloat16(), same)
    for name in IMPLEMENTATIONS:
        assert 1e-4 < (again.measure(name).grad_error or 0) < 2e-2  # of bfloat16


@pytest.mark.parametrize(
    ("case", "model"),
    [
        (dataclasses.replace(TINY, model="large", rollouts=8), {"vocab_size": 2000}),
        (dataclasses.replace(TINY, model="large"), {"hidden_size": 256, "intermediate_size": 768}),
        (dataclasses.replace(TINY, model="large", layers=4, prompt_tokens=48, dtype="bfloat16"), {}),
    ],
)
def test_memory_is_estimated_from_above(monkeypatch: pytest.MonkeyPatch, case: StepCase, model: dict[str, int]) -> None:
    monkeypatch.setitem(MODELS, "large", MODELS["small"] | model)
    bench = StepBench(case, CPU)
    held: list[Tensor] = [*bench.student.parameters(), *bench.teacher.parameters(), *bench.exact]
    held += [t for state in bench.optimizer.state.values() for t in state.values()]
    for impl in IMPLEMENTATIONS:
        bench.reset()
        measured = sum(t.nbytes for t in held) + peak(functools.partial(bench.step, impl, FIRST_SEED), CPU)
        assert measured <= step.needed_bytes(case, impl) <= 1.6 * measured


def test_what_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run.refusal(TINY, "official", CPU) is None
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 85_000_000_000}.__getitem__)
    gpu = SELECTIONS["cuda"]  # on a card with 80 GB
    assert not any(run.refusal(case, "caop_fast", CPU) for case in gpu)
    assert [run.refusal(case, "official", CPU) is None for case in gpu] == [True, True, True, False]
    assert str(run.refusal(gpu[3], "official", CPU)).endswith("GB of 80.8 GB")
    monkeypatch.setattr(run.peers, "installed", lambda package: False)
    assert run.refusal(TINY, "official", CPU) == "transformers is not installed"


def test_cases_and_prompts(bench: StepBench) -> None:
    cases = [case for chosen in SELECTIONS.values() for case in chosen]
    assert len({case.name for case in cases}) == len(cases)
    assert all(case.layers <= MODELS[case.model]["num_hidden_layers"] for case in cases)
    assert (len(bench.prompts[0]), len(bench.prompts[-1])) == (6, TINY.prompt_tokens)
    assert len(bench.teacher_prompts[-1]) == TINY.teacher_prompt_tokens > TINY.prompt_tokens
