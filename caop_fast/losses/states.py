"""Mergeable states of rows: what shards of a vocabulary exchange instead of logits.

    state = merge_states(all_gather(row_state(my_student_columns, my_teacher_columns, my_labels)))
    statistics = finish_state(state, labels)

48 bytes per token and shard, whatever the vocabulary. Nothing here is differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from caop_fast.losses import checks
from caop_fast.losses.backend import resolve_backend
from caop_fast.losses.ops import states as ops
from caop_fast.losses.outputs import RowStatistics
from caop_fast.losses.reference.states import STATE_FIELDS


@torch.no_grad()
def row_state(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """The state of some columns of each row: enough to finish both KLs, log-sum-exps, entropies and log-probabilities.

    Args:
        student_logits: [..., V_s] float32, bfloat16, float16 or float64: the columns of a shard.
        teacher_logits: [..., V_t], the same columns of the teacher, same leading shape.
        labels: [...] integers relative to the first column of the shard; those outside [0, V) are another shard's, or
            -100. None for no log-probabilities.
        temperature, student_softcap, teacher_softcap: as in ``distillation_loss``.
        vocab_size: only the first columns; needed where V_s and V_t differ.
        backend: "torch", "triton", or "auto".

    Returns:
        [12, ...] float32 (float64 when an input is); ``reference/states.py`` names the fields.

    Raises:
        TypeError, ValueError: on bad arguments, naming the argument, what it got and what it takes.
    """
    checks.floating_tensor("student_logits", student_logits, min_ndim=2)
    checks.floating_tensor("teacher_logits", teacher_logits, min_ndim=2)
    lead = student_logits.shape[:-1]
    if teacher_logits.shape[:-1] != lead:
        raise ValueError(
            f"teacher_logits must have the leading shape of student_logits, {tuple(lead)}, "
            f"got {tuple(teacher_logits.shape[:-1])}"
        )
    device = checks.one_device({"student_logits": student_logits, "teacher_logits": teacher_logits, "labels": labels})
    vocab = checks.vocabulary(
        vocab_size, student_logits=student_logits.shape[-1], teacher_logits=teacher_logits.shape[-1]
    )
    ids = checks.label_ids(labels, lead)
    state = ops.row_state(
        student_logits.reshape(-1, student_logits.shape[-1]),
        teacher_logits.reshape(-1, teacher_logits.shape[-1]),
        ids,
        checks.positive("temperature", temperature),
        checks.positive("student_softcap", student_softcap, optional=True),
        checks.positive("teacher_softcap", teacher_softcap, optional=True),
        vocab,
        resolve_backend(backend, device) == "triton",
    )
    return state.view(STATE_FIELDS, *lead)


@torch.no_grad()
def merge_states(states: Tensor | Sequence[Tensor], *, backend: str = "auto") -> Tensor:
    """The state of all columns, from those of disjoint sets of columns, merged in the order given.

    Args:
        states: [S, 12, ...], or a sequence of S tensors [12, ...] as ``row_state`` returned them.
        backend: "torch", "triton", or "auto".

    Raises:
        TypeError, ValueError: on bad arguments, naming the argument, what it got and what it takes.
    """
    if not isinstance(states, Tensor):
        if not isinstance(states, Sequence) or not states or not all(isinstance(s, Tensor) for s in states):
            raise TypeError(f"states must be a tensor or a non-empty sequence of tensors, got {type(states).__name__}")
        shapes = {tuple(s.shape) for s in states}
        if len(shapes) > 1:
            raise ValueError(f"states must have one shape, got {sorted(shapes)}")
        states = torch.stack(list(states))
    _check_state("states", states, axis=1)
    if states.shape[0] == 0:
        raise ValueError("states must hold at least one state, got none")
    flat = states.reshape(*states.shape[:2], -1)
    merged = ops.merge_states(flat, resolve_backend(backend, states.device) == "triton")
    return merged.view(states.shape[1:])


@torch.no_grad()
def finish_state(state: Tensor, labels: Tensor | None = None, *, backend: str = "auto") -> RowStatistics:
    """The statistics of rows whose columns have all been merged into ``state``.

    Args:
        state: [12, ...] from ``row_state`` or ``merge_states``.
        labels: [...] integers; log-probabilities are 0 where they are -100 and NaN where no shard held the label. None
            for no log-probabilities.
        backend: "torch", "triton", or "auto".

    Returns:
        RowStatistics in the dtype of the state, with its trailing shape.

    Raises:
        TypeError, ValueError: on bad arguments, naming the argument, what it got and what it takes.
    """
    _check_state("state", state, axis=0)
    lead = state.shape[1:]
    device = checks.one_device({"state": state, "labels": labels})
    ids = checks.label_ids(labels, lead)
    flat = state.reshape(state.shape[0], -1)
    found = RowStatistics(*ops.finish_state(flat, ids, resolve_backend(backend, device) == "triton"))
    if labels is None:
        found = found._replace(student_logprob=None, teacher_logprob=None)
    return RowStatistics(*(None if column is None else column.view(lead) for column in found))


def _check_state(name: str, state: Tensor, *, axis: int) -> None:
    if not isinstance(state, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(state).__name__}")
    if state.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, as row_state returned it, got {state.dtype}")
    if state.ndim <= axis or state.shape[axis] != STATE_FIELDS:
        wanted = "[S, 12, ...]" if axis else "[12, ...]"
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(state.shape)}")
