"""The published recipe of each task: how its base model is made and how its arms are trained."""

from __future__ import annotations

from typing import NamedTuple

from ..training import TrainConfig
from .base import BaseConfig


class Recipe(NamedTuple):
    """Pretraining of the base model, and what all trained arms share."""

    base: BaseConfig
    train: TrainConfig


RECIPES = {
    "pronounce": Recipe(BaseConfig(), TrainConfig(steps=100, learning_rate=5e-4)),
    # Carrying digits takes more practice than spelling; the truth is known in closed form, so the arms get more steps.
    "sums": Recipe(
        BaseConfig(steps=450, bare_per_step=160, example_per_step=64), TrainConfig(steps=150, learning_rate=3e-4)
    ),
}
