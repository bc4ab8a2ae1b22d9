"""A tiny real model, the demo's tokenizer and rows small enough to check by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from caop_fast.caop import OneOf, TeacherContext
from caop_fast.caop.style import ConfidenceStyle
from caop_fast.demo.tokenizer import word_level_tokenizer
from caop_fast.training import Method

WORDS = ("a", "b", "c", "d", "X", "Y", "Z", "secret")


@pytest.fixture(scope="session")
def tokenizer():
    return word_level_tokenizer(WORDS)


@pytest.fixture
def make_model(tokenizer):
    def make(seed: int = 0, **overrides):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = Qwen3Config(
            **{
                **sizes,
                "head_dim": 8,
                "intermediate_size": 48,
                "vocab_size": len(tokenizer),
                "max_position_embeddings": 64,
                **overrides,
            },
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        model = Qwen3ForCausalLM(config)
        with torch.no_grad():  # larger weights than the initial ones: distributions that are far from uniform
            for p in model.parameters():
                p.mul_(3.0 if p.ndim == 2 else 1.0)
        return model

    return make


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture(scope="session")
def method():
    context = TeacherContext("{prompt} <example> {demonstration} {note}", note="<note> {confidence}", max_tokens=24)
    return Method(OneOf("answer"), context, ConfidenceStyle())


@pytest.fixture(scope="session")
def rows():
    prompts = ["a", "b c", "d a b", "c", "b", "d d", "a c", "c b a", "d c", "a a"]
    answers = ["X", "Y X", "Z", "Y", "X Z", "Z Z", "X", "Y", "Z", "X Y"]
    return [
        {"id": f"row{i}", "prompt": p, "answer": [a], "demonstration": a}
        for i, (p, a) in enumerate(zip(prompts, answers, strict=True))
    ]


@pytest.fixture
def ids(tokenizer):
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
