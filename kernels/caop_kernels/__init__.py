"""Triton kernels for distillation losses. Imports without Triton and says so when a kernel is asked for.

available(device) -> None | reason       whether the kernels can run on tensors of that device
set_autotune(on)                         time launch configurations instead of taking them from the table

row_statistics                           both KLs, log-probabilities, entropies and lse of each row, from one read
mixture_divergence                       generalised Jensen-Shannon divergence of each row, from a second read
mixture_sums, finish_mixture             the same from parts of the columns
distillation_coefficients                upstream gradients of those statistics -> coefficients per row of
logit_gradient                           the gradient of the student's logits, elementwise

row_state, merge_states, finish_state    the same statistics from shards of the vocabulary

topk_statistics(_gradient)               a student against a sparse teacher
confidence_scores(_gradient)             scores of a distribution over confidence values
bin_sums, soft_calibration(_gradient)    sums for reliability diagrams, the soft-binned calibration error
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from caop_kernels.backend import available, missing_triton
from caop_kernels.constants import STATISTICS

if TYPE_CHECKING:
    from caop_kernels.bins import bin_sums, soft_calibration, soft_calibration_gradient
    from caop_kernels.confidence import confidence_scores
    from caop_kernels.confidence_gradient import confidence_scores_gradient
    from caop_kernels.gradient import distillation_coefficients, logit_gradient
    from caop_kernels.mixture import finish_mixture, mixture_divergence, mixture_sums
    from caop_kernels.row_stats import RowStatistics, row_statistics
    from caop_kernels.topk import topk_statistics
    from caop_kernels.topk_gradient import topk_statistics_gradient
    from caop_kernels.tuning import set_autotune
    from caop_kernels.vocab_parallel import finish_state, merge_states, row_state

__all__ = [
    "STATISTICS",
    "RowStatistics",
    "available",
    "bin_sums",
    "confidence_scores",
    "confidence_scores_gradient",
    "distillation_coefficients",
    "finish_mixture",
    "finish_state",
    "logit_gradient",
    "merge_states",
    "mixture_divergence",
    "mixture_sums",
    "row_state",
    "row_statistics",
    "set_autotune",
    "soft_calibration",
    "soft_calibration_gradient",
    "topk_statistics",
    "topk_statistics_gradient",
]

# The module of each name that needs Triton.
_HOME = {
    "RowStatistics": "row_stats",
    "bin_sums": "bins",
    "confidence_scores": "confidence",
    "confidence_scores_gradient": "confidence_gradient",
    "distillation_coefficients": "gradient",
    "finish_mixture": "mixture",
    "finish_state": "vocab_parallel",
    "logit_gradient": "gradient",
    "merge_states": "vocab_parallel",
    "mixture_divergence": "mixture",
    "mixture_sums": "mixture",
    "row_state": "vocab_parallel",
    "row_statistics": "row_stats",
    "set_autotune": "tuning",
    "soft_calibration": "bins",
    "soft_calibration_gradient": "bins",
    "topk_statistics": "topk",
    "topk_statistics_gradient": "topk_gradient",
}


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    reason = missing_triton()
    if reason is not None:
        raise ImportError(f"caop_kernels.{name} needs Triton. {reason}")
    return getattr(importlib.import_module(f"caop_kernels.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
