"""Distillation and calibration losses for PyTorch.

Each public function is in a file of this folder with its operator, those from hidden states in ``linear/``; they run on
``backends/``, and ``reference/`` is their definition in plain PyTorch.
"""

from __future__ import annotations

from caop_fast.losses.bins import calibration_bins, soft_ece
from caop_fast.losses.confidence import confidence_loss, confidence_loss_from_logprobs
from caop_fast.losses.distillation import distillation_loss
from caop_fast.losses.linear.confidence import linear_confidence_loss
from caop_fast.losses.linear.distillation import linear_distillation_loss
from caop_fast.losses.linear.distillation_rows import linear_distillation_rows
from caop_fast.losses.linear.distributed import VocabularyShards
from caop_fast.losses.linear.modules import (
    LinearConfidenceLoss,
    LinearDistillationLoss,
    LinearDistillationRows,
    LinearTokenStatistics,
    LinearTopKDistillationLoss,
)
from caop_fast.losses.linear.tokens import linear_token_statistics
from caop_fast.losses.linear.topk import linear_topk_distillation_loss
from caop_fast.losses.outputs import (
    CalibrationBins,
    ConfidenceOutput,
    DistillationOutput,
    RowStatistics,
    TokenStatistics,
)
from caop_fast.losses.states import finish_state, merge_states, row_state
from caop_fast.losses.tokens import token_statistics
from caop_fast.losses.topk import topk_distillation_loss

__all__ = [
    "CalibrationBins",
    "ConfidenceOutput",
    "DistillationOutput",
    "LinearConfidenceLoss",
    "LinearDistillationLoss",
    "LinearDistillationRows",
    "LinearTokenStatistics",
    "LinearTopKDistillationLoss",
    "RowStatistics",
    "TokenStatistics",
    "VocabularyShards",
    "calibration_bins",
    "confidence_loss",
    "confidence_loss_from_logprobs",
    "distillation_loss",
    "finish_state",
    "linear_confidence_loss",
    "linear_distillation_loss",
    "linear_distillation_rows",
    "linear_token_statistics",
    "linear_topk_distillation_loss",
    "merge_states",
    "row_state",
    "soft_ece",
    "token_statistics",
    "topk_distillation_loss",
]
