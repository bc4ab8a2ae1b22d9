from __future__ import annotations

import json

import pytest

from caop_fast.training import TrainConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("arm", "sft"),
        ("direct_kind", "hinge"),
        ("steps", 0),
        ("steps", 1.5),
        ("rollouts_per_prompt", 0),
        ("micro_batch_prompts", 0),
        ("temperature", 0.0),
        ("learning_rate", -1.0),
        ("answer_beta", 1.5),
        ("answer_beta", 0.5),  # differs from confidence_beta = 0, and a token takes one or the other
        ("ema_rate", 1.0),
        ("direct_weight", -1.0),
        ("log_every", 0),
    ],
)
def test_a_bad_value_is_named(field, value):
    with pytest.raises(ValueError, match=field) as error:
        TrainConfig(**{field: value})
    assert repr(value) in str(error.value)


def test_one_beta_for_all_tokens_may_lie_between():
    assert TrainConfig(answer_beta=0.5, confidence_beta=0.5).answer_beta == 0.5


def test_round_trip_through_json():
    config = TrainConfig(arm="direct", adam_betas=(0.8, 0.9), seed=3)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_option_is_refused():
    with pytest.raises(ValueError, match=r"unknown training options \['lr'\]"):
        TrainConfig.from_dict({"lr": 1.0})
