"""The two ways through tokens and ids: chunks of tokens with all ids, or blocks of ids with all tokens.

A chunk or block is projected to logits in a buffer, shown to ``visit``, and the gradient that ``visit`` made of it goes
into two GEMMs before the next one takes its place. With one unit U = 2 N V H operations, a model's projection is 1 U,
grad_hidden and grad_weight 1 U each.

Over tokens, grad_weight is read and written once a chunk, in float32, and rounded by the caller; over ids every block of
grad_weight is made at once and rounded as it is written, and only grad_hidden is carried.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from caop_fast.losses.linear.head import (
    Head,
    LogitBuffer,
    add_hidden_gradient,
    add_weight_gradient,
    keeps_accumulator,
    ready,
    same_projection,
)
from caop_fast.losses.linear.sizes import ID_MULTIPLE, TOKEN_MULTIPLE, pieces

# visit(which tokens or ids, student's logits, teacher's logits, where the gradient may go) -> the gradient, or None
Visit = Callable[[slice, Tensor, Tensor | None, Tensor], Tensor | None]


class Sides(NamedTuple):
    """Hidden states [N, H] and heads of both models; the teacher may be absent."""

    student_hidden: Tensor
    student: Head
    teacher_hidden: Tensor | None = None
    teacher: Head | None = None
    dead: Tensor | None = None  # [N] bool: rows whose hidden states must not reach a product

    @property
    def shared(self) -> bool:
        """Whether one head serves both."""
        return self.teacher is not None and same_projection(self.student, self.teacher)

    def operands(self, rows: slice) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Hidden states of some rows as the GEMMs take them: the student's, the teacher's, and both where shared.

        0 in dead rows, whatever they hold: NaN * 0 is NaN.
        """
        dead = None if self.dead is None else self.dead[rows].view(-1, 1)

        def clean(hidden: Tensor) -> Tensor:
            return hidden if dead is None else hidden.masked_fill(dead, 0)

        student = self.student_hidden[rows].to(self.student.operand)
        if self.teacher is None:
            return clean(student), None, None
        teacher = self.teacher_hidden[rows].to(self.teacher.operand)
        if not self.shared:
            return clean(student), clean(teacher), None
        both = torch.cat([student, teacher])
        if dead is not None:
            both.masked_fill_(torch.cat([dead, dead]), 0)
        student, teacher = both.split(student.shape[0])
        return student, teacher, both

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype of sums over chunks."""
        return torch.float64 if self.student.result == torch.float64 else torch.float32


class Wanted(NamedTuple):
    """Which gradients to make."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


class Gradients(NamedTuple):
    """Of what is wanted; None elsewhere."""

    hidden: Tensor | None  # [N, H]
    weight: Tensor | None  # [V, H]
    bias: Tensor | None  # [V]


def over_tokens(sides: Sides, visit: Visit, *, most: int, wanted: Wanted, narrow_gradient: bool) -> Gradients:
    """Visit all ids of at most ``most`` tokens at a time; gradients in the dtype of accumulation."""
    (n_rows, n_features), (vocab, _) = sides.student_hidden.shape, sides.student.weight.shape
    new = sides.student.weight.new_zeros
    dtype = sides.accumulator
    found = Gradients(
        new((n_rows, n_features), dtype=dtype) if wanted.hidden else None,
        new((vocab, n_features), dtype=dtype) if wanted.weight else None,
        new(vocab, dtype=dtype) if wanted.bias else None,
    )
    chunks = list(pieces(n_rows, most, TOKEN_MULTIPLE))
    longest = max((c.stop - c.start for c in chunks), default=0)
    buffer = LogitBuffer(sides.student, sides.teacher, longest, vocab, narrow_gradient=narrow_gradient and any(wanted))
    head, other = ready(sides.student, sides.teacher, shared=sides.shared)
    for rows in chunks:
        hidden, teacher_hidden, both = sides.operands(rows)
        student, teacher = buffer.project(hidden, head, teacher_hidden, other, both)
        gradient = visit(rows, student, teacher, buffer.gradient(student))
        if gradient is None or not any(wanted):
            continue
        gradient = _as_operand(gradient, sides)
        if wanted.hidden:
            add_hidden_gradient(found.hidden[rows], gradient, head)
        if wanted.weight:
            add_weight_gradient(found.weight, gradient, hidden, head)
        if wanted.bias:
            found.bias.add_(gradient.sum(0, dtype=dtype))
    return found


def over_ids(
    sides: Sides,
    visit: Visit,
    *,
    most: int,
    wanted: Wanted,
    narrow_gradient: bool,
    weight_like: Tensor | None = None,
    bias_like: Tensor | None = None,
    unit: Tensor | None = None,
) -> Gradients:
    """Visit all tokens of at most ``most`` ids at a time; grad_hidden in the dtype of accumulation.

    grad_weight and grad_bias are like ``weight_like`` and ``bias_like``, 0 for ids beyond those of the heads.
    ``unit`` is a scalar that all gradients are multiplied by before they are rounded.
    """
    (n_rows, n_features), (vocab, _) = sides.student_hidden.shape, sides.student.weight.shape
    dtype = sides.accumulator
    new = sides.student.weight.new_empty
    found = Gradients(
        new((n_rows, n_features), dtype=dtype).zero_() if wanted.hidden else None,
        new(weight_like.shape, dtype=weight_like.dtype) if wanted.weight else None,
        new(bias_like.shape, dtype=bias_like.dtype) if wanted.bias else None,
    )
    for part in found[1:]:
        if part is not None:
            part[vocab:] = 0
    blocks = list(pieces(vocab, most, ID_MULTIPLE))
    longest = max((b.stop - b.start for b in blocks), default=0)
    buffer = LogitBuffer(sides.student, sides.teacher, n_rows, longest, narrow_gradient=narrow_gradient and any(wanted))
    hidden, other_hidden, both = sides.operands(slice(None))
    factor = hidden if keeps_accumulator(hidden.device, sides.student.operand, dtype) else hidden.to(dtype)
    for ids in blocks:
        other = None if sides.teacher is None else sides.teacher.columns(ids)
        head, other = ready(sides.student.columns(ids), other, shared=both is not None)
        student, teacher = buffer.project(hidden, head, other_hidden, other, both=both)
        gradient = visit(ids, student, teacher, buffer.gradient(student))
        if gradient is None or not any(wanted):
            continue
        gradient = _as_operand(gradient, sides)
        if wanted.hidden:
            add_hidden_gradient(found.hidden, gradient, head)
        if wanted.weight:
            _write_weight_gradient(found.weight[ids], gradient, factor, unit, dtype)
        if wanted.bias:
            part = gradient.sum(0, dtype=dtype)
            found.bias[ids] = part if unit is None else part * unit
    if unit is not None and wanted.hidden:
        found.hidden.mul_(unit)
    return found


def _as_operand(gradient: Tensor, sides: Sides) -> Tensor:
    """The gradient of logits as the GEMMs take it: rounded at most once for both."""
    operand = sides.student.operand
    return gradient.to(operand) if keeps_accumulator(gradient.device, operand, sides.accumulator) else gradient


def _write_weight_gradient(
    out: Tensor, gradient: Tensor, hidden: Tensor, unit: Tensor | None, dtype: torch.dtype
) -> None:
    """``out`` = unit * gradient^T hidden, summed in ``dtype`` and rounded once."""
    first = gradient.t()
    if keeps_accumulator(hidden.device, hidden.dtype, dtype):  # a bfloat16 result might be summed in bfloat16
        part = torch.mm(first, hidden, out_dtype=dtype)
    else:
        part = torch.mm(first.to(dtype), hidden)
    out.copy_(part if unit is None else part.mul_(unit))
