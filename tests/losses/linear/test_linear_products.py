"""Products from narrow operands to float32 are used only where they are right on the layouts that the losses use."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from caop_fast.losses.linear import lm_head

CPU = torch.device("cpu")
MM, ADDMM = torch.mm, torch.addmm


def widened(first: Tensor, second: Tensor) -> Tensor:
    return MM(first.float(), second.float())


def packed(matrix: Tensor) -> Tensor:
    """Its memory as if rows followed one another without gaps."""
    return matrix.as_strided(matrix.shape, (matrix.shape[1], 1))


def row_major(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else packed(matrix)


MM_FAULTS = {
    "adds to what was there": lambda a, b, out: out.add_(widened(a, b)),
    "rounds its result": lambda a, b, out: out.copy_(widened(a, b).to(a.dtype)),
    "sums blocks in the operands' dtype": lambda a, b, out: out.copy_(
        sum(widened(a[:, k : k + 64], b[k : k + 64]).to(a.dtype) for k in range(0, 256, 64))
    ),
    "ignores the padding of its result": lambda a, b, out: packed(out).copy_(widened(a, b)),
    "ignores the padding of its first operand": lambda a, b, out: out.copy_(widened(packed(a), b)),
    "ignores that its first operand is transposed": lambda a, b, out: out.copy_(widened(row_major(a), b)),
    "ignores that its second operand is transposed": lambda a, b, out: out.copy_(widened(a, row_major(b))),
    "writes nothing": lambda a, b, out: out,
    "fills whole rows": lambda a, b, out: (
        out.as_strided((out.shape[0], out.stride(0)), (out.stride(0), 1))
        .zero_()[:, : out.shape[1]]
        .copy_(widened(a, b))
    ),
}
ADDMM_FAULTS = {
    "overwrites the addend first": lambda c, a, b, out: ADDMM(c, a.float(), b.float(), out=out.zero_()),
    "forgets the addend": lambda c, a, b, out: out.copy_(widened(a, b)),
    "adds it twice": lambda c, a, b, out: out.copy_(widened(a, b) + 2 * c),
    "rounds the addend": lambda c, a, b, out: out.copy_(widened(a, b) + c.to(a.dtype)),
    "rounds the product": lambda c, a, b, out: out.copy_(widened(a, b).to(a.dtype) + c),
    "ignores the padding": lambda c, a, b, out: packed(out).copy_(widened(a, b) + c),
}


def has(product: str, operand: torch.dtype) -> bool:
    return getattr(lm_head, f"_has_{product}").__wrapped__(CPU, operand)


@pytest.mark.parametrize("operand", [torch.bfloat16, torch.float16])
def test_a_right_product_is_used(operand, monkeypatch):
    monkeypatch.setattr(torch, "mm", lambda a, b, *, out_dtype, out: out.copy_(widened(a, b)))
    monkeypatch.setattr(torch, "addmm", lambda c, a, b, *, out_dtype, out: ADDMM(c, a.float(), b.float(), out=out))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert has("mm", operand)
        assert has("addmm", operand)


@pytest.mark.parametrize("operand", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("product", "fault"), [("mm", name) for name in MM_FAULTS] + [("addmm", name) for name in ADDMM_FAULTS]
)
def test_a_wrong_product_is_not(product, fault, operand, monkeypatch):
    run = {"mm": MM_FAULTS, "addmm": ADDMM_FAULTS}[product][fault]
    monkeypatch.setattr(torch, product, lambda *operands, out_dtype, out: run(*operands, out))
    with pytest.warns(RuntimeWarning, match=rf"torch\.{product} from {operand} to float32 is wrong on cpu"):
        assert not has(product, operand)


def test_one_that_is_missing_is_no_reason_to_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not has("mm", torch.bfloat16), "a CPU has none; if it does by now, the CPU could use it"


def test_out_of_memory_says_nothing(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "mm", full)
    with pytest.raises(torch.OutOfMemoryError):
        has("mm", torch.bfloat16)
