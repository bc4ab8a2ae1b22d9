"""``caop_fast::linear_distillation_rows``: per-token statistics from hidden states, differentiable in any mix.

The forward keeps nothing but a few numbers per token; the backward makes the logits again, block of ids by block of
ids, for whatever flows into the outputs. With ``small`` the forward goes over ids as well: 2 more projections for an
interior beta, whose mixture needs the partition sums of whole rows.
"""

from typing import Any

import torch
from torch import Tensor

from caop_fast.losses.linear.blocks import Sides, Wanted, over_ids, over_tokens
from caop_fast.losses.linear.call import (
    Setting,
    Side,
    fake_row_gradients,
    finish_gradients,
    no_autocast,
    open_sides,
    or_empty,
    row_flows,
    wanted_of,
)
from caop_fast.losses.linear.distill import FIELDS, Engine
from caop_fast.losses.linear.selection import Selection
from caop_fast.losses.ops.distillation import ONCE
from caop_fast.losses.ops.linear_distillation import ROWS_SCHEMA, check_rows, split, statistics_dtype
from caop_fast.losses.ops.recompute import recomputed_by
from caop_fast.losses.reference.divergence import Options
from caop_fast.losses.rows import Rows, take, take_options

SCHEMA = f"{Side.schema('student')}, {Side.schema('teacher')}, {ROWS_SCHEMA}, {Setting.SCHEMA}"
SAVED_FIELDS = 6


def rows_forward(*inputs: Any) -> tuple[Tensor, ...]:
    """The five statistics [N] (log-probabilities are empty without labels), and the saved_statistics [6, N]."""
    student, teacher, (labels, weights, beta_rows, beta, temperature), rest = split(inputs)
    setting = Setting(*rest)
    check_rows(labels, weights, beta_rows, setting)
    dtype, device = statistics_dtype(student, teacher), student.hidden.device
    selection = Selection.of(weights, student.hidden.shape[0])
    engine = Engine(dtype, setting.triton, setting.layout)
    beta = beta if beta_rows is None else selection.take(beta_rows)
    options = Options(beta, temperature, student.softcap, teacher.softcap)
    live_labels, mask = selection.take(labels), selection.mask(weights)
    with no_autocast(device):
        sides = open_sides(student, teacher, selection, setting)
        if setting.small:
            found = _statistics_over_ids(engine, sides, live_labels, options, setting)
            columns = [getattr(found, name) for name in FIELDS]
            saved_statistics = found.saved_statistics
        else:
            most = setting.tokens_at_a_time(2, device, weight_gradient=False)
            columns, saved_statistics = _statistics_over_tokens(
                engine, sides, live_labels, mask, options, setting, most
            )
        if labels is None:
            columns[1] = columns[3] = None
        spread = [student.hidden.new_empty(0, dtype=dtype) if c is None else selection.spread(c) for c in columns]
        return (*spread, torch.stack([selection.spread(row) for row in saved_statistics]))


def _statistics_over_tokens(
    engine: Engine,
    sides: Sides,
    labels: Tensor | None,
    mask: Tensor | None,
    options: Options,
    setting: Setting,
    most: int,
) -> tuple[list[Tensor | None], Tensor]:
    new = sides.student_hidden.new_zeros
    n_rows = sides.student_hidden.shape[0]
    found = [new(n_rows, dtype=engine.dtype) for _ in FIELDS]
    saved_statistics = new((SAVED_FIELDS, n_rows), dtype=engine.dtype)

    def visit(tokens: slice, s: Tensor, t: Tensor, _: Tensor) -> None:
        seen = engine.statistics(
            s, t, take(labels, tokens), take(mask, tokens), take_options(options, tokens), setting.columns
        )
        for name, column in zip(FIELDS, found, strict=True):
            if (value := getattr(seen, name)) is not None:
                column[tokens] = value
        saved_statistics[:, tokens] = seen.saved_statistics

    over_tokens(sides, visit, most=most, wanted=Wanted(), narrow_gradient=False)
    return found, saved_statistics


def _statistics_over_ids(
    engine: Engine, sides: Sides, labels: Tensor | None, options: Options, setting: Setting
) -> Rows:
    most = setting.ids_at_a_time(sides.student_hidden.shape[0], 2, sides.student_hidden.device)
    states: list[Tensor] = []

    def see(ids: slice, s: Tensor, t: Tensor, _: Tensor) -> None:
        states.append(engine.state(s, t, labels, options, setting.columns.within(ids)))

    over_ids(sides, see, most=most, wanted=Wanted(), narrow_gradient=False)
    nothing = sides.student_hidden.new_empty(sides.student_hidden.shape[0], 0)
    if not states:  # a rank without ids
        states.append(engine.state(nothing, nothing, labels, options, setting.columns))
    found = engine.finish(states, labels, options)
    if not options.interior:
        return found
    sums: list[Tensor] = []

    def mix(ids: slice, s: Tensor, t: Tensor, _: Tensor) -> None:
        sums.append(engine.mixture(s, t, options, found))

    over_ids(sides, mix, most=most, wanted=Wanted(), narrow_gradient=False)
    if not sums:
        sums.append(engine.mixture(nothing, nothing, options, found))
    return engine.finish_interior(found, sums, options)


def _fake(*inputs: Any) -> tuple[Tensor, ...]:
    student, teacher, (labels, *_), _ = split(inputs)
    dtype, n_rows = statistics_dtype(student, teacher), student.hidden.shape[0]
    new = student.hidden.new_empty
    label_rows = 0 if labels is None else n_rows
    found = [new(n, dtype=dtype) for n in (n_rows, label_rows, n_rows, label_rows, n_rows)]
    return (*found, new((SAVED_FIELDS, n_rows), dtype=dtype))


def rows_backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """grad_hidden [N, H], grad_weight, grad_bias, in the dtypes of what they belong to; empty where not wanted.

    After the forward's inputs come its saved_statistics and student_entropy, and what flows into divergence, student_logprob
    and student_entropy, [N] each or None.
    """
    student, teacher, (labels, weights, beta_rows, beta, temperature), rest = split(inputs)
    saved_statistics, entropy, *flows = rest[len(Setting._fields) :]
    setting = Setting(*rest[: len(Setting._fields)])
    wanted = wanted_of(setting)
    selection = Selection.of(weights, student.hidden.shape[0])
    engine = Engine(statistics_dtype(student, teacher), setting.triton, setting.layout)
    beta = beta if beta_rows is None else selection.take(beta_rows)
    options = Options(beta, temperature, student.softcap, teacher.softcap)
    live_labels, mask = selection.take(labels), selection.mask(weights)
    if selection.live is not None:
        saved_statistics, entropy = saved_statistics[:, selection.live], entropy[selection.live]
    names = ("grad_divergence", "grad_logprob", "grad_entropy")
    flows, unit = row_flows(names, flows, student, engine.dtype, selection)
    device = student.hidden.device
    with no_autocast(device):
        sides = open_sides(student, teacher, selection, setting)
        reads_teacher = flows["grad_divergence"] is not None
        if not reads_teacher:
            sides = sides._replace(teacher_hidden=None, teacher=None)

        def visit(ids: slice, s: Tensor, t: Tensor | None, target: Tensor) -> Tensor:
            return engine.gradient(
                s, s if t is None else t, live_labels, mask, options, setting.columns.within(ids), saved_statistics,
                entropy, target, **flows,
            )  # fmt: skip

        most = setting.ids_at_a_time(selection.count, 2 if reads_teacher else 1, device)
        made = over_ids(
            sides, visit, most=most, wanted=wanted, narrow_gradient=setting.triton, unit=unit,
            weight_like=student.weight, bias_like=student.bias,
        )  # fmt: skip
        made = finish_gradients(made, student, selection, setting)
    return tuple(or_empty(t, student.hidden, engine.dtype) for t in made)


def _fake_backward(*inputs: Any) -> tuple[Tensor, ...]:
    student, teacher, _, rest = split(inputs)
    return fake_row_gradients(student, Setting(*rest[: len(Setting._fields)]), statistics_dtype(student, teacher))


linear_distillation_rows = torch.library.custom_op(
    "caop_fast::linear_distillation_rows",
    rows_forward,
    mutates_args=(),
    schema=f"({SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
linear_distillation_rows.register_fake(_fake)
linear_distillation_rows_backward = torch.library.custom_op(
    "caop_fast::linear_distillation_rows_backward",
    rows_backward,
    mutates_args=(),
    schema=f"({SCHEMA}, Tensor saved_statistics, Tensor student_entropy, Tensor? grad_divergence, Tensor? grad_logprob, "
    "Tensor? grad_entropy) -> (Tensor, Tensor, Tensor)",
)
linear_distillation_rows_backward.register_fake(_fake_backward)
recomputed_by(
    linear_distillation_rows,
    linear_distillation_rows_backward,
    saved=(5, 2),
    flows=(0, 1, 2),
    labels=2 * len(Side._fields),
    logprob=1,
    once=ONCE,
)
