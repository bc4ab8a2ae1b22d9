"""Rows in blocks that stay in cache.

On the CPU a block is small enough for its half dozen arrays to stay in the cache while a dozen passes go over them,
which is where the speed comes from; elsewhere it is large enough to fill the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import overload

import torch
from torch import Tensor

CPU_BLOCK_ELEMENTS = 1 << 19  # 2 MB of float32: measured best between 2**18 and 2**19, twice as slow from 2**21 on
# PyTorch splits the sum of a single row this long over threads, but keeps the rows of a larger block whole: with blocks
# of several rows, the bits of the last row would depend on how many come before it.
SPLIT_ELEMENTS = 1 << 15
DEVICE_BLOCK_ELEMENTS = 1 << 25  # 128 MB of float32


def row_blocks(n_rows: int, vocab: int, device: torch.device, index: Tensor | None) -> Iterator[slice | Tensor]:
    """The rows of each block: slices of range(n_rows), or pieces of ``index``. At least one block, maybe empty."""
    elements = CPU_BLOCK_ELEMENTS if device.type == "cpu" else DEVICE_BLOCK_ELEMENTS
    height = max(1, elements // vocab)
    if device.type == "cpu" and vocab >= SPLIT_ELEMENTS:
        height = 1
    count = n_rows if index is None else index.numel()
    for start in range(0, max(count, 1), height):
        rows = slice(start, min(start + height, count))
        yield rows if index is None else index[rows]


@overload
def take(values: Tensor, rows: slice | Tensor) -> Tensor: ...
@overload
def take(values: None, rows: slice | Tensor) -> None: ...
def take(values: Tensor | None, rows: slice | Tensor) -> Tensor | None:
    """The entries of some rows; None stays as it is."""
    return None if values is None else values[rows]
