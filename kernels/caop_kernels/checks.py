"""Checks of arguments that need no look at values on the device. Imports without Triton."""

from __future__ import annotations

import math

import torch

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_logits(student: torch.Tensor, teacher: torch.Tensor, vocab_size: int | None) -> tuple[int, int]:
    """(N, V) to compare for logits [N, V_s] and [N, V_t]; TypeError or ValueError if they do not fit together."""
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if not isinstance(logits, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(logits).__name__}")
        if logits.dtype not in LOGITS_DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {logits.dtype}")
        if logits.dim() != 2 or logits.shape[1] == 0:
            raise ValueError(f"{name} must be [N, V] with V >= 1, got shape {tuple(logits.shape)}")
        if logits.shape[1] > 1 and logits.stride(1) != 1:
            raise ValueError(
                f"{name} must have unit column stride, got strides {logits.stride()}; call .contiguous() on it"
            )
    if student.device != teacher.device:
        raise ValueError(f"teacher_logits must be on the student's device {student.device}, got {teacher.device}")
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"teacher_logits must have the student's {student.shape[0]} rows, got {teacher.shape[0]}")
    smaller = min(student.shape[1], teacher.shape[1])
    if vocab_size is None:
        if student.shape[1] != teacher.shape[1]:
            raise ValueError(
                f"student_logits have {student.shape[1]} columns and teacher_logits {teacher.shape[1]}: pass "
                f"vocab_size (at most {smaller}) to compare the ids they share"
            )
        return student.shape[0], smaller
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"vocab_size must be an int or None, got {vocab_size!r}")
    if not 1 <= vocab_size <= smaller:
        raise ValueError(f"vocab_size must be in [1, {smaller}], got {vocab_size}")
    return student.shape[0], vocab_size


def check_labels(labels: torch.Tensor | None, logits: torch.Tensor) -> None:
    """Labels are None or an int64 [N] tensor (any stride) on the device of the logits; their values are not read."""
    if labels is None:
        return
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64:
        raise TypeError(
            f"labels must be an int64 tensor or None, got {getattr(labels, 'dtype', type(labels).__name__)}"
        )
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels must have shape ({logits.shape[0]},), got {tuple(labels.shape)}")
    if labels.device != logits.device:
        raise ValueError(f"labels must be on the logits' device {logits.device}, got {labels.device}")


def check_positive(name: str, value: float | None, *, optional: bool = False) -> None:
    """A finite number > 0; with `optional` also None."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and > 0, got {value!r}")
