from __future__ import annotations

import numpy as np
import pytest
import torch

from caop_fast.training.rollouts import sample_rollouts, stop_token_ids


@pytest.fixture
def prompts(ids):
    return [ids("<bos> a b <answer>"), ids("<bos> c <answer>"), ids("<bos> d d d <answer>")]


def test_rollouts_come_in_prompt_order_whatever_the_batches(model, tokenizer, prompts):
    for batch_size in (1, 2, 4, 100):
        rollouts = sample_rollouts(
            model, tokenizer, prompts, per_prompt=2, max_new_tokens=5, batch_size=batch_size, seed=1
        )
        assert [r.prompt_index for r in rollouts] == [0, 0, 1, 1, 2, 2]


def test_greedy_equals_the_argmax_of_an_unpadded_forward(model, tokenizer, prompts):
    rollouts = sample_rollouts(model, tokenizer, prompts, max_new_tokens=6, greedy=True)
    for rollout, prompt in zip(rollouts, prompts, strict=True):
        sequence, expected = list(prompt), []
        for _ in range(6):
            token = model(torch.tensor([sequence])).logits[0, -1].argmax().item()
            expected.append(token)
            sequence.append(token)
            if token == tokenizer.eos_token_id:
                break
        assert rollout.ids == expected
        assert rollout.ended == (expected[-1] == tokenizer.eos_token_id)


def test_samples_follow_the_full_softmax_whatever_the_generation_config_says(model, tokenizer, ids):
    own = model.generation_config
    own.top_k, own.top_p, own.temperature, own.do_sample = 1, 0.1, 0.05, True
    own.min_p, own.repetition_penalty, own.suppress_tokens = 0.95, 5.0, list(range(8, 30))
    prompt = ids("<bos> a <answer>")
    n, temperature = 4000, 1.7
    rollouts = sample_rollouts(
        model, tokenizer, [prompt], per_prompt=n, max_new_tokens=1, temperature=temperature, seed=0, batch_size=n
    )
    counts = np.bincount([r.ids[0] for r in rollouts], minlength=len(tokenizer)) / n
    p = torch.softmax(model(torch.tensor([prompt])).logits[0, -1].double() / temperature, 0).detach().numpy()
    assert np.abs(counts - p).max() < 4 * np.sqrt(0.25 / n)
    assert (counts > 0).sum() > 5
    assert model.generation_config is own


def test_greedy_ignores_the_generation_configs_penalties(model, tokenizer, prompts):
    plain = sample_rollouts(model, tokenizer, prompts, max_new_tokens=6, greedy=True)
    model.generation_config.repetition_penalty = 5.0
    assert sample_rollouts(model, tokenizer, prompts, max_new_tokens=6, greedy=True) == plain


def test_a_completion_ends_with_its_end_token_or_is_marked_cut(model, tokenizer, prompts):
    rollouts = sample_rollouts(model, tokenizer, prompts, per_prompt=40, max_new_tokens=4, temperature=5.0, seed=3)
    assert {r.ended for r in rollouts} == {True, False}
    for r in rollouts:
        assert r.ended == (r.ids[-1] == tokenizer.eos_token_id)
        assert tokenizer.eos_token_id not in r.ids[:-1]
        assert r.ended or len(r.ids) == 4
        assert r.text == tokenizer.decode(r.ids, skip_special_tokens=True)


def test_a_seed_repeats_and_leaves_the_callers_random_state_alone(model, tokenizer, prompts):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    draw = [sample_rollouts(model, tokenizer, prompts, per_prompt=8, max_new_tokens=6, seed=s) for s in (7, 7, 8)]
    assert torch.equal(before, torch.get_rng_state())
    assert draw[0] == draw[1] != draw[2]


def test_training_mode_is_restored(model, tokenizer, prompts):
    for mode in (True, False):
        model.train(mode)
        sample_rollouts(model, tokenizer, prompts, max_new_tokens=1, seed=0)
        assert model.training is mode


def test_bad_arguments(model, tokenizer, prompts):
    with pytest.raises(ValueError, match="per_prompt must be at least 1"):
        sample_rollouts(model, tokenizer, prompts, per_prompt=0, max_new_tokens=1)
    with pytest.raises(ValueError, match="1 when greedy"):
        sample_rollouts(model, tokenizer, prompts, per_prompt=2, max_new_tokens=1, greedy=True)
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        sample_rollouts(model, tokenizer, prompts, max_new_tokens=1, temperature=0)


def test_stop_ids_prefer_the_generation_config(model, tokenizer):
    model.generation_config.eos_token_id = [5, 2]
    assert stop_token_ids(model, tokenizer) == {2, 5}
    model.generation_config.eos_token_id = None
    assert stop_token_ids(model, tokenizer) == {tokenizer.eos_token_id}
