"""Triton kernels for distillation losses. Imports without Triton and says so when a kernel is asked for.

available(device) -> None | reason      whether the kernels can run on tensors of that device
row_statistics(...) -> RowStatistics    both KLs, log-probs, entropies and lse of each row, from one read
mixture_divergence(...)                 generalised Jensen-Shannon divergence of each row, from a second read
mixture_sums, finish_mixture            the same from parts of the columns
distillation_coefficients(...)          what flows into those statistics, as coefficients per row of
logit_gradient(...)                     the gradient of the student's logits, elementwise
set_autotune(on)                        time launch configurations instead of taking them from the table
row_state, merge_states, finish_state   the same statistics from shards of the vocabulary
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from caop_kernels.backend import available, missing_triton

if TYPE_CHECKING:
    from caop_kernels.gradient import distillation_coefficients, logit_gradient
    from caop_kernels.mixture import finish_mixture, mixture_divergence, mixture_sums
    from caop_kernels.row_stats import STATISTICS, RowStatistics, row_statistics
    from caop_kernels.tuning import set_autotune
    from caop_kernels.vocab_parallel import finish_state, merge_states, row_state

__all__ = [
    "STATISTICS",
    "RowStatistics",
    "available",
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
]

_HOME = {
    "STATISTICS": "caop_kernels.row_stats",
    "RowStatistics": "caop_kernels.row_stats",
    "distillation_coefficients": "caop_kernels.gradient",
    "finish_mixture": "caop_kernels.mixture",
    "finish_state": "caop_kernels.vocab_parallel",
    "logit_gradient": "caop_kernels.gradient",
    "mixture_divergence": "caop_kernels.mixture",
    "mixture_sums": "caop_kernels.mixture",
    "merge_states": "caop_kernels.vocab_parallel",
    "row_state": "caop_kernels.vocab_parallel",
    "row_statistics": "caop_kernels.row_stats",
    "set_autotune": "caop_kernels.tuning",
}


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    reason = missing_triton()
    if reason is not None:
        raise ImportError(f"caop_kernels.{name} needs Triton. {reason}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
