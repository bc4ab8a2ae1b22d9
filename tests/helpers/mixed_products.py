"""GEMMs of bfloat16 or float16 operands that sum in float32, which CUDA has and a CPU lacks: played by wider ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from caop_fast.losses.linear import chunking, lm_head
from caop_fast.losses.linear.lm_head import LMHead

NARROW = (torch.bfloat16, torch.float16)


def play(monkeypatch: pytest.MonkeyPatch, *, addmm: bool = True, rounds: bool = True) -> list[tuple[str, torch.dtype]]:
    """Have a CPU take for one with such GEMMs; (product, dtype of its operands) of each that is asked for.

    Apart from what they return the products allocate nothing, once they have been called with tensors of the same
    sizes.

    Args:
        addmm: whether ``addmm`` is among them.
        rounds: whether a GEMM may write bfloat16.
    """
    plain = {"mm": torch.mm, "addmm": torch.addmm}
    seen: list[tuple[str, torch.dtype]] = []
    scratch = [torch.empty(0)] * 3

    def wide(tensor: Tensor, slot: int) -> Tensor:
        if scratch[slot].numel() < tensor.numel():
            scratch[slot] = torch.empty(tensor.numel())
        return scratch[slot][: tensor.numel()].view(tensor.shape).copy_(tensor)

    def mm(first: Tensor, second: Tensor, *, out_dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        assert first.dtype == second.dtype
        if out_dtype is not None:
            seen.append(("mm", first.dtype))
            assert out is None or out.dtype == out_dtype == torch.float32
            return plain["mm"](wide(first, 0), wide(second, 1), out=out)
        if out is not None and out.dtype in NARROW:  # a CPU rounds the sums on the way
            seen.append(("rounded mm", first.dtype))
            return out.copy_(plain["mm"](wide(first, 0), wide(second, 1), out=wide(out, 2)))
        return plain["mm"](first, second, out=out)

    def add(total: Tensor, first: Tensor, second: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        assert total is out
        assert first.dtype == second.dtype
        assert total.dtype == out_dtype == torch.float32
        seen.append(("addmm", first.dtype))
        return plain["addmm"](total, wide(first, 0), wide(second, 1), out=out)

    def keeps(device: torch.device, operand: torch.dtype, result: torch.dtype) -> bool:
        return operand in NARROW and result == torch.float32

    def kept(head: LMHead) -> torch.dtype:
        return torch.bfloat16 if head.weight.dtype == head.operand_dtype == torch.bfloat16 else head.accumulator_dtype

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", add)
    monkeypatch.setattr(lm_head, "_has_addmm", lambda *_: addmm)
    monkeypatch.setattr(lm_head, "sums_in_float32", lambda *_: rounds)
    monkeypatch.setattr(lm_head, "keeps_accumulator", keeps)
    monkeypatch.setattr(LMHead, "kept_dtype", property(kept))
    return seen


def several_products(monkeypatch: pytest.MonkeyPatch, *, logits: int, gradient_bytes: int | None) -> None:
    """Hold the logits of ``logits`` tokens at a time, and their gradient of all tokens or of ``gradient_bytes``."""
    sizes = {"CPU_CHUNK_BYTES": 0, "MIN_TOKENS": logits}
    if gradient_bytes is not None:
        sizes |= {"DEVICE_GRADIENT_BYTES": 0, "DEVICE_SUMMED_GRADIENT_BYTES": gradient_bytes}
    for name, value in sizes.items():
        monkeypatch.setattr(chunking, name, value)
