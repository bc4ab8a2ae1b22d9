"""Answers to audit, from arrays."""

from __future__ import annotations

from numpy.typing import ArrayLike

from caop_fast.calibration.answers import ModelAnswers
from caop_fast.calibration.counts import Answers


def answered(name: str, correct: ArrayLike, confidence: ArrayLike, groups=None, **details) -> ModelAnswers:
    """The answers of a model called `name`."""
    return ModelAnswers(name, Answers(correct, confidence), groups, **details)
