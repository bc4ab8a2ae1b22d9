"""The ids a sparse teacher lists, in order: what the tail's kernel walks along, and what tells a bad list.

Imports without Triton.
"""

from __future__ import annotations

import torch


def sort_ids(ids: torch.Tensor, n_cols: int) -> torch.Tensor:
    """Ids [N, k] as int32, ascending in each row; those below -1 come as -2, those from `n_cols` on as `n_cols`."""
    return ids.clamp(-2, n_cols).to(torch.int32).sort(-1).values


def repeated_ids(sorted_ids: torch.Tensor) -> torch.Tensor:
    """[N, k - 1] bool: whether an id of `sort_ids` is the same as the one before it. Padding (-1) may repeat."""
    return (sorted_ids[:, 1:] == sorted_ids[:, :-1]) & (sorted_ids[:, 1:] >= 0)
