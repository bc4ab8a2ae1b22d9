"""``caop_fast::linear_distillation``: loss, statistics and gradients of the distillation loss, from hidden states."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from caop_fast.losses import checks, rows
from caop_fast.losses.linear.call import Setting, Side
from caop_fast.losses.linear.distill import FIELDS, Engine
from caop_fast.losses.linear.forward import FACTOR, GRADIENTS, OUTPUTS, fake_gradients, forward_gradients
from caop_fast.losses.linear.selection import Selection
from caop_fast.losses.ops.scale import scaled_by_loss
from caop_fast.losses.reference.divergence import Options
from caop_fast.losses.rows import take, take_options

ROWS_SCHEMA = "Tensor? labels, Tensor? weights, Tensor? beta_rows, float beta, float temperature"
N_SIDE, N_ROWS = len(Side._fields), 5


def split(inputs: tuple[Any, ...]) -> tuple[Side, Side, tuple[Any, ...], list[Any]]:
    """Both sides, the arguments of ROWS_SCHEMA, and what follows."""
    student, teacher = Side(*inputs[:N_SIDE]), Side(*inputs[N_SIDE : 2 * N_SIDE])
    return student, teacher, inputs[2 * N_SIDE : 2 * N_SIDE + N_ROWS], list(inputs[2 * N_SIDE + N_ROWS :])


def statistics_dtype(student: Side, teacher: Side) -> torch.dtype:
    return checks.statistics_dtype((*student[:3], *teacher[:3]))


def check_rows(labels: Tensor | None, weights: Tensor | None, beta_rows: Tensor | None, setting: Setting) -> None:
    if setting.validate:
        checks.check_labels(labels, setting.columns.total)
        checks.check_weights(weights)
        checks.check_beta(beta_rows)


def distill(*inputs: Any) -> tuple[Tensor, ...]:
    """Loss, the five statistics [N], gradients, factor: see ``forward_gradients``."""
    student, teacher, (labels, weights, beta_rows, beta, temperature), (mean, *rest) = split(inputs)
    setting = Setting(*rest)
    check_rows(labels, weights, beta_rows, setting)
    dtype = statistics_dtype(student, teacher)
    engine, columns = Engine(dtype, setting.triton, setting.layout), setting.columns
    selection = Selection.of(weights, student.hidden.shape[0])
    live_labels, mask = selection.take(labels), selection.mask(weights)
    beta = beta if beta_rows is None else selection.take(beta_rows)
    options = Options(beta, temperature, student.softcap, teacher.softcap)

    def see(
        tokens: slice, s: Tensor, t: Tensor, target: Tensor, flow: Tensor | None
    ) -> tuple[Sequence[Tensor | None], Tensor | None]:
        some_labels, some_options, some_mask = (
            take(live_labels, tokens),
            take_options(options, tokens),
            take(mask, tokens),
        )
        gradient = None
        if not setting.triton and engine.layout is None:  # statistics and gradient from the same exponentials
            seen = rows.distillation_chunk(s, t, some_labels, some_options, dtype, flow)
            gradient = None if flow is None else s
        else:
            seen = engine.statistics(s, t, some_labels, some_mask, some_options, columns)
            if flow is not None:
                gradient = engine.gradient(
                    s, t, some_labels, some_mask, some_options, columns, seen.saved_statistics, seen.student_entropy, target,
                    grad_divergence=flow, grad_logprob=None, grad_entropy=None,
                )  # fmt: skip
        return [getattr(seen, name) for name in FIELDS], gradient

    return forward_gradients(
        student, teacher, setting, selection, weights, see, mean=mean, labelled=labels is not None, dtype=dtype
    )


def _fake(*inputs: Any) -> tuple[Tensor, ...]:
    student, teacher, (labels, *_), (_, *rest) = split(inputs)
    return fake_gradients(
        student, Setting(*rest), labelled=labels is not None, dtype=statistics_dtype(student, teacher)
    )


linear_distillation = torch.library.custom_op(
    "caop_fast::linear_distillation",
    distill,
    mutates_args=(),
    schema=f"({Side.schema('student')}, {Side.schema('teacher')}, {ROWS_SCHEMA}, bool mean, {Setting.SCHEMA})"
    f" -> {OUTPUTS}",
)
linear_distillation.register_fake(_fake)
scaled_by_loss(linear_distillation, gradients=GRADIENTS, factor=FACTOR)
