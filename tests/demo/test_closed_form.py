from __future__ import annotations

import numpy as np
import pytest

from caop_fast.demo.base import BaseConfig, pretrain
from caop_fast.demo.closed_form import success_probabilities
from caop_fast.demo.tasks import load_task
from caop_fast.training import sample_rollouts, student_prompts


@pytest.fixture(scope="module")
def case():
    task = load_task("sums")
    tokenizer = task.tokenizer()
    config = BaseConfig(hidden_size=64, num_layers=1, steps=120, bare_per_step=64, example_per_step=4, warmup_steps=5)

    class OneDigit(type(task)):
        def rows(self, split):
            return [r for r in super().rows(split) if len(r["prompt"].split()) == 3][:80]

    easy = OneDigit()
    return easy, tokenizer, pretrain(easy, tokenizer, config)


def test_it_is_the_mean_that_sampling_approaches(case):
    """Half of the claim at a time: sampled answers marked by the posterior must agree within sampling noise."""
    task, tokenizer, model = case
    rows = task.rows("heldout")[:6]
    prompts = student_prompts(rows, tokenizer, task.max_prompt_tokens)
    exact = success_probabilities(model, tokenizer, task, rows, prompts)
    n = 3000
    rollouts = sample_rollouts(model, tokenizer, prompts, per_prompt=n, max_new_tokens=task.max_new_tokens, seed=0)
    marks = np.zeros(len(rows))
    for r in rollouts:
        words = r.text.split()
        if "Confidence:" in words:  # writing the label is what ends an answer
            answer = " ".join(words[: words.index("Confidence:")])
            marks[r.prompt_index] += task.posterior(rows[r.prompt_index]).get(answer, 0.0) / n
    assert np.abs(exact - marks).max() < 4 * 0.5 / np.sqrt(n)
    assert exact.max() > 0.03  # the model has learnt enough for the comparison to mean something


def test_chunks_do_not_matter(case, monkeypatch):
    task, tokenizer, model = case
    rows = task.rows("train")[:20]
    prompts = student_prompts(rows, tokenizer, task.max_prompt_tokens)
    whole = success_probabilities(model, tokenizer, task, rows, prompts)
    monkeypatch.setattr("caop_fast.demo.closed_form.PROMPTS_AT_ONCE", 7)
    assert np.allclose(success_probabilities(model, tokenizer, task, rows, prompts), whole, atol=1e-7)
