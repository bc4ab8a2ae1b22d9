"""What kernels take for granted of their arguments, asserted where they would read out of bounds or be silently wrong.

The losses check what users pass, with messages for users. Imports without Triton.
"""

from __future__ import annotations

import torch

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def assert_logits(n_rows: int, n_cols: int, *operands: torch.Tensor | None) -> None:
    """Each is None or [n_rows, >= n_cols] in a dtype of LOGITS_DTYPES, with unit column stride, on one device."""
    for logits in operands:
        if logits is not None:
            assert operands[0] is None or logits.device == operands[0].device, (logits.device, operands[0].device)
            assert logits.dtype in LOGITS_DTYPES, logits.dtype
            assert logits.dim() == 2, logits.shape
            assert logits.shape[0] == n_rows, (logits.shape, n_rows)
            assert logits.shape[1] >= n_cols, (logits.shape, n_cols)
            assert logits.shape[1] == 1 or logits.stride(1) == 1, logits.stride()


def shared_columns(student: torch.Tensor, teacher: torch.Tensor | None, vocab_size: int | None) -> tuple[int, int]:
    """(N, V) to compare of logits [N, V_s] and [N, V_t]; without `vocab_size` V_s and V_t must be the same."""
    assert student.dim() == 2, student.shape
    n_rows, n_cols = student.shape
    if vocab_size is None:
        assert teacher is None or teacher.shape[1] == n_cols, (student.shape, teacher.shape)
    else:
        n_cols = vocab_size
    assert n_cols >= 1, n_cols
    assert_logits(n_rows, n_cols, student, teacher)
    return n_rows, n_cols


def assert_rows(n_rows: int, device: torch.device, *columns: torch.Tensor | None) -> None:
    """Each is None or [n_rows] on `device`, of any stride."""
    for column in columns:
        assert column is None or (column.shape == (n_rows,) and column.device == device), (column.shape, column.device)


def assert_labels(labels: torch.Tensor | None, n_rows: int, device: torch.device) -> None:
    """None, or int64 [n_rows] on `device`."""
    assert_rows(n_rows, device, labels)
    assert labels is None or labels.dtype == torch.int64, labels.dtype


def assert_fields(fields: torch.Tensor, *shape: int) -> None:
    """A contiguous tensor of this shape, as one kernel leaves it for another."""
    assert fields.shape == shape, (fields.shape, shape)
    assert fields.is_contiguous(), fields.stride()


def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor with its elements side by side; None stays None."""
    return None if tensor is None else tensor.contiguous()
