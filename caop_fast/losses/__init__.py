"""Distillation and calibration losses for PyTorch. ``reference/`` holds the mathematics."""

from __future__ import annotations

from caop_fast.losses.confidence import confidence_loss
from caop_fast.losses.distillation import distillation_loss
from caop_fast.losses.linear import linear_distillation_loss
from caop_fast.losses.outputs import ConfidenceOutput, DistillationOutput, RowStatistics, TokenStatistics
from caop_fast.losses.states import finish_state, merge_states, row_state
from caop_fast.losses.tokens import token_statistics

__all__ = [
    "ConfidenceOutput",
    "DistillationOutput",
    "RowStatistics",
    "TokenStatistics",
    "confidence_loss",
    "distillation_loss",
    "finish_state",
    "linear_distillation_loss",
    "merge_states",
    "row_state",
    "token_statistics",
]
