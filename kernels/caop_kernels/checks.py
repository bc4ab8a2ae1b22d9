"""Checks of arguments that need no look at values on the device. Imports without Triton."""

from __future__ import annotations

import math

import torch

from caop_kernels.constants import CONFIDENCE_KINDS

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_logits(student: torch.Tensor, teacher: torch.Tensor | None, vocab_size: int | None) -> tuple[int, int]:
    """(N, V) to compare for logits [N, V_s] and [N, V_t]; TypeError or ValueError if they do not fit together.

    Without a teacher the student stands for both.
    """
    for name, logits in (("student_logits", student), ("teacher_logits", student if teacher is None else teacher)):
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
    teacher = student if teacher is None else teacher
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


def check_rows(name: str, value: torch.Tensor | None, logits: torch.Tensor) -> None:
    """None, or a floating-point [N] tensor on the device of the logits."""
    if value is None:
        return
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor or None, got {getattr(value, 'dtype', type(value))}")
    if value.shape != logits.shape[:1]:
        raise ValueError(f"{name} must have shape ({logits.shape[0]},), got {tuple(value.shape)}")
    if value.device != logits.device:
        raise ValueError(f"{name} must be on the logits' device {logits.device}, got {value.device}")


def check_confidence_source(source: torch.Tensor, vocab_size: int | None) -> tuple[int, int]:
    """(N, columns to read) of logits or log-probabilities [N, V]."""
    if not isinstance(source, torch.Tensor) or source.dtype not in LOGITS_DTYPES:
        got = getattr(source, "dtype", type(source).__name__)
        raise TypeError(f"source must be a float32, bfloat16, float16 or float64 tensor, got {got}")
    if source.dim() != 2 or source.shape[1] == 0:
        raise ValueError(f"source must be [N, V] with V >= 1, got shape {tuple(source.shape)}")
    if source.shape[1] > 1 and source.stride(1) != 1:
        raise ValueError(
            f"source must have unit column stride, got strides {source.stride()}; call .contiguous() on it"
        )
    if vocab_size is not None and not 1 <= vocab_size <= source.shape[1]:
        raise ValueError(f"vocab_size must be in [1, {source.shape[1]}], got {vocab_size}")
    return source.shape[0], source.shape[1] if vocab_size is None else vocab_size


def check_candidates(
    ids: torch.Tensor | None, values: torch.Tensor, source: torch.Tensor, kind: str, dtype: torch.dtype
) -> None:
    """Candidates of a confidence score: ids [C] int64 (or None: one column of the source each), values [C]."""
    if kind not in CONFIDENCE_KINDS:
        raise ValueError(f"kind must be one of {', '.join(CONFIDENCE_KINDS)}, got {kind!r}")
    if not isinstance(values, torch.Tensor) or values.dtype != dtype:
        raise TypeError(
            f"candidate_values must be a {dtype} tensor, got {getattr(values, 'dtype', type(values).__name__)}"
        )
    if values.dim() != 1 or values.numel() == 0 or (ids is None and values.numel() != source.shape[1]):
        wanted = "[C] with C >= 1" if ids is not None else f"({source.shape[1]},), one per column"
        raise ValueError(f"candidate_values must have shape {wanted}, got {tuple(values.shape)}")
    if ids is not None and (not isinstance(ids, torch.Tensor) or ids.dtype != torch.int64):
        raise TypeError(f"candidate_ids must be an int64 tensor, got {getattr(ids, 'dtype', type(ids).__name__)}")
    if ids is not None and ids.shape != values.shape:
        raise ValueError(f"candidate_ids must have shape {tuple(values.shape)}, got {tuple(ids.shape)}")
    for name, tensor in (("candidate_ids", ids), ("candidate_values", values)):
        if tensor is not None and tensor.device != source.device:
            raise ValueError(f"{name} must be on the source's device {source.device}, got {tensor.device}")


def check_bin_rows(confidence: torch.Tensor, correct: torch.Tensor, weights: torch.Tensor | None) -> None:
    """Confidence, correct and (optional) weights: floating-point [N], on one device."""
    if not isinstance(confidence, torch.Tensor) or confidence.dtype not in LOGITS_DTYPES:
        got = getattr(confidence, "dtype", type(confidence).__name__)
        raise TypeError(f"confidence must be a float32, bfloat16, float16 or float64 tensor, got {got}")
    if confidence.dim() != 1:
        raise ValueError(f"confidence must be [N], got shape {tuple(confidence.shape)}")
    if correct is None:
        raise TypeError("correct must be a floating-point tensor, got None")
    check_rows("correct", correct, confidence)
    check_rows("weights", weights, confidence)
