"""The published recipe of each task: how its base model is pretrained and then distilled."""

from __future__ import annotations

from typing import NamedTuple

from caop_fast.demo.base import BaseConfig
from caop_fast.training import TrainConfig


class Recipe(NamedTuple):
    """Pretraining of the base model, and what all trained methods share."""

    base: BaseConfig
    train: TrainConfig


RECIPES = {
    "pronounce": Recipe(BaseConfig(), TrainConfig(steps=100, learning_rate=5e-4)),
    # Carrying digits takes more practice than spelling. Distillation gets more steps, because confidence is compared
    # with the truth here, and a frozen teacher: one that follows the student for that long can forget how to read its
    # note, and CaOP then ends as certain as plain distillation.
    "sums": Recipe(
        BaseConfig(steps=450, bare_per_step=160, example_per_step=64),
        TrainConfig(steps=150, learning_rate=3e-4, ema_rate=0.0),
    ),
}
