"""The distillation losses on the Triton kernels, in the terms of ``rows.py``."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from caop_fast.losses.outputs import RowStatistics
from caop_fast.losses.reference.divergence import Options
from caop_fast.losses.rows import Columns, Rows, pick_divergence


def unit_columns(logits: Tensor) -> Tensor:
    """The logits with unit column stride, which the kernels read; copied only where they have another."""
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def _scalars(options: Options) -> dict[str, Any]:
    return {
        "temperature": options.temperature,
        "student_softcap": options.student_softcap,
        "teacher_softcap": options.teacher_softcap,
    }


def distillation_rows(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    options: Options,
    vocab: int,
) -> Rows:
    """Statistics of logits [N, V_s] and [N, V_t] from one read of both; two for 0 < beta < 1."""
    kernels = importlib.import_module("caop_kernels")
    student, teacher = unit_columns(student), unit_columns(teacher)
    per_row = isinstance(options.beta, Tensor)
    asked = ["student_entropy", "teacher_entropy"]
    if labels is not None:
        asked += ["student_logprob", "teacher_logprob"]
    if not per_row and not options.interior:
        asked.append("forward_kl" if options.beta == 0 else "reverse_kl")
    found = kernels.row_statistics(
        student,
        teacher,
        labels,
        beta=options.beta if per_row else None,
        weights=weights,
        vocab_size=vocab,
        statistics=asked,
        saved_statistics=True,
        **_scalars(options),
    )
    if options.interior:
        divergence = kernels.mixture_divergence(
            student,
            teacher,
            found.saved_statistics,
            beta=options.beta,
            n_cols=vocab,
            weights=weights,
            **_scalars(options),
        )
    elif per_row:
        divergence = found.divergence
    else:
        divergence = found.forward_kl if options.beta == 0 else found.reverse_kl
    return Rows(
        divergence,
        found.student_logprob,
        found.teacher_logprob,
        found.student_entropy,
        found.teacher_entropy,
        found.saved_statistics,
        True,
    )


def state_rows(state: Tensor, labels: Tensor | None, options: Options) -> Rows:
    """Statistics of rows from the state [12, N] of all their columns; an interior divergence is left to the mixture."""
    found = finished(state, labels)
    return Rows(
        pick_divergence(options.beta, found.forward_kl, found.reverse_kl),
        found.student_logprob,
        found.teacher_logprob,
        found.student_entropy,
        found.teacher_entropy,
        found.saved_statistics,
        True,
    )


def mixture_sums(student: Tensor, teacher: Tensor, options: Options, saved_statistics: Tensor) -> Tensor:
    """The sums [K, 2, N] of an interior divergence over some columns; those of other columns are added to them."""
    return importlib.import_module("caop_kernels").mixture_sums(
        unit_columns(student),
        unit_columns(teacher),
        saved_statistics,
        beta=options.beta,
        n_cols=student.shape[1],
        **_scalars(options),
    )


def finish_mixture(sums: Tensor, saved_statistics: Tensor, options: Options) -> Tensor:
    """The interior divergence [N] of sums [K, 2, N]; its mean ratio goes into the saved_statistics."""
    return importlib.import_module("caop_kernels").finish_mixture(sums, saved_statistics, beta=options.beta)


def distillation_gradient(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    options: Options,
    columns: Columns,
    saved_statistics: Tensor,
    student_entropy: Tensor,
    *,
    out: Tensor | None,
    grad_divergence: Tensor | None,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    """Gradient [N, V_s] of the student's logits, in ``out`` (maybe the logits themselves) or a new tensor."""
    kernels = importlib.import_module("caop_kernels")
    flows = grad_divergence is not None
    coefficients = kernels.distillation_coefficients(
        saved_statistics,
        n_cols=columns.total,
        labels=labels,
        beta=options.beta,
        temperature=options.temperature,
        student_entropy=student_entropy,
        grad_divergence=grad_divergence,
        grad_logprob=grad_logprob,
        grad_entropy=grad_entropy,
    )
    return _logit_gradient(
        student,
        unit_columns(teacher),
        coefficients,
        out,
        labels=columns.local(labels),
        weights=weights,
        vocab_size=columns.width,
        beta=options.beta if options.interior and flows else None,
        ratio=flows and (isinstance(options.beta, Tensor) or options.beta > 0),
        teacher=flows and (isinstance(options.beta, Tensor) or options.beta == 0),
        log=grad_entropy is not None,
        label=grad_logprob is not None,
        **_scalars(options),
    )


def _logit_gradient(
    student: Tensor, teacher: Tensor | None, coefficients: Tensor, out: Tensor | None, /, **options: Any
) -> Tensor:
    """The gradient kernel, for logits of any column stride."""
    unit = unit_columns(student)
    over = out is student
    target = unit if over else out
    found = importlib.import_module("caop_kernels").logit_gradient(unit, teacher, coefficients, out=target, **options)
    return student.copy_(found) if over and unit is not student else found


def token_rows(
    logits: Tensor, labels: Tensor | None, weights: Tensor | None, temperature: float, softcap: float | None, vocab: int
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Log-probability, entropy and lse of logits [N, V] from one read, and the saved_statistics."""
    found = importlib.import_module("caop_kernels").row_statistics(
        unit_columns(logits),
        None,
        labels,
        weights=weights,
        temperature=temperature,
        student_softcap=softcap,
        vocab_size=vocab,
        saved_statistics=True,
    )
    return found.student_logprob, found.student_entropy, found.student_lse, found.saved_statistics


def token_gradient(
    logits: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    saved_statistics: Tensor,
    entropy: Tensor,
    temperature: float,
    softcap: float | None,
    columns: Columns,
    *,
    out: Tensor | None,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
) -> Tensor:
    """Gradient [N, V] of the logits, in ``out`` (maybe the logits themselves) or a new tensor."""
    coefficients = importlib.import_module("caop_kernels").distillation_coefficients(
        saved_statistics,
        n_cols=columns.total,
        labels=labels,
        temperature=temperature,
        student_entropy=entropy,
        grad_logprob=grad_logprob,
        grad_entropy=grad_entropy,
        grad_lse=grad_lse,
    )
    return _logit_gradient(
        logits,
        None,
        coefficients,
        out,
        labels=columns.local(labels),
        weights=weights,
        temperature=temperature,
        student_softcap=softcap,
        vocab_size=columns.width,
        log=grad_entropy is not None,
        label=grad_logprob is not None,
    )


def row_state(student: Tensor, teacher: Tensor, labels: Tensor | None, options: Options, vocab: int) -> Tensor:
    """The state [12, N] of a shard's logits."""
    return importlib.import_module("caop_kernels").row_state(
        unit_columns(student), unit_columns(teacher), labels, vocab_size=vocab, **_scalars(options)
    )


def merge_states(states: Tensor) -> Tensor:
    """States [S, 12, N] in one, [12, N]."""
    return importlib.import_module("caop_kernels").merge_states(states)


def finished(state: Tensor, labels: Tensor | None) -> Any:
    """The kernels' statistics of a state [12, N], with the saved_statistics."""
    return importlib.import_module("caop_kernels").finish_state(state, labels)


def finish_state(state: Tensor, labels: Tensor | None) -> RowStatistics:
    """The statistics of a state [12, N]."""
    found = finished(state, labels)
    return RowStatistics(*(getattr(found, name) for name in RowStatistics._fields))
