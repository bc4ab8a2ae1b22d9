"""Output heads and their products: logits of some tokens and some ids, and the two products of their gradient.

Logits come out of the GEMM in float32 by default: near a divergence of 0.02, rounding them to bfloat16 costs 23 % of
the gradient. CUDA has GEMMs that keep their float32 accumulator (``torch.mm(..., out_dtype=torch.float32)``); elsewhere
a bfloat16 or float16 head is widened block by block, so that no float32 copy of it ever exists as a whole. The same
goes for a head narrower than the hidden states it meets.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from caop_fast.losses.linear.sizes import ID_MULTIPLE, pieces

WIDEN_BYTES = 1 << 24  # float32 bytes of one widened block of the head
ADDED_BYTES = 1 << 27  # float32 bytes of one product that is added to a sum in a pass of its own
ROW_MULTIPLE = 16  # elements: rows of logits start where the kernels can load, and cuBLAS write, 16 bytes at a time


class Head(NamedTuple):
    """One side's output projection: logits = scale * (h W^T + bias)."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    scale: float
    operand: torch.dtype  # what the GEMM multiplies
    result: torch.dtype  # what it returns

    def columns(self, ids: slice) -> Head:
        """The head of some ids."""
        return self._replace(weight=self.weight[ids], bias=None if self.bias is None else self.bias[ids])


def make_head(
    weight: Tensor, bias: Tensor | None, scale: float, vocab: int, operand: torch.dtype, result: torch.dtype
) -> Head:
    """The head over the first ``vocab`` ids, detached; its weight is still as it is stored."""
    return Head(
        weight.detach()[:vocab], None if bias is None else bias.detach()[:vocab].to(result), scale, operand, result
    )


def ready(student: Head, teacher: Head | None, *, shared: bool) -> tuple[Head, Head | None]:
    """Heads with their weights in the dtype their GEMMs take, but for those that are widened in blocks.

    ``shared``: the teacher's weight is the student's, and is converted once for both.
    """
    student = student._replace(weight=_as_operand(student))
    if teacher is not None:
        teacher = teacher._replace(weight=student.weight if shared else _as_operand(teacher))
    return student, teacher


def _as_operand(head: Head) -> Tensor:
    weight = head.weight
    whole = not widens(weight.device, head.operand, head.result) and weight.dtype.itemsize >= head.operand.itemsize
    return weight.to(head.operand) if whole else weight


def projection_dtypes(hidden: Tensor, weight: Tensor, result: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of a projection's operands and of its result."""
    operand = torch.promote_types(hidden.dtype, weight.dtype)
    kind = hidden.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and operand != torch.float64:
        operand = torch.get_autocast_dtype(kind)
    return (operand, result) if operand.itemsize <= result.itemsize and result.itemsize > 2 else (result, result)


def widens(device: torch.device, operand: torch.dtype, result: torch.dtype) -> bool:
    """Whether operands must be widened to ``result`` before the GEMM."""
    return operand != result and not keeps_accumulator(device, operand, result)


def keeps_accumulator(device: torch.device, operand: torch.dtype, result: torch.dtype) -> bool:
    """Whether the device has a GEMM from ``operand`` straight to the wider ``result``."""
    narrow = result == torch.float32 and operand in (torch.bfloat16, torch.float16)
    return narrow and device.type != "cpu" and _has_product(device, operand)


@functools.cache
def _has_product(device: torch.device, operand: torch.dtype) -> bool:
    """Whether ``torch.mm`` takes ``out_dtype`` on the device: it does on CUDA, and says so elsewhere."""
    small = torch.zeros(16, 16, device=device, dtype=operand)
    out = torch.empty(16, 16, device=device, dtype=torch.float32)
    try:
        torch.mm(small, small, out_dtype=torch.float32, out=out)
    except torch.OutOfMemoryError:  # says nothing about the product
        raise
    except (RuntimeError, TypeError):
        return False
    return True


@functools.cache
def _adds_product(device: torch.device, operand: torch.dtype) -> bool:
    """Whether ``torch.addmm`` adds such a product to a float32 tensor: PyTorch 2.10 does (pytorch/pytorch#167931)."""
    small = torch.zeros(16, 16, device=device, dtype=operand)
    total = torch.zeros(16, 16, device=device, dtype=torch.float32)
    try:
        torch.addmm(total, small, small, out_dtype=torch.float32, out=total)
    except torch.OutOfMemoryError:  # says nothing about the product
        raise
    except (RuntimeError, TypeError):
        return False
    return True


def products(device: torch.device, operand: torch.dtype) -> dict[str, bool]:
    """Which GEMMs from ``operand`` to float32 the device has; where it has not, a linear loss makes another pass."""
    return {"mm": _has_product(device, operand), "addmm": _adds_product(device, operand)}


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


def same_projection(student: Head, teacher: Head) -> bool:
    """Whether both heads multiply by the same tensor in the same way, so that one GEMM serves both."""
    a, b = student.weight, teacher.weight
    return (
        a.data_ptr() == b.data_ptr()
        and (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        and (student.operand, student.result) == (teacher.operand, teacher.result)
    )


class LogitBuffer:
    """Room for the logits of one block of tokens and ids at a time, both sides, and for a narrower gradient of them.

    Allocated once for all blocks. Rows start on multiples of ROW_MULTIPLE elements whatever the vocabulary.
    """

    def __init__(self, student: Head, teacher: Head | None, rows: int, width: int, *, narrow_gradient: bool) -> None:
        size = rows * padded(width)
        new = student.weight.new_empty
        self._logits = new(size if teacher is None else 2 * size, dtype=student.result)
        narrow = narrow_gradient and keeps_accumulator(student.weight.device, student.operand, student.result)
        self._gradient = new(size, dtype=student.operand) if narrow else None

    def project(
        self,
        student_hidden: Tensor,
        student: Head,
        teacher_hidden: Tensor | None,
        teacher: Head | None,
        both: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [R, V] of both sides.

        ``both`` are the hidden states of both sides one after the other, where one head serves both: it is read once.
        """
        rows, width = student_hidden.shape[0], student.weight.shape[0]
        first = rows_of(self._logits, 0, rows, width)
        if teacher is None:
            return project(student_hidden, student, first), None
        second = rows_of(self._logits, rows, rows, width)
        if both is not None:
            multiply(both, student, rows_of(self._logits, 0, 2 * rows, width))
            return shift_and_scale(first, student), shift_and_scale(second, teacher)
        return project(student_hidden, student, first), project(teacher_hidden, teacher, second)

    def gradient(self, logits: Tensor) -> Tensor:
        """Where the gradient of ``logits`` [R, V] goes: over them, or beside them in the dtype of the GEMMs."""
        return logits if self._gradient is None else rows_of(self._gradient, 0, *logits.shape)


def padded(width: int) -> int:
    """Elements from one row of ``width`` logits to the next."""
    return -(-width // ROW_MULTIPLE) * ROW_MULTIPLE


def rows_of(flat: Tensor, first: int, rows: int, width: int) -> Tensor:
    """Rows [first, first + rows) of ``width`` columns in a flat buffer of padded rows."""
    stride = padded(width)
    return flat[first * stride : (first + rows) * stride].view(rows, stride)[:, :width]


def project(hidden: Tensor, head: Head, out: Tensor) -> Tensor:
    """scale * (hidden W^T + bias), [R, V], written to ``out``."""
    multiply(hidden.to(head.operand), head, out)
    return shift_and_scale(out, head)


def multiply(hidden: Tensor, head: Head, out: Tensor) -> None:
    """hidden W^T, [R, V], written to ``out``; ``hidden`` in the operands' dtype."""
    if keeps_accumulator(hidden.device, head.operand, head.result):
        torch.mm(hidden, head.weight.t(), out_dtype=head.result, out=out)
        return
    hidden = hidden.to(head.result)
    for rows, weight in head_blocks(head):
        torch.mm(hidden, weight.t(), out=out[:, rows])


def shift_and_scale(out: Tensor, head: Head) -> Tensor:
    """scale * (out + bias), in place."""
    if head.bias is not None:
        out.add_(head.bias)
    return out if head.scale == 1 else out.mul_(head.scale)


def add_hidden_gradient(total: Tensor, grad_logits: Tensor, head: Head) -> None:
    """``total`` += grad_logits W, [R, H]: the gradient of hidden states when ``grad_logits`` [R, V] is that of hidden W^T."""
    if keeps_accumulator(grad_logits.device, head.operand, total.dtype):
        add_product(total, grad_logits.to(head.operand), head.weight)
        return
    grad_logits = grad_logits.to(head.result)
    for rows, weight in head_blocks(head):
        if total.dtype == head.result:
            total.addmm_(grad_logits[:, rows], weight)
        else:
            total.add_(torch.mm(grad_logits[:, rows], weight))


def add_weight_gradient(total: Tensor, grad_logits: Tensor, hidden: Tensor, head: Head) -> None:
    """``total`` += grad_logits^T hidden, [V, H] in float32 (float64)."""
    hidden = hidden.to(head.operand)
    if keeps_accumulator(hidden.device, head.operand, total.dtype):
        add_product(total, grad_logits.to(head.operand).t(), hidden)
    else:
        total.addmm_(grad_logits.to(total.dtype).t(), hidden.to(total.dtype))


def add_product(total: Tensor, first: Tensor, second: Tensor) -> None:
    """``total`` (float32) += first second, of bfloat16 or float16 matrices, accumulated in float32."""
    if _adds_product(total.device, first.dtype):
        torch.addmm(total, first, second, out_dtype=total.dtype, out=total)
        return
    height = max(1, ADDED_BYTES // (total.element_size() * total.shape[1]))
    for rows in pieces(total.shape[0], height, ID_MULTIPLE):
        total[rows].add_(torch.mm(first[rows], second, out_dtype=total.dtype))
