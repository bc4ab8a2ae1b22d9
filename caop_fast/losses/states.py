"""Mergeable states of rows: what shards of a vocabulary exchange instead of logits.

    state = merge_states(all_gather(row_state(my_student_columns, my_teacher_columns, my_labels)))
    statistics = finish_state(state, labels)

48 bytes per token and shard, whatever the vocabulary. Nothing here is differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from caop_fast.losses import checks
from caop_fast.losses.backends.resolve import get_backend, resolve_backend
from caop_fast.losses.batches import DistillationBatch
from caop_fast.losses.operator import Operator
from caop_fast.losses.options import DivergenceOptions
from caop_fast.losses.outputs import RowStatistics
from caop_kernels.constants import STATE_FIELDS


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
    options = DivergenceOptions(
        temperature=checks.positive("temperature", temperature),
        student_softcap=checks.optional_positive("student_softcap", student_softcap),
        teacher_softcap=checks.optional_positive("teacher_softcap", teacher_softcap),
    )
    batch = DistillationBatch(
        student_logits.reshape(-1, student_logits.shape[-1]),
        teacher_logits.reshape(-1, teacher_logits.shape[-1]),
        checks.label_ids(labels, lead),
        None,
    )
    state = _row_state(StateInputs(batch, options, vocab, resolve_backend(backend, device)))
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
    merged = _merge_states(MergeInputs(flat, resolve_backend(backend, states.device)))
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
    found = _finish_state(FinishInputs(flat, ids, resolve_backend(backend, device)))
    return RowStatistics(
        forward_kl=found.forward_kl.view(lead),
        reverse_kl=found.reverse_kl.view(lead),
        student_lse=found.student_lse.view(lead),
        teacher_lse=found.teacher_lse.view(lead),
        student_logprob=None if found.student_logprob is None else found.student_logprob.view(lead),
        teacher_logprob=None if found.teacher_logprob is None else found.teacher_logprob.view(lead),
        student_entropy=found.student_entropy.view(lead),
        teacher_entropy=found.teacher_entropy.view(lead),
    )


def _check_state(name: str, state: Tensor, *, axis: int) -> None:
    if not isinstance(state, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(state).__name__}")
    if state.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, as row_state returned it, got {state.dtype}")
    if state.ndim <= axis or state.shape[axis] != STATE_FIELDS:
        wanted = "[S, 12, ...]" if axis else "[12, ...]"
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(state.shape)}")


class StateInputs(NamedTuple):
    """Arguments of ``caop_fast::row_state``."""

    batch: DistillationBatch
    options: DivergenceOptions
    vocab: int
    backend: str


class MergeInputs(NamedTuple):
    """Arguments of ``caop_fast::merge_states``."""

    states: Tensor  # [S, STATE_FIELDS, N]
    backend: str


class FinishInputs(NamedTuple):
    """Arguments of ``caop_fast::finish_state``."""

    state: Tensor  # [STATE_FIELDS, N]
    labels: Tensor | None  # [N] int64
    backend: str


def _run_row_state(inputs: StateInputs) -> Tensor:
    batch, options, vocab, backend = inputs
    dtype = checks.statistics_dtype((batch.student, batch.teacher))
    return get_backend(backend).row_state(batch, options, vocab, dtype)


def _fake_row_state(inputs: StateInputs) -> Tensor:
    student, teacher, *_ = inputs.batch
    dtype = checks.statistics_dtype((student, teacher))
    return student.new_empty((STATE_FIELDS, student.shape[0]), dtype=dtype)


def _fake_finish(inputs: FinishInputs) -> RowStatistics:
    def column() -> Tensor:
        return inputs.state.new_empty(inputs.state.shape[1])

    labelled = inputs.labels is not None
    return RowStatistics(
        forward_kl=column(),
        reverse_kl=column(),
        student_lse=column(),
        teacher_lse=column(),
        student_logprob=column() if labelled else None,
        teacher_logprob=column() if labelled else None,
        student_entropy=column(),
        teacher_entropy=column(),
    )


_row_state = Operator("row_state", StateInputs, Tensor, _run_row_state, _fake_row_state)
_merge_states = Operator(
    "merge_states",
    MergeInputs,
    Tensor,
    lambda inputs: get_backend(inputs.backend).merge_states(inputs.states),
    lambda inputs: inputs.states.new_empty(inputs.states.shape[1:]),
)
_finish_state = Operator(
    "finish_state",
    FinishInputs,
    RowStatistics,
    lambda inputs: get_backend(inputs.backend).finish_state(inputs.state, inputs.labels),
    _fake_finish,
)
