"""Triton kernels for distillation losses. Imports without Triton and says so when a kernel is asked for.

available(device) -> None | reason      whether the kernels can run on tensors of that device
row_statistics(...) -> RowStatistics    both KLs, log-probs, entropies and lse of each row, from one read
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from caop_kernels.backend import available, missing_triton

if TYPE_CHECKING:
    from caop_kernels.row_stats import STATISTICS, RowStatistics, row_statistics

__all__ = ["STATISTICS", "RowStatistics", "available", "row_statistics"]

_HOME = {
    "STATISTICS": "caop_kernels.row_stats",
    "RowStatistics": "caop_kernels.row_stats",
    "row_statistics": "caop_kernels.row_stats",
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
