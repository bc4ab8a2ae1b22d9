"""Distillation and calibration losses for PyTorch. ``reference.py`` holds the mathematics."""

from __future__ import annotations

from caop_fast.losses.confidence import confidence_loss
from caop_fast.losses.distillation import distillation_loss
from caop_fast.losses.linear import linear_distillation_loss
from caop_fast.losses.outputs import ConfidenceOutput, DistillationOutput

__all__ = [
    "ConfidenceOutput",
    "DistillationOutput",
    "confidence_loss",
    "distillation_loss",
    "linear_distillation_loss",
]
