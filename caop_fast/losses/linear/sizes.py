"""How many tokens, or how many ids, the linear losses take at a time: chosen by the bytes of their logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Bytes of logits of all sides per chunk of tokens. Each chunk reads and writes all of grad_weight once, so chunks are
# larger where grad_weight is wanted.
CPU_CHUNK_BYTES = 240 << 20
DEVICE_CHUNK_BYTES = 1280 << 20
DEVICE_CHUNK_BYTES_WITH_WEIGHT_GRADIENT = 2560 << 20
# Bytes of logits per block of ids, all tokens at a time; the second for memory="min".
CPU_BLOCK_BYTES = 192 << 20
DEVICE_BLOCK_BYTES = 1280 << 20
SMALL_BLOCK_BYTES = 192 << 20

MIN_TOKENS, MIN_IDS = 32, 256
TOKEN_MULTIPLE, ID_MULTIPLE = 64, 128  # GEMM tiles; only where that many fit


def chunk_tokens(width: int, sides: int, result: torch.dtype, device: torch.device, *, weight_gradient: bool) -> int:
    """Most tokens per chunk, each with ``width`` logits of ``sides`` models."""
    if device.type == "cpu":
        budget = CPU_CHUNK_BYTES
    else:
        budget = DEVICE_CHUNK_BYTES_WITH_WEIGHT_GRADIENT if weight_gradient else DEVICE_CHUNK_BYTES
    return _fitting(budget // (sides * max(width, 1) * result.itemsize), MIN_TOKENS, TOKEN_MULTIPLE)


def block_ids(n_rows: int, sides: int, result: torch.dtype, device: torch.device, *, small: bool) -> int:
    """Most ids per block, each with the logits of ``n_rows`` tokens and ``sides`` models."""
    budget = CPU_BLOCK_BYTES if device.type == "cpu" else DEVICE_BLOCK_BYTES
    budget = min(budget, SMALL_BLOCK_BYTES) if small else budget
    return _fitting(budget // (sides * max(n_rows, 1) * result.itemsize), MIN_IDS, ID_MULTIPLE)


def _fitting(count: int, least: int, multiple: int) -> int:
    count = max(least, count)
    return count // multiple * multiple if count >= multiple else count


def pieces(total: int, most: int, multiple: int = 1) -> Iterator[slice]:
    """Slices of range(total) of at most ``most`` each, of nearly equal length; none of nothing.

    Lengths are rounded up to a multiple where ``most`` allows that.
    """
    if total == 0:
        return
    length = -(-total // -(-total // most))
    length = min(most, -(-length // multiple) * multiple)
    for start in range(0, total, length):
        yield slice(start, min(start + length, total))
