"""The loop with a byte-level BPE tokenizer, as real chat models have: values of several tokens, text free of form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from caop_fast.caop import ConfidenceStyle, OneOf, TeacherContext
from caop_fast.training import Method, TrainConfig, evaluate, student_prompts, train
from caop_fast.training.plan import plan_tokens
from caop_fast.training.rollouts import Rollout

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def subword():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    text = ["The answer is four. Confidence: 0.85", "two and two\nConfidence: 0.10", "What is two and two?"] * 20
    backend.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>", padding_side="left", chat_template=CHAT
    )


@pytest.fixture
def student(make_model, subword):
    return make_model(vocab_size=len(subword), max_position_embeddings=512)


ROWS = [
    {"id": f"r{i}", "prompt": f"What is two and {w}?", "answer": ["four"], "demonstration": "four"}
    for i, w in enumerate(["two", "one", "four"])
]
METHOD = Method(OneOf("answer"), TeacherContext(max_tokens=400), ConfidenceStyle())


def config(arm):
    return TrainConfig(
        arm=arm, steps=2, prompts_per_step=2, rollouts_per_prompt=2, max_new_tokens=12, max_teacher_prompt_tokens=400
    )


@pytest.mark.parametrize("arm", ["opd", "caop", "masked"])
def test_the_arms_train_on_values_of_several_tokens(student, subword, arm):
    # Any of many tokens ends a completion, or a model with random weights would hardly finish one.
    student.generation_config.eos_token_id = [subword.eos_token_id, *range(100, 250)]
    before = torch.cat([p.detach().flatten().clone() for p in student.parameters()])
    result = train(student, subword, ROWS, METHOD, config(arm))
    after = torch.cat([p.detach().flatten() for p in student.parameters()])
    assert result.history[-1]["expected_ece"] is None
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)


def test_the_direct_loss_says_that_it_needs_single_tokens(student, subword):
    with pytest.raises(ValueError, match="single token"):
        train(student, subword, ROWS, METHOD, config("direct"))


def test_only_the_ids_of_the_number_change_and_all_of_them_are_marked(subword):
    text = "The answer is four.\nConfidence: 0.85\nBye"
    ids = [*subword.encode(text, add_special_tokens=False), subword.eos_token_id]
    rollout = Rollout(0, ids, True, text)
    stops = [subword.eos_token_id]
    (plan,) = plan_tokens([rollout], [0.4], subword, arm="caop", style=METHOD.style, stop_ids=stops)
    assert subword.decode(plan.ids, skip_special_tokens=True) == text.replace("0.85", "0.40")
    assert sum(plan.value_mask) > 1
    first, behind = plan.value_mask.index(True), plan.value_mask[::-1].index(True)
    assert plan.ids[:first] == ids[:first]
    assert plan.ids[-behind:] == ids[-behind:]
    assert all(plan.value_mask[first:-behind])
    (masked,) = plan_tokens([rollout], [0.4], subword, arm="masked", style=METHOD.style, stop_ids=stops)
    assert masked.weights == [0.0 if v else 1.0 for v in masked.value_mask]


def test_evaluation_reads_what_it_can(student, subword):
    student.generation_config.eos_token_id = subword.eos_token_id
    prompts = student_prompts(ROWS, subword, 100)
    result = evaluate(student, subword, ROWS, prompts, verifier=METHOD.verifier, style=METHOD.style, max_new_tokens=8)
    assert np.isnan(result.expected).all()
    assert result.summary()["expected"]["ece"] is None
    assert not np.isnan(result.answer_entropy).any()
