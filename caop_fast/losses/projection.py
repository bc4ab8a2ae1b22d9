"""GEMMs of the linear loss: logits of a chunk of tokens, and the two products of its gradient.

Logits come out of the GEMM in float32 by default: near a divergence of 0.02, rounding them to bfloat16 costs 23 % of
the gradient. CUDA has GEMMs that keep their float32 accumulator (``torch.mm(..., out_dtype=torch.float32)``); elsewhere
a bfloat16 or float16 head is widened block by block, so that no float32 copy of it ever exists as a whole. The same
goes for a head narrower than the hidden states it meets.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

WIDEN_BYTES = 1 << 24  # float32 bytes of one widened block of the head

# Bytes of logits (both sides) per chunk of tokens. Each chunk reads and writes all of d_weight once, so chunks are
# larger where d_weight is wanted.
CPU_CHUNK_BYTES = 192 << 20
DEVICE_CHUNK_BYTES = 1280 << 20
DEVICE_CHUNK_BYTES_WITH_WEIGHT_GRADIENT = 2560 << 20


class Head(NamedTuple):
    """One side's output projection: logits = scale * (h W^T + bias)."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    scale: float
    operand: torch.dtype  # what the GEMM multiplies
    result: torch.dtype  # what it returns


def make_head(
    weight: Tensor, bias: Tensor | None, scale: float, vocab: int, operand: torch.dtype, result: torch.dtype
) -> Head:
    """The head over the first ``vocab`` ids, detached, in the dtype its GEMMs take unless it is widened in blocks."""
    weight = weight.detach()[:vocab]
    if not widens(weight.device, operand, result) and weight.dtype.itemsize >= operand.itemsize:
        weight = weight.to(operand)
    return Head(weight, None if bias is None else bias.detach()[:vocab].to(result), scale, operand, result)


def widens(device: torch.device, operand: torch.dtype, result: torch.dtype) -> bool:
    """Whether operands must be widened to ``result`` before the GEMM."""
    return operand != result and not keeps_accumulator(device, operand, result)


def keeps_accumulator(device: torch.device, operand: torch.dtype, result: torch.dtype) -> bool:
    """Whether the device has a GEMM from ``operand`` straight to the wider ``result``."""
    return device.type == "cuda" and result == torch.float32 and operand in (torch.bfloat16, torch.float16)


def head_blocks(head: Head) -> Iterator[tuple[slice, Tensor]]:
    """The head as its GEMMs take it: whole, or widened in blocks of rows."""
    weight = head.weight
    vocab, hidden = weight.shape
    if weight.dtype == head.operand and not widens(weight.device, head.operand, head.result):
        yield slice(0, vocab), weight
        return
    height = max(1, WIDEN_BYTES // (4 * max(hidden, 1)))
    for start in range(0, vocab, height):
        rows = slice(start, min(start + height, vocab))
        yield rows, weight[rows].to(head.operand).to(head.result)  # the operand's rounding is part of the result


def logits(hidden: Tensor, head: Head) -> Tensor:
    """scale * (hidden W^T + bias), [C, V] in ``head.result``."""
    hidden = hidden.to(head.operand)
    if keeps_accumulator(hidden.device, head.operand, head.result):
        out = torch.mm(hidden, head.weight.t(), out_dtype=head.result)
    else:
        hidden = hidden.to(head.result)
        out = hidden.new_empty(hidden.shape[0], head.weight.shape[0])
        for rows, weight in head_blocks(head):
            torch.mm(hidden, weight.t(), out=out[:, rows])
    if head.bias is not None:
        out.add_(head.bias)
    return out if head.scale == 1 else out.mul_(head.scale)


def hidden_gradient(d_logits: Tensor, head: Head) -> Tensor:
    """d_logits W, [C, H]: the gradient of the hidden states when ``d_logits`` [C, V] is that of hidden W^T."""
    if keeps_accumulator(d_logits.device, head.operand, head.result):
        return torch.mm(d_logits.to(head.operand), head.weight, out_dtype=head.result)
    d_logits = d_logits.to(head.result)
    out = None
    for rows, weight in head_blocks(head):
        part = d_logits[:, rows]
        out = torch.mm(part, weight) if out is None else out.addmm_(part, weight)
    return out


def add_weight_gradient(total: Tensor | None, d_logits: Tensor, hidden: Tensor, head: Head) -> Tensor:
    """``total`` + d_logits^T hidden, [V, H], accumulated in float32 (float64). Overwrites ``total``."""
    hidden = hidden.to(head.operand)
    accumulator = torch.float64 if head.result == torch.float64 else torch.float32
    if keeps_accumulator(hidden.device, head.operand, accumulator):
        transposed = d_logits.to(head.operand).t()
        if total is None:
            return torch.mm(transposed, hidden, out_dtype=accumulator)
        return total.add_(torch.mm(transposed, hidden, out_dtype=accumulator))
    transposed, hidden = d_logits.to(accumulator).t(), hidden.to(accumulator)
    return torch.mm(transposed, hidden) if total is None else total.addmm_(transposed, hidden)


def projection_dtypes(hidden: Tensor, weight: Tensor, result: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of a projection's operands and of its result."""
    operand = torch.promote_types(hidden.dtype, weight.dtype)
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and operand != torch.float64:
        operand = torch.get_autocast_dtype(kind)
    return (operand, result) if operand.itemsize <= result.itemsize and result.itemsize > 2 else (result, result)


def chunk_rows(chunk_size: Any, vocab: int, result: torch.dtype, device: torch.device, *, weight_gradient: bool) -> int:
    """Tokens per chunk: as asked, or what the logits of both sides leave room for."""
    if chunk_size is not None:
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
            raise TypeError(f"chunk_size must be an integer or None, got {type(chunk_size).__name__}")
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be >= 1, got {chunk_size}")
        return chunk_size
    if device.type == "cpu":
        budget = CPU_CHUNK_BYTES
    else:
        budget = DEVICE_CHUNK_BYTES_WITH_WEIGHT_GRADIENT if weight_gradient else DEVICE_CHUNK_BYTES
    return max(32, budget // (2 * vocab * result.itemsize))
