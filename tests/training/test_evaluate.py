from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from caop_fast.calibration import parse_confidence
from caop_fast.caop import OneOf
from caop_fast.training import evaluate, student_prompts
from caop_fast.training.evaluate import read_confidence
from caop_fast.training.rollouts import Rollout


def test_readings_against_each_sequence_alone(model, tokenizer, method, ids):
    prompts = [ids("<bos> a <answer>"), ids("<bos> b c <answer>")]
    texts = ["X Y Confidence: 0.90 <eos>", "Z <eos>", "Confidence: 0.10 <eos>", "X Confidence: 0.30 Y"]
    rollouts = [Rollout(i % 2, ids(t), True, t) for i, t in enumerate(texts)]
    temperature = 0.7
    values = torch.tensor(method.style.values, dtype=torch.float64)
    candidates = [tokenizer.convert_tokens_to_ids(method.style.number(v)) for v in method.style.values]
    for batch_size in (1, 3, 100):
        got = read_confidence(
            model, tokenizer, prompts, rollouts, style=method.style, temperature=temperature, batch_size=batch_size
        )
        for i, (rollout, text) in enumerate(zip(rollouts, texts, strict=True)):
            prompt = prompts[rollout.prompt_index]
            logits = model(torch.tensor([prompt + rollout.ids])).logits[0, len(prompt) - 1 : -1].double() / temperature
            entropy = torch.distributions.Categorical(logits=logits).entropy()
            words = text.split()
            at = words.index("Confidence:") + 1 if "Confidence:" in words else None
            assert got["answer_entropy"][i] == pytest.approx(entropy[:at].mean().item(), abs=1e-5)
            if at is None:
                assert math.isnan(got["expected"][i])
                assert math.isnan(got["confidence_entropy"][i])
                continue
            q = torch.softmax(logits[at, candidates], 0)
            assert got["expected"][i] == pytest.approx((q @ values).item(), abs=1e-5)
            assert got["confidence_entropy"][i] == pytest.approx(entropy[at].item(), abs=1e-5)


def test_an_evaluation_is_in_prompt_order_and_keeps_what_was_said(model, tokenizer, method, rows):
    prompts = student_prompts(rows, tokenizer, 16)
    seen = []

    def verifier(response, row):
        seen.append((row["id"], response))
        return OneOf("answer")(response, row)

    result = evaluate(
        model, tokenizer, rows, prompts, verifier=verifier, style=method.style, max_new_tokens=6, seed=1, batch_size=3
    )
    assert [i for i, _ in seen] == [r["id"] for r in rows]
    assert [t for _, t in seen] == result.text
    for text, confidence in zip(result.text, result.confidence, strict=True):
        stated = parse_confidence(text).value
        assert math.isnan(confidence) if stated is None else confidence == stated
    summary = result.summary()
    assert summary["n"] == len(rows)
    assert summary["n_unparsed"] == int(np.isnan(result.confidence).sum())


def test_greedy_is_repeatable_and_sampling_depends_on_the_seed(model, tokenizer, method, rows):
    prompts = student_prompts(rows, tokenizer, 16)

    def texts(**kw):
        return evaluate(
            model, tokenizer, rows, prompts, verifier=method.verifier, style=method.style, max_new_tokens=6, **kw
        ).text

    assert texts(greedy=True, seed=0) == texts(greedy=True, seed=1)
    assert texts(seed=0) == texts(seed=0) != texts(seed=1)
