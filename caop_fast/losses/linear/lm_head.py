"""Language-model heads: logits of some tokens and ids, and the two matrix products of their gradient.

Logits come out of the GEMM in float32 by default: near a divergence of 0.02, rounding them to bfloat16 costs 23 % of
the gradient. CUDA has GEMMs that return their float32 accumulator (``torch.mm(..., out_dtype=torch.float32)``);
elsewhere a bfloat16 or float16 weight is widened block by block, so that no float32 copy of it ever exists as a whole.
The same goes for a weight narrower than the hidden states it meets.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

WIDEN_BYTES = 1 << 24  # float32 bytes of one widened block of a weight
PASS_BYTES = 1 << 27  # float32 bytes of one product that is added to a sum, or rounded, in a pass of its own
ROW_MULTIPLE = 16  # elements: rows of logits start where the kernels can load, and cuBLAS write, 16 bytes at a time
PROBED_SHAPE = (48, 256, 40)  # rows, inner dimension and columns of the products that are compared
PROBE_TOLERANCE = 1e-3  # float32 sums of 256 terms are off by less than 1e-4, a float16 result by 4e-3 and more
TOKEN_MULTIPLE, ID_MULTIPLE = 64, 128  # GEMM tiles; only where that many fit


class LMHead(NamedTuple):
    """An output projection: logits = scale * (hidden W^T + bias)."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    scale: float
    operand_dtype: torch.dtype = torch.float32  # what the GEMM multiplies; ``prepare`` chooses both dtypes
    logits_dtype: torch.dtype = torch.float32  # what it returns

    def within(self, ids: slice) -> LMHead:
        """The head of some ids."""
        return self._replace(weight=self.weight[ids], bias=None if self.bias is None else self.bias[ids])

    @property
    def accumulator_dtype(self) -> torch.dtype:
        """The dtype that gradients are summed in."""
        return torch.float64 if self.logits_dtype == torch.float64 else torch.float32

    @property
    def widens(self) -> bool:
        """Whether operands must be widened to the dtype of the logits before the GEMM."""
        if self.operand_dtype == self.logits_dtype:
            return False
        return not keeps_accumulator(self.weight.device, self.operand_dtype, self.logits_dtype)

    @property
    def narrow_gradient(self) -> bool:
        """Whether the GEMMs of the gradient take ``operand_dtype`` and sum in the wider ``accumulator_dtype``."""
        return keeps_accumulator(self.weight.device, self.operand_dtype, self.accumulator_dtype)

    @property
    def gradient_dtype(self) -> torch.dtype:
        """The dtype in which those GEMMs take the gradient of the logits, which is rounded to it once."""
        return self.operand_dtype if self.narrow_gradient else self.logits_dtype

    @property
    def kept_dtype(self) -> torch.dtype:
        """The dtype in which grad_weight is kept from the forward to the backward pass.

        bfloat16 has float32's range, and the upstream gradient is mostly 1: rounded on a device before it, grad_weight
        takes half the memory, and GEMMs write it in one go. Follows from the tensors alone, as tracing needs it to.
        """
        rounded = self.weight.device.type != "cpu" and self.weight.dtype == self.operand_dtype == torch.bfloat16
        return torch.bfloat16 if rounded else self.accumulator_dtype


class ProjectedSide(NamedTuple):
    """One model: its hidden states, [N, H] ([..., H] until ``prepare``), and the head that makes logits of them."""

    hidden: Tensor
    head: LMHead


class Operands(NamedTuple):
    """Hidden states of some rows as the GEMMs take them."""

    student: Tensor  # [R, H]
    teacher: Tensor | None = None  # [R, H_t]
    stacked: Tensor | None = None  # [2 R, H]: both, where one head serves both and is read once


def projection_dtypes(hidden: Tensor, weight: Tensor, logits_dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of a projection's operands and of its result."""
    operand = torch.promote_types(hidden.dtype, weight.dtype)
    kind = hidden.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and operand != torch.float64:
        operand = torch.get_autocast_dtype(kind)
    narrow = operand.itemsize <= logits_dtype.itemsize and logits_dtype.itemsize > 2
    return (operand if narrow else logits_dtype), logits_dtype


def keeps_accumulator(device: torch.device, operand: torch.dtype, result: torch.dtype) -> bool:
    """Whether the device has a GEMM from ``operand`` straight to the wider ``result``."""
    narrow = result == torch.float32 and operand in (torch.bfloat16, torch.float16)
    return narrow and device.type != "cpu" and _has_mm(device, operand)


@functools.cache
def _has_mm(device: torch.device, operand: torch.dtype) -> bool:
    """Whether ``torch.mm`` takes ``out_dtype`` on the device and is right: it raises where it does not take it."""
    found = _is_right(
        "torch.mm", lambda out, a, b: torch.mm(a, b, out_dtype=torch.float32, out=out), device, operand, adds=False
    )
    if found:
        _has_addmm(device, operand)  # asked now, since a CUDA graph may be captured when it is needed
    return found


@functools.cache
def _has_addmm(device: torch.device, operand: torch.dtype) -> bool:
    """The same of ``torch.addmm``, adding to a float32 tensor in place: from PyTorch 2.10 (pytorch/pytorch#167931)."""
    return _is_right(
        "torch.addmm", lambda out, a, b: torch.addmm(out, a, b, out_dtype=torch.float32, out=out), device, operand,
        adds=True,
    )  # fmt: skip


def _is_right(
    name: str,
    product: Callable[[Tensor, Tensor, Tensor], Tensor],
    device: torch.device,
    operand: torch.dtype,
    *,
    adds: bool,
) -> bool:
    """Whether ``product(out, first, second)`` writes first second to ``out`` (or adds it), summed in float32.

    Tried on random matrices with the layouts that the losses use: either operand transposed, rows of all three longer
    than what is used of them. A product that raises is not there; one that is wrong is not used, with a warning.
    """
    rows, inner, width = PROBED_SHAPE
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("call a linear loss once before its call is captured in a CUDA graph: it tries products out")
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    first, second = (draw(*shape).to(operand) for shape in ((rows, inner), (inner, width)))
    before = 32 * draw(rows, width) if adds else torch.full((rows, width), torch.nan, dtype=torch.float32)
    expected = first.double() @ second.double() + (before if adds else 0)
    for transposed in ((False, False), (False, True), (True, False)):
        operands = []
        for matrix, turned in zip((first, second), transposed, strict=True):
            rows_of = _padded(matrix.t() if turned else matrix).to(device)[:, :-ROW_MULTIPLE]
            operands.append(rows_of.t() if turned else rows_of)
        area = _padded(before).to(device)
        try:
            product(area[:, :width], *operands)
        except torch.OutOfMemoryError:  # says nothing about the product
            raise
        except (RuntimeError, TypeError) as raised:
            if any(text in str(raised) for text in ("ALLOC_FAILED", "NOT_INITIALIZED", "out of memory")):
                raise  # nor does this, and ranks that found different answers would wait for each other
            return False
        found = area.cpu()
        error = float((found[:, :width] - expected).abs().max())
        if not error <= PROBE_TOLERANCE or not bool(found[:, width:].isnan().all()):
            warnings.warn(
                f"{name} from {operand} to float32 is wrong on {device} (PyTorch {torch.__version__}): off by "
                f"{error:.3g}, or written outside its result; linear losses do without it, which takes longer",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
    return True


def _padded(matrix: Tensor) -> Tensor:
    """The matrix with ROW_MULTIPLE more columns, of NaN."""
    return torch.nn.functional.pad(matrix, (0, ROW_MULTIPLE), value=torch.nan)


def accumulating_gemms(device: torch.device, operand: torch.dtype) -> dict[str, bool]:
    """Which GEMMs from ``operand`` to float32 the device has, for reports of measurements.

    Without "mm" a linear loss widens its operands to float32; without "addmm" it adds products in a pass of its own.
    """
    return {"mm": _has_mm(device, operand), "addmm": _has_addmm(device, operand)}


def even_slices(total: int, most: int, multiple: int = 1) -> Iterator[slice]:
    """Slices of range(total) of at most ``most`` each, of nearly equal length; none of nothing.

    Lengths are rounded up to a multiple where ``most`` allows that.
    """
    if total == 0:
        return
    length = -(-total // -(-total // most))
    length = min(most, -(-length // multiple) * multiple)
    for start in range(0, total, length):
        yield slice(start, min(start + length, total))


def shares_projection(student: LMHead, teacher: LMHead) -> bool:
    """Whether both heads multiply by the same tensor in the same way, so that one GEMM serves both."""
    a, b = student.weight, teacher.weight
    return (
        a.data_ptr() == b.data_ptr()
        and (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        and (student.operand_dtype, student.logits_dtype) == (teacher.operand_dtype, teacher.logits_dtype)
    )


def convert_weights(student: LMHead, teacher: LMHead | None, *, shared: bool) -> tuple[LMHead, LMHead | None]:
    """Heads with their weights in the dtype their GEMMs take, but for those that are widened in blocks.

    ``shared``: the teacher's weight is the student's, and is converted once for both.
    """
    student = student._replace(weight=_converted(student))
    if teacher is not None:
        teacher = teacher._replace(weight=student.weight if shared else _converted(teacher))
    return student, teacher


def _converted(head: LMHead) -> Tensor:
    in_blocks = head.widens or head.weight.dtype.itemsize < head.operand_dtype.itemsize
    return head.weight if in_blocks else head.weight.to(head.operand_dtype)


def _weight_blocks(head: LMHead) -> Iterator[tuple[slice, Tensor]]:
    """The weight as its GEMMs take it: whole, or widened in blocks of rows."""
    vocab, n_features = head.weight.shape
    if head.weight.dtype == head.operand_dtype and not head.widens:
        yield slice(0, vocab), head.weight
        return
    height = max(1, WIDEN_BYTES // (4 * max(n_features, 1)))
    for start in range(0, vocab, height):
        ids = slice(start, min(start + height, vocab))
        # The rounding to the operands' dtype is part of the result.
        yield ids, head.weight[ids].to(head.operand_dtype).to(head.logits_dtype)


class LogitBuffer:
    """Memory for both models' logits of one block of tokens and ids at a time, and for their gradient beside them.

    Allocated once for all blocks. Rows start on multiples of ROW_MULTIPLE elements whatever the vocabulary.
    """

    def __init__(
        self, student: LMHead, teacher: LMHead | None, rows: int, width: int, *, gradient_rows: int | None
    ) -> None:
        """``gradient_rows``: the rows of the gradient, maybe of several blocks; None where it goes over the logits."""
        stride, new = _row_stride(width), student.weight.new_empty
        self._logits = new((rows if teacher is None else 2 * rows) * stride, dtype=student.logits_dtype)
        self._gradient = None if gradient_rows is None else new(gradient_rows * stride, dtype=student.gradient_dtype)

    def project(self, hidden: Operands, student: LMHead, teacher: LMHead | None) -> tuple[Tensor, Tensor | None]:
        """Logits [R, V] of both models."""
        rows, width = hidden.student.shape[0], student.weight.shape[0]
        first = _buffer_rows(self._logits, 0, rows, width)
        if teacher is None or hidden.teacher is None:
            _multiply(hidden.student, student, first)
            return _add_bias_and_scale(first, student), None
        second = _buffer_rows(self._logits, rows, rows, width)
        if hidden.stacked is not None:
            _multiply(hidden.stacked, student, _buffer_rows(self._logits, 0, 2 * rows, width))
        else:
            _multiply(hidden.student, student, first)
            _multiply(hidden.teacher, teacher, second)
        return _add_bias_and_scale(first, student), _add_bias_and_scale(second, teacher)

    def gradient(self, logits: Tensor, first: int = 0) -> Tensor:
        """Where the gradient of ``logits`` [R, V] goes: over them, or beside them into rows from ``first`` on."""
        return logits if self._gradient is None else self.gradient_rows(first, *logits.shape)

    def gradient_rows(self, first: int, rows: int, width: int) -> Tensor:
        """Rows of the gradient that lies beside the logits."""
        assert self._gradient is not None
        return _buffer_rows(self._gradient, first, rows, width)

    def free_logits(self) -> None:
        """Give the memory of the logits back, unless the gradient lies there."""
        if self._gradient is not None:
            self._logits = self._logits.new_empty(0)


def _row_stride(width: int) -> int:
    return -(-width // ROW_MULTIPLE) * ROW_MULTIPLE


def _buffer_rows(flat: Tensor, first: int, rows: int, width: int) -> Tensor:
    """Rows [first, first + rows) of ``width`` columns in a flat buffer of padded rows."""
    stride = _row_stride(width)
    return flat[first * stride : (first + rows) * stride].view(rows, stride)[:, :width]


def _multiply(hidden: Tensor, head: LMHead, out: Tensor) -> None:
    """hidden W^T, [R, V], written to ``out``; ``hidden`` in the operands' dtype."""
    if keeps_accumulator(hidden.device, head.operand_dtype, head.logits_dtype):
        torch.mm(hidden, head.weight.t(), out_dtype=head.logits_dtype, out=out)
        return
    hidden = hidden.to(head.logits_dtype)
    for ids, weight in _weight_blocks(head):
        torch.mm(hidden, weight.t(), out=out[:, ids])


def _add_bias_and_scale(out: Tensor, head: LMHead) -> Tensor:
    """scale * (out + bias), in place."""
    if head.bias is not None:
        out.add_(head.bias)
    return out if head.scale == 1 else out.mul_(head.scale)


def hidden_gradient(grad_logits: Tensor, head: LMHead, out: Tensor, *, add: bool = False) -> None:
    """``out`` [R, H] = (with ``add``, +=) grad_logits W: the gradient of hidden states, given that of hidden W^T."""
    if not add and grad_logits.shape[1] == 0:
        out.zero_()
    elif head.narrow_gradient:
        _multiply_into(out, grad_logits, head.weight, add=add)
    else:
        grad_logits = grad_logits.to(head.logits_dtype)
        for ids, weight in _weight_blocks(head):
            if out.dtype == head.logits_dtype:
                _multiply_into(out, grad_logits[:, ids], weight, add=add)
            else:
                product = torch.mm(grad_logits[:, ids], weight)
                out.add_(product) if add else out.copy_(product)
            add = True


def hidden_operand(hidden: Tensor, head: LMHead) -> Tensor:
    """Hidden states, in the operands' dtype, as ``weight_gradient`` takes them: converted once for all blocks."""
    return hidden if head.narrow_gradient else hidden.to(head.accumulator_dtype)


def weight_gradient(grad_logits: Tensor, hidden: Tensor, head: LMHead, out: Tensor, *, add: bool = False) -> None:
    """``out`` [V, H] = (with ``add``, +=) grad_logits^T hidden, summed in the dtype of accumulation and rounded once.

    ``hidden`` is of ``hidden_operand``. With ``add``, ``out`` is in the dtype of accumulation.
    """
    dtype = head.accumulator_dtype
    if add or out.dtype == dtype:
        _multiply_into(out, grad_logits.to(hidden.dtype).t(), hidden, add=add)
    elif out.dtype == hidden.dtype and sums_in_float32(out.device, out.dtype):
        with _float32_sums():
            torch.mm(grad_logits.t(), hidden, out=out)
    else:
        for ids in even_slices(out.shape[0], _pass_height(dtype, out.shape[1]), ID_MULTIPLE):
            out[ids] = weight_product(grad_logits[:, ids], hidden, dtype)


def weight_product(grad_logits: Tensor, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """grad_logits^T hidden, [V, H], summed and returned in ``dtype``, that of accumulation."""
    if hidden.dtype != dtype:
        return torch.mm(grad_logits.t(), hidden, out_dtype=dtype)
    return torch.mm(grad_logits.t().to(dtype), hidden)


def sums_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a GEMM of ``dtype`` in and out can be made to sum in float32, and to round only what it writes."""
    return device.type == "cuda" and torch.version.hip is None and dtype == torch.bfloat16


_SUMS_LOCK = threading.Lock()


@contextmanager
def _float32_sums() -> Iterator[None]:
    """Within it cuBLAS adds the parts of a split sum in float32; by default it may add them in bfloat16.

    The setting is the process's. It is read when a GEMM is launched, and no two threads change it at a time.
    """
    matmul = torch.backends.cuda.matmul
    with _SUMS_LOCK:
        splits = getattr(matmul, "allow_bf16_reduced_precision_reduction_split_k", True)
        if not (splits and matmul.allow_bf16_reduced_precision_reduction):
            yield
            return
        matmul.allow_bf16_reduced_precision_reduction = False
        try:
            yield
        finally:
            matmul.allow_bf16_reduced_precision_reduction = True


def _multiply_into(out: Tensor, first: Tensor, second: Tensor, *, add: bool) -> None:
    """``out`` = (with ``add``, +=) first second, of factors in its dtype or narrower ones that it accumulates."""
    if first.dtype == out.dtype:
        if add:
            out.addmm_(first, second)
        else:
            torch.mm(first, second, out=out)
    elif not add:
        torch.mm(first, second, out_dtype=out.dtype, out=out)
    elif _has_addmm(out.device, first.dtype):
        torch.addmm(out, first, second, out_dtype=out.dtype, out=out)
    else:
        for rows in even_slices(out.shape[0], _pass_height(out.dtype, out.shape[1]), ID_MULTIPLE):
            out[rows].add_(torch.mm(first[rows], second, out_dtype=out.dtype))


def _pass_height(dtype: torch.dtype, width: int) -> int:
    """Rows of ``PASS_BYTES``."""
    return max(1, PASS_BYTES // (dtype.itemsize * max(width, 1)))
