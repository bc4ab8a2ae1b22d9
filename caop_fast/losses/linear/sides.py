"""What the logits of a call are computed from: hidden states that count, and heads over the ids that are compared."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from caop_fast.losses.backends.masked_rows import UnmaskedRows
from caop_fast.losses.linear.config import LinearConfig
from caop_fast.losses.linear.lm_head import LMHead, Operands, ProjectedSide, shares_projection


class ProjectedSides(NamedTuple):
    """What logits are computed from: hidden states of the rows that are computed, heads of this rank's ids."""

    student: ProjectedSide
    teacher: ProjectedSide | None = None
    mask: Tensor | None = None  # [R] bool: rows whose hidden states must not reach a product

    @property
    def shared(self) -> bool:
        """Whether one projection serves both models."""
        return self.teacher is not None and shares_projection(self.student.head, self.teacher.head)

    @property
    def heads(self) -> tuple[LMHead, LMHead | None]:
        return self.student.head, None if self.teacher is None else self.teacher.head

    def operands(self, rows: slice) -> Operands:
        """Hidden states of some rows as the GEMMs take them; 0 in masked rows, whatever they hold: NaN * 0 is NaN."""
        if self.teacher is None:
            return Operands(self.student_operand(rows))
        if not self.shared:
            return Operands(self.student_operand(rows), self._operand(self.teacher, rows, self.mask))
        student, teacher = (self._operand(side, rows, None) for side in (self.student, self.teacher))
        stacked = torch.cat([student, teacher])
        if self.mask is not None:
            stacked.masked_fill_(self.mask[rows].view(-1, 1).repeat(2, 1), 0)
        student, teacher = stacked.split(student.shape[0])
        return Operands(student, teacher, stacked)

    def student_operand(self, rows: slice) -> Tensor:
        """The student's alone."""
        return self._operand(self.student, rows, self.mask)

    @staticmethod
    def _operand(side: ProjectedSide, rows: slice, mask: Tensor | None) -> Tensor:
        hidden = side.hidden[rows].to(side.head.operand_dtype)
        return hidden if mask is None else hidden.masked_fill(mask[rows].view(-1, 1), 0)


def unmask_sides(
    student: ProjectedSide, teacher: ProjectedSide | None, unmasked: UnmaskedRows, config: LinearConfig
) -> ProjectedSides:
    """The rows that are computed, and both heads over the ids of this rank, detached."""
    width = config.layout.columns.width

    def unmask(side: ProjectedSide) -> ProjectedSide:
        head = side.head
        bias = None if head.bias is None else head.bias.detach()[:width].to(head.logits_dtype)
        head = head._replace(weight=head.weight.detach()[:width], bias=bias)
        return ProjectedSide(unmasked.take(side.hidden.detach()), head)

    return ProjectedSides(unmask(student), None if teacher is None else unmask(teacher), unmasked.mask)
