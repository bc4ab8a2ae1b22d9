"""``caop_fast::linear_distillation``: loss, statistics and gradients of the distillation loss, from hidden states.

The weights of the rows are known, so the gradients are made in the forward, chunk of tokens by chunk of tokens, while
the logits of the chunk are there; the backward only scales them.
"""

from typing import Any

import torch
from torch import Tensor

from caop_fast.losses import checks, rows
from caop_fast.losses.distillation import reduce_rows, total_weight
from caop_fast.losses.linear.blocks import over_tokens
from caop_fast.losses.linear.call import (
    Setting,
    Side,
    no_autocast,
    open_sides,
    or_empty,
    row_upstream,
    wanted_of,
)
from caop_fast.losses.linear.distill import FIELDS, Engine
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


def linear_distillation(*inputs: Any) -> tuple[Tensor, ...]:
    """Loss, the five statistics [N], d_hidden [N, H], d_weight, d_bias of this rank's ids, and a factor for them.

    Gradients are those of sum(w D) in the dtype of accumulation; with the factor, of the loss. Empty where not wanted.
    """
    student, teacher, (labels, weights, beta_rows, beta, temperature), (mean, *rest) = split(inputs)
    setting = Setting(*rest)
    check_rows(labels, weights, beta_rows, setting)
    dtype, device = statistics_dtype(student, teacher), student.hidden.device
    options = Options(beta if beta_rows is None else beta_rows, temperature, student.softcap, teacher.softcap)
    engine, columns, wanted = Engine(dtype, setting.triton, setting.layout), setting.columns, wanted_of(setting)
    selection = Selection.of(weights, student.hidden.shape[0])
    live_labels, live_weights = selection.take(labels), selection.take(weights)
    mask = selection.mask(weights)
    live_options = options._replace(beta=selection.take(options.beta))
    with no_autocast(device):
        sides = open_sides(student, teacher, selection, setting)
        flow = unit = None
        if any(wanted):
            ones = student.hidden.new_ones(selection.count, dtype=dtype)
            flow, unit = row_upstream(ones if live_weights is None else live_weights, student)
        found = [student.hidden.new_zeros(selection.count, dtype=dtype) for _ in FIELDS]

        def visit(tokens: slice, s: Tensor, t: Tensor, target: Tensor) -> Tensor | None:
            some_labels, some_options = take(live_labels, tokens), take_options(live_options, tokens)
            some_flow = take(flow, tokens)
            gradient = None
            if not setting.triton and engine.layout is None:
                seen = rows.distillation_chunk(s, t, some_labels, some_options, dtype, some_flow)
                gradient = None if some_flow is None else s
            else:
                some_mask = take(mask, tokens)
                seen = engine.statistics(s, t, some_labels, some_mask, some_options, columns)
                if some_flow is not None:
                    gradient = engine.gradient(
                        s, t, some_labels, some_mask, some_options, columns, seen.normaliser, seen.student_entropy,
                        target, d_divergence=some_flow, d_logprob=None, d_entropy=None,
                    )  # fmt: skip
            for name, column in zip(FIELDS, found, strict=True):
                if (value := getattr(seen, name)) is not None:
                    column[tokens] = value.view(-1)
            return gradient

        most = setting.tokens_at_a_time(2, device, weight_gradient=wanted.weight)
        made = over_tokens(sides, visit, most=most, wanted=wanted, narrow_gradient=setting.triton)
        if wanted.hidden and setting.layout is not None:
            setting.layout.add(made.hidden)
        found = [selection.spread(column) for column in found]
        loss = reduce_rows(found[0], weights, "mean" if mean else "sum", torch.Size(found[0].shape))
        factor = torch.ones((), dtype=dtype, device=device) if unit is None else unit.clone()
        if mean:
            factor = factor / total_weight(weights, found[0])
    if labels is None:
        found[1], found[3] = found[1].new_empty(0), found[3].new_empty(0)
    hidden = None if made.hidden is None else selection.spread_rows(made.hidden)
    made = [or_empty(t, student.hidden, sides.accumulator) for t in (hidden, made.weight, made.bias)]
    return (loss, *found, *made, factor)


def _fake(*inputs: Any) -> tuple[Tensor, ...]:
    student, teacher, (labels, *_), (_, *rest) = split(inputs)
    setting = Setting(*rest)
    dtype, (n_rows, n_features) = statistics_dtype(student, teacher), student.hidden.shape
    new = student.hidden.new_empty
    label_rows = 0 if labels is None else n_rows
    found = [new(n, dtype=dtype) for n in (n_rows, label_rows, n_rows, label_rows, n_rows)]
    accumulator = torch.float64 if setting.result == torch.float64 else torch.float32
    shapes = ((n_rows, n_features), (setting.columns.width, n_features), (setting.columns.width,))
    made = [new(s if w else (0,), dtype=accumulator) for s, w in zip(shapes, setting.wanted, strict=True)]
    return (new((), dtype=dtype), *found, *made, new((), dtype=dtype))


linear_distillation = torch.library.custom_op(
    "caop_fast::linear_distillation",
    linear_distillation,
    mutates_args=(),
    schema=f"({Side.schema('student')}, {Side.schema('teacher')}, {ROWS_SCHEMA}, bool mean, {Setting.SCHEMA})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
linear_distillation.register_fake(_fake)
scaled_by_loss(linear_distillation, gradients=slice(6, 9), factor=9)
