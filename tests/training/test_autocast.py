"""``torch.autocast`` keeps 16-bit copies of weights until its outermost region ends; when trained they are stale."""

from __future__ import annotations

import pytest
import torch

from caop_fast.training import TrainConfig, evaluate, sample_rollouts, student_prompts, train

CONFIG = TrainConfig(
    steps=5,
    prompts_per_step=3,
    rollouts_per_prompt=4,
    max_new_tokens=10,
    warmup_steps=1,
    learning_rate=1e-2,
    micro_batch_prompts=2,
    seed=2,
)


def autocast(**options):
    return torch.autocast("cpu", dtype=torch.bfloat16, **options)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture
def make_student(make_model):
    """Weights large enough for the teacher, who sees the example, to differ from the student, who does not."""

    def make():
        student = make_model()
        with torch.no_grad():
            for p in student.parameters():
                p.mul_(2.0 if p.ndim == 2 else 1.0)
        return student

    return make


def train_within(region, student, tokenizer, rows, method):
    losses = []
    with region:
        train(student, tokenizer, rows, method, CONFIG, on_step=lambda step, loss: losses.append(loss))
        with torch.no_grad():
            logits = student(torch.tensor([[1, 30, 3]])).logits  # in the caller's region, after the last update
    return losses, logits


def test_each_step_trains_the_weights_of_the_step_before_it(make_student, tokenizer, rows, method):
    results, students = {}, {}
    for name, region in (
        ("cached", autocast()),
        ("uncached", autocast(cache_enabled=False)),
        ("float32", autocast(enabled=False)),
    ):
        students[name] = make_student()
        results[name] = train_within(region, students[name], tokenizer, rows, method)
    assert results["cached"][0] == results["uncached"][0]
    assert torch.equal(results["cached"][1], results["uncached"][1])
    assert torch.equal(weights(students["cached"]), weights(students["uncached"]))
    # Rounding may change which tokens are sampled, so step by step only the first losses compare.
    assert results["cached"][0][0] == pytest.approx(results["float32"][0][0], rel=0.05)
    assert sum(results["cached"][0]) == pytest.approx(sum(results["float32"][0]), rel=0.5)


def sampled(model, tokenizer, rows, method):
    prompts = student_prompts(rows, tokenizer, 16)
    return [r.ids for r in sample_rollouts(model, tokenizer, prompts, max_new_tokens=8, seed=0)]


def evaluated(model, tokenizer, rows, method):
    prompts = student_prompts(rows, tokenizer, 16)
    result = evaluate(
        model, tokenizer, rows, prompts, verifier=method.verifier, style=method.style, max_new_tokens=8, greedy=True
    )
    return result.text, result.answer_entropy.tolist()


@pytest.mark.parametrize("measure", [sampled, evaluated])
def test_what_is_measured_within_one_region_follows_the_weights(make_model, tokenizer, rows, method, measure):
    model, other = make_model(0), make_model(1)
    with autocast():
        expected = measure(other, tokenizer, rows, method)
    with autocast():
        assert measure(model, tokenizer, rows, method) != expected
        with torch.no_grad():
            model(torch.tensor([[1, 30, 3]]))  # a forward of the caller's fills the cache
            for p, q in zip(model.parameters(), other.parameters(), strict=True):
                p.copy_(q)
        assert measure(model, tokenizer, rows, method) == expected


@pytest.mark.parametrize("enabled", [True, False])
def test_the_callers_cache_setting_holds_in_callbacks_and_afterwards(make_model, tokenizer, rows, method, enabled):
    seen = []
    with autocast(cache_enabled=enabled):
        train(
            *(make_model(), tokenizer, rows, method, CONFIG),
            on_step=lambda step, loss: seen.append(torch.is_autocast_cache_enabled()),
        )
        seen.append(torch.is_autocast_cache_enabled())
    assert seen == [enabled] * 6
