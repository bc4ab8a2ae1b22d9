"""``caop_fast::row_state``, ``merge_states``, ``finish_state``: mergeable states of rows. Not differentiable."""

from typing import Any

import torch
from torch import Tensor

from caop_fast.losses import checks, on_triton
from caop_fast.losses.reference import states as reference
from caop_fast.losses.reference.divergence import Options
from caop_fast.losses.rows import row_blocks, take


@torch.library.custom_op("caop_fast::row_state", mutates_args=())
def row_state(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    temperature: float,
    student_softcap: float | None,
    teacher_softcap: float | None,
    vocab: int,
    triton: bool,
) -> Tensor:
    """Logits [N, V_s], [N, V_t] of a shard to its state [12, N]."""
    options = Options(0.0, temperature, student_softcap, teacher_softcap)
    if triton:
        return on_triton.row_state(student, teacher, labels, options, vocab)
    dtype = checks.statistics_dtype((student, teacher))
    blocks = [
        reference.row_state(student[rows, :vocab], teacher[rows, :vocab], take(labels, rows), options, dtype)
        for rows in row_blocks(student.shape[0], vocab, student.device, None)
    ]
    return torch.cat(blocks, dim=1)


@row_state.register_fake
def _(student: Tensor, teacher: Tensor, *_: Any) -> Tensor:
    dtype = checks.statistics_dtype((student, teacher))
    return student.new_empty((reference.STATE_FIELDS, student.shape[0]), dtype=dtype)


@torch.library.custom_op("caop_fast::merge_states", mutates_args=())
def merge_states(states: Tensor, triton: bool) -> Tensor:
    """States [S, 12, N] of disjoint sets of columns to that of their union, [12, N]."""
    return on_triton.merge_states(states) if triton else reference.merge_states(states)


@merge_states.register_fake
def _(states: Tensor, triton: bool) -> Tensor:
    return states.new_empty(states.shape[1:])


@torch.library.custom_op("caop_fast::finish_state", mutates_args=())
def finish_state(
    state: Tensor, labels: Tensor | None, triton: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A state [12, N] to the fields of RowStatistics, [N] each; log-probabilities are empty without labels."""
    found = on_triton.finish_state(state, labels) if triton else reference.finish_state(state, labels)
    return tuple(state.new_empty(0) if column is None else column for column in found)


@finish_state.register_fake
def _(state: Tensor, labels: Tensor | None, triton: bool) -> tuple[Tensor, ...]:
    absent = (4, 5) if labels is None else ()
    return tuple(state.new_empty(0 if i in absent else state.shape[1]) for i in range(8))
