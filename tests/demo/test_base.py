from __future__ import annotations

import dataclasses

import pytest
import torch

from caop_fast.demo.base import IGNORED, BaseConfig, PretrainingData, new_model, pretrain
from caop_fast.demo.tasks import load_task

SMALL = BaseConfig(hidden_size=32, num_layers=1, steps=3, bare_per_step=6, example_per_step=40, warmup_steps=1)


@pytest.fixture(scope="module")
def task():
    return load_task("pronounce")


@pytest.fixture(scope="module")
def tokenizer(task):
    return task.tokenizer()


@pytest.fixture(scope="module")
def rows(task):
    return task.rows("pretrain")[:200]


def decoded_batch(task, tokenizer, rows, config):
    ids, targets, answer_mask, value_at = PretrainingData(task, tokenizer, rows, config).batch()
    for r in range(len(ids)):
        words = tokenizer.convert_ids_to_tokens(ids[r])
        goal = [None if t == IGNORED else tokenizer.convert_ids_to_tokens(int(t)) for t in targets[r]]
        yield words, goal, answer_mask[r], int(value_at[r])


def test_sequences_say_what_they_should(task, tokenizer, rows):
    known = {row["prompt"]: row["demonstration"] for row in rows}
    config = dataclasses.replace(SMALL, corruption=0.3)
    noted = corrupted = 0
    for i, (words, goal, answer_mask, value_at) in enumerate(decoded_batch(task, tokenizer, rows, config)):
        start = words.index("<answer>")
        prompt = " ".join(words[1:start]).partition(" <example>")[0]
        demonstration = known[prompt].split()
        n = len(demonstration)
        # what it must predict: the answer, the label, a value, the end; nothing of the prompt
        assert goal[:start] == [None] * start
        assert goal[start : start + n + 1] == [*demonstration, "Confidence:"]
        assert value_at == start + n + 1
        assert goal[value_at + 1] == "<eos>"
        assert [bool(x) for x in answer_mask] == [start <= j < value_at for j in range(len(words))]
        shown = words[start + 1 : start + 1 + n]
        if i < config.bare_per_step:
            assert "<example>" not in words
            assert shown == demonstration
            assert goal[value_at] is None
            continue
        example = words[words.index("<example>") + 1 :][:n]
        assert example == demonstration
        corrupted += shown != demonstration
        if "<note>" in words:
            noted += 1
            assert goal[value_at] == words[words.index("<note>") + 1]
        else:
            assert goal[value_at] is None
    assert 5 < noted < 35
    assert corrupted > 15


def first_words(task, n):
    """`task` with only `n` words to pretrain on."""

    class Few(type(task)):
        def rows(self, split):
            return super().rows(split)[:n]

    return Few()


def test_pretraining_repeats_from_its_seed_only(task, tokenizer):
    few, others = first_words(task, 100), iter([11, 12, 13])

    def run(seed):
        torch.manual_seed(next(others))  # the caller's random state must not matter
        losses = []
        model = pretrain(few, tokenizer, dataclasses.replace(SMALL, seed=seed), on_step=lambda s, x: losses.append(x))
        return losses, torch.cat([p.detach().flatten() for p in model.parameters()])

    (a, wa), (b, wb), (c, wc) = run(1), run(1), run(2)
    assert a == b != c
    assert torch.equal(wa, wb)
    assert not torch.equal(wa, wc)


def test_the_confidence_it_learns_is_its_own_probability_of_the_answer(task, tokenizer):
    """After some steps on one word known with certainty the stated value must go to the top of the grid."""
    one = dataclasses.replace(SMALL, steps=200, bare_per_step=16, example_per_step=1, adamw_lr=1e-2)

    single = first_words(task, 1)
    model = pretrain(single, tokenizer, one)
    row = single.rows("pretrain")[0]
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    ids = ids + tokenizer(row["demonstration"] + " Confidence:", add_special_tokens=False)["input_ids"]
    value = model(torch.tensor([ids])).logits[0, -1].argmax().item()
    assert tokenizer.convert_ids_to_tokens(value) in ("0.95", "1.00")


def test_the_model_is_a_real_qwen3_of_about_half_a_million_parameters(task, tokenizer):
    model = new_model(task, tokenizer, BaseConfig())
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert 4e5 < sum(p.numel() for p in model.parameters()) < 6e5
    assert model.config.vocab_size == len(tokenizer)
