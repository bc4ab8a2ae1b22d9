"""caop_fast: calibration-aware on-policy distillation.

The losses are exported here and loaded on first use (PEP 562), so ``import caop_fast`` does not import torch and
``caop_fast.calibration`` works where torch is absent.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from caop_fast.losses import (
        CalibrationBins,
        ConfidenceOutput,
        DistillationOutput,
        LinearConfidenceLoss,
        LinearDistillationLoss,
        LinearDistillationRows,
        LinearTokenStatistics,
        LinearTopKDistillationLoss,
        RowStatistics,
        TokenStatistics,
        VocabularyShards,
        calibration_bins,
        confidence_loss,
        confidence_loss_from_logprobs,
        distillation_loss,
        finish_state,
        linear_confidence_loss,
        linear_distillation_loss,
        linear_distillation_rows,
        linear_token_statistics,
        linear_topk_distillation_loss,
        merge_states,
        row_state,
        soft_ece,
        token_statistics,
        topk_distillation_loss,
    )

__version__ = "0.1.0"

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
    "__version__",
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

_LAZY = {name: "caop_fast.losses" for name in __all__ if name != "__version__"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value  # the next access finds it there
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
