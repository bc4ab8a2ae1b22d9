"""Runs the mathematics of ``reference.py`` over many rows: blocks that stay in cache, -inf, and the choice of backend.

On the CPU a block is small enough for its half dozen arrays to stay in the cache while a dozen passes go over them,
which is where the speed comes from; elsewhere it is large enough to fill the device.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from caop_fast.losses.checks import choice
from caop_fast.losses.reference import (
    Options,
    RowStatistics,
    blank_labels,
    coefficients,
    divergences,
    logit_gradient,
    needs_care,
    open_block,
    row_statistics,
    totals,
)

BACKENDS = ("auto", "torch", "triton")
CPU_BLOCK_ELEMENTS = 1 << 19  # 2 MB of float32: measured best between 2**18 and 2**19, twice as slow from 2**21 on
DEVICE_BLOCK_ELEMENTS = 1 << 25  # 128 MB of float32


def resolve_backend(backend: Any, device: torch.device) -> str:
    """ "torch" or "triton". "auto" takes Triton on GPUs where it is installed, PyTorch elsewhere."""
    choice("backend", backend, BACKENDS)
    if backend == "torch" or (backend == "auto" and device.type == "cpu"):
        return "torch"
    reason = triton_unavailable(device)
    if reason is None:
        return "triton"
    if backend == "triton":
        raise ValueError(f"backend='triton' cannot serve tensors on {device}: {reason}")
    return "torch"


def triton_unavailable(device: torch.device) -> str | None:
    """Why the Triton kernels cannot serve this device; None when they can."""
    return importlib.import_module("caop_kernels").available(device)


def row_blocks(n_rows: int, vocab: int, device: torch.device, index: Tensor | None) -> Iterator[slice | Tensor]:
    """The rows of each block: slices of range(n_rows), or pieces of ``index``. At least one block, maybe empty."""
    elements = CPU_BLOCK_ELEMENTS if device.type == "cpu" else DEVICE_BLOCK_ELEMENTS
    height = max(1, elements // vocab)
    count = n_rows if index is None else index.numel()
    for start in range(0, max(count, 1), height):
        rows = slice(start, min(start + height, count))
        yield rows if index is None else index[rows]


def take(values: Any, rows: slice | Tensor) -> Any:
    """The entries of a block's rows; floats and None stay as they are."""
    return values[rows] if isinstance(values, Tensor) else values


def take_options(options: Options, rows: slice | Tensor) -> Options:
    return options._replace(beta=take(options.beta, rows)) if isinstance(options.beta, Tensor) else options


def take_statistics(statistics: RowStatistics, rows: slice) -> RowStatistics:
    return RowStatistics(*(take(column, rows) for column in statistics))


def join_statistics(blocks: list[RowStatistics]) -> RowStatistics:
    """Statistics of consecutive blocks in one."""
    if len(blocks) == 1:
        return blocks[0]
    return RowStatistics(*(None if columns[0] is None else torch.cat(columns) for columns in zip(*blocks, strict=True)))


def block_statistics(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    options: Options,
    dtype: torch.dtype,
    *,
    backend: str,
    consume: bool = False,
    keep: bool = False,
    slope: bool = False,
) -> tuple[Any, RowStatistics, bool]:
    """The opened block of raw logits [R, V] (with ``keep``, for the gradient), its statistics, and ``careful``.

    The second way through, which -inf needs, is taken on the CPU only where a block asks for it, and always elsewhere.
    """
    if backend == "triton":
        rows = kernel_statistics(student, teacher, labels, options, dtype)
        if not (keep or options.interior):
            return None, rows, True
        block, *_ = open_block(student, teacher, options, dtype, known=rows, consume=consume, slope=slope)
        rows = renormalised(block, rows)
        if options.interior:
            divergence, mean_ratio = divergences(
                block, rows.student_total, rows.teacher_total, rows.log_ratio, options, True
            )
            rows = rows._replace(divergence=divergence, mean_ratio=mean_ratio)
        return block, rows, True
    block, *shifts = open_block(student, teacher, options, dtype, consume=consume, slope=slope)
    careful = needs_care(block)
    return block, row_statistics(block, tuple(shifts), labels, options, careful=careful), careful


def renormalised(block: Any, rows: RowStatistics) -> RowStatistics:
    """The totals taken again from the block: the kernel's lse, as a shift, is rounded at the size of the logits."""
    total, teacher_total, log_ratio = totals(block)
    return rows._replace(student_total=total, teacher_total=teacher_total, log_ratio=log_ratio)


def kernel_statistics(
    student: Tensor, teacher: Tensor, labels: Tensor | None, options: Options, dtype: torch.dtype
) -> RowStatistics:
    """Row statistics from the Triton kernel, the shift being lse itself; for interior beta without the divergence."""
    kernel = importlib.import_module("caop_kernels").row_statistics
    found = kernel(
        student if student.stride(-1) == 1 else student.contiguous(),
        teacher if teacher.stride(-1) == 1 else teacher.contiguous(),
        labels,
        temperature=options.temperature,
        student_softcap=options.student_softcap,
        teacher_softcap=options.teacher_softcap,
    )

    def column(values: Tensor) -> Tensor:
        return values.to(dtype).view(-1, 1)

    one = torch.ones_like(column(found.student_lse))
    forward, reverse = column(found.forward_kl), column(found.reverse_kl)
    beta = options.beta
    if isinstance(beta, Tensor):
        divergence = torch.where(beta.view(-1, 1) == 0, forward, reverse)
        divergence = torch.where((beta.view(-1, 1) == 0) | (beta.view(-1, 1) == 1), divergence, math.nan)
    else:
        divergence = forward if beta == 0 else reverse
    logprobs = [None, None]
    if labels is not None:
        logprobs = [
            blank_labels(column(v), labels.view(-1, 1), student.shape[-1])
            for v in (found.student_logprob, found.teacher_logprob)
        ]
    return RowStatistics(
        student_shift=column(found.student_lse),
        student_total=one,
        teacher_shift=column(found.teacher_lse),
        teacher_total=one,
        log_ratio=torch.zeros_like(one),
        divergence=divergence,
        mean_ratio=reverse,
        student_entropy=column(found.student_entropy),
        teacher_entropy=column(found.teacher_entropy),
        student_logprob=logprobs[0],
        teacher_logprob=logprobs[1],
    )


def block_gradient(
    block: Any,
    rows: RowStatistics,
    labels: Tensor | None,
    options: Options,
    *,
    careful: bool,
    **upstream: Tensor | None,
) -> Tensor | None:
    """Gradient [R, V] for upstream gradients of divergence, logprob and entropy; None when nothing flows."""
    found = coefficients(rows, options, labels, block.student_e.shape[-1], **upstream)
    return None if found is None else logit_gradient(block, rows, found, labels, options, careful=careful)
