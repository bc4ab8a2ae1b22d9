"""Padding of token lists: prompts on the left, completions on the right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_left(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """``(ids, mask)``, both int64 [B, longest]; mask is 1 on real tokens."""
    return _pad(sequences, pad_id, device, left=True)


def pad_right(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """``(ids, mask)``, both int64 [B, longest]; mask is 1 on real tokens."""
    return _pad(sequences, pad_id, device, left=False)


def _pad(
    sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device | str, *, left: bool
) -> tuple[Tensor, Tensor]:
    longest = max((len(s) for s in sequences), default=0)
    ids, mask = [], []
    for s in sequences:
        fill = longest - len(s)
        ids.append([pad_id] * fill + list(s) if left else list(s) + [pad_id] * fill)
        mask.append([0] * fill + [1] * len(s) if left else [1] * len(s) + [0] * fill)
    shape = (len(sequences), longest)
    return (
        torch.tensor(ids, dtype=torch.int64, device=device).reshape(shape),
        torch.tensor(mask, dtype=torch.int64, device=device).reshape(shape),
    )
