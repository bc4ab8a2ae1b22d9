"""What the distillation losses do to logits of some tokens and some ids: statistics and gradients, on any backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from caop_fast.losses import on_triton, rows
from caop_fast.losses.linear.shards import Layout
from caop_fast.losses.ops.tokens import token_rows
from caop_fast.losses.reference import states as reference
from caop_fast.losses.reference.divergence import Options
from caop_fast.losses.rows import Columns, Rows

FIELDS = ("divergence", "student_logprob", "student_entropy", "teacher_logprob", "teacher_entropy")


STATE_ARRAYS = 4  # the reference makes states in float64 and of more arrays than anything else: blocks are smaller


class Engine(NamedTuple):
    """Where and how statistics of [R, V] logits are made; with a ``layout``, other ranks hold the other columns."""

    dtype: torch.dtype  # of the statistics
    triton: bool
    layout: Layout | None

    @property
    def code(self) -> object:
        """The module of the backend; both name what they share alike."""
        return on_triton if self.triton else rows

    def statistics(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        weights: Tensor | None,
        options: Options,
        columns: Columns,
    ) -> Rows:
        """Statistics of tokens whose ids are all there, or on the other ranks."""
        if self.layout is None:
            if self.triton:
                return on_triton.distillation_rows(student, teacher, labels, weights, options, columns.total)
            return rows.distillation_rows(student, teacher, labels, weights, options, columns.total, self.dtype)
        found = self.finish([self.state(student, teacher, labels, options, columns)], labels, options)
        if not options.interior:
            return found
        return self.finish_interior(found, [self.mixture(student, teacher, options, found)], options)

    def state(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None, options: Options, columns: Columns
    ) -> Tensor:
        """The state [12, R] of some ids."""
        if student.shape[1] == 0:
            return reference.empty_state(student.shape[0], self.dtype, student.device)
        local = columns.local(labels)
        if self.triton:
            return on_triton.row_state(student, teacher, local, options, student.shape[1]).to(self.dtype)
        wide = STATE_ARRAYS * student.shape[1]
        blocks = [
            reference.row_state(student[r], teacher[r], rows.take(local, r), options, self.dtype)
            for r in rows.row_blocks(student.shape[0], wide, student.device, None)
        ]
        return torch.cat(blocks, dim=1)

    def finish(self, states: list[Tensor], labels: Tensor | None, options: Options) -> Rows:
        """Statistics from the states of this rank's ids, and those of the other ranks."""
        merged = self._merge(torch.stack(states)) if len(states) > 1 else states[0]
        if self.layout is not None:
            merged = self._merge(self.layout.gather(merged))
        return self.code.state_rows(merged, labels, options)

    def _merge(self, states: Tensor) -> Tensor:
        return on_triton.merge_states(states) if self.triton else reference.merge_states(states)

    def mixture(self, student: Tensor, teacher: Tensor, options: Options, found: Rows) -> Tensor:
        """[1, 2, R]: sums of an interior divergence over some ids."""
        if student.shape[1] == 0:
            return found.saved_statistics.new_zeros(1, 2, student.shape[0])
        sums = self.code.mixture_sums(student, teacher, options, found.saved_statistics)
        return sums.sum(0, keepdim=True)

    def finish_interior(self, found: Rows, sums: list[Tensor], options: Options) -> Rows:
        """``found`` with the interior divergence of the sums of this rank's ids, and those of the other ranks."""
        total = torch.cat(sums)
        if self.layout is not None:
            total = self.layout.gather(total.sum(0))
        return found._replace(divergence=self.code.finish_mixture(total, found.saved_statistics, options))

    def gradient(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        weights: Tensor | None,
        options: Options,
        columns: Columns,
        saved_statistics: Tensor,
        student_entropy: Tensor,
        out: Tensor,
        **upstream: Tensor | None,
    ) -> Tensor:
        """The gradient of the logits, in ``out``."""
        if student.shape[1] == 0:
            return out
        upstream = {k: None if v is None else v.to(saved_statistics.dtype).contiguous() for k, v in upstream.items()}
        return self.code.distillation_gradient(
            student, teacher, labels, weights, options, columns, saved_statistics, student_entropy, out=out, **upstream
        )

    @property
    def token_fields(self) -> int:
        """Rows of the saved_statistics of one model's tokens."""
        return 6 if self.triton else 2

    def token_statistics(
        self,
        logits: Tensor,
        labels: Tensor | None,
        weights: Tensor | None,
        temperature: float,
        softcap: float | None,
        columns: Columns,
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """Log-probability, entropy, lse [R] of one model's tokens, and their saved_statistics."""
        if self.layout is None:
            return token_rows(logits, labels, weights, temperature, softcap, columns.total, False, self.triton, False)
        state = self.state(logits, logits, labels, Options(0.0, temperature, softcap, softcap), columns)
        merged = self._merge(self.layout.gather(state))
        if self.triton:
            found = on_triton.finished(merged, labels)
            return found.student_logprob, found.student_entropy, found.student_lse, found.saved_statistics
        found = reference.finish_state(merged, labels)
        return (
            found.student_logprob,
            found.student_entropy,
            found.student_lse,
            reference.saved_statistics(merged)[[0, 2]],
        )

    def token_gradient(
        self,
        logits: Tensor,
        labels: Tensor | None,
        weights: Tensor | None,
        saved_statistics: Tensor,
        entropy: Tensor,
        temperature: float,
        softcap: float | None,
        columns: Columns,
        out: Tensor,
        **upstream: Tensor | None,
    ) -> Tensor:
        """The gradient of one model's logits, in ``out``."""
        upstream = {k: None if v is None else v.to(saved_statistics.dtype).contiguous() for k, v in upstream.items()}
        return self.code.token_gradient(
            logits, labels, weights, saved_statistics, entropy, temperature, softcap, columns, out=out, **upstream
        )
