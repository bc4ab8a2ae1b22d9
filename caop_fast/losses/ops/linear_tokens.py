"""``caop_fast::linear_tokens``: log-probability, entropy and lse of tokens from hidden states, and their gradient."""

from typing import Any

import torch
from torch import Tensor

from caop_fast.losses import checks
from caop_fast.losses.linear.blocks import Wanted, over_ids, over_tokens
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
from caop_fast.losses.linear.distill import Engine
from caop_fast.losses.linear.selection import Selection
from caop_fast.losses.ops.recompute import recomputed_by
from caop_fast.losses.ops.tokens import ONCE
from caop_fast.losses.rows import take

N_SIDE = len(Side._fields)
SCHEMA = f"{Side.schema('student')}, Tensor? labels, Tensor? weights, float temperature, {Setting.SCHEMA}"


def tokens_forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logprob (empty without labels), entropy, lse, [N] each, and the saved_statistics."""
    student = Side(*inputs[:N_SIDE])
    labels, weights, temperature, *rest = inputs[N_SIDE:]
    setting = Setting(*rest)
    if setting.validate:
        checks.check_labels(labels, setting.columns.total)
        checks.check_weights(weights)
    dtype = checks.statistics_dtype(student[:3])
    engine = Engine(dtype, setting.triton, setting.layout)
    selection = Selection.of(weights, student.hidden.shape[0])
    live_labels, mask = selection.take(labels), selection.mask(weights)
    device = student.hidden.device
    with no_autocast(device):
        sides = open_sides(student, None, selection, setting)
        new = student.hidden.new_zeros
        found = [new(selection.count, dtype=dtype) for _ in range(3)]
        saved_statistics = new((engine.token_fields, selection.count), dtype=dtype)

        def visit(tokens: slice, s: Tensor, _: None, __: Tensor) -> None:
            *seen, known = engine.token_statistics(
                s, take(live_labels, tokens), take(mask, tokens), temperature, student.softcap, setting.columns
            )
            for column, value in zip(found, seen, strict=True):
                if value is not None and value.numel():
                    column[tokens] = value
            saved_statistics[:, tokens] = known

        most = setting.tokens_at_a_time(1, device, weight_gradient=False)
        over_tokens(sides, visit, most=most, wanted=Wanted(), narrow_gradient=False)
        spread = [selection.spread(column) for column in found]
    if labels is None:
        spread[0] = spread[0].new_empty(0)
    return (*spread, torch.stack([selection.spread(row) for row in saved_statistics]))


def _fake(*inputs: Any) -> tuple[Tensor, ...]:
    student, (labels, _, _, *rest) = Side(*inputs[:N_SIDE]), inputs[N_SIDE:]
    dtype, n_rows = checks.statistics_dtype(student[:3]), student.hidden.shape[0]
    new = student.hidden.new_empty
    found = [new(n, dtype=dtype) for n in (0 if labels is None else n_rows, n_rows, n_rows)]
    fields = Engine(dtype, Setting(*rest).triton, None).token_fields
    return (*found, new((fields, n_rows), dtype=dtype))


def tokens_backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """grad_hidden, grad_weight, grad_bias in the dtypes of what they belong to; empty where not wanted.

    After the forward's inputs come its saved_statistics and entropy, and what flows into logprob, entropy and lse.
    """
    student = Side(*inputs[:N_SIDE])
    labels, weights, temperature, *rest = inputs[N_SIDE:]
    n_setting = len(Setting._fields)
    setting, (saved_statistics, entropy, *flows) = Setting(*rest[:n_setting]), rest[n_setting:]
    dtype, device = checks.statistics_dtype(student[:3]), student.hidden.device
    engine = Engine(dtype, setting.triton, setting.layout)
    selection = Selection.of(weights, student.hidden.shape[0])
    live_labels, mask = selection.take(labels), selection.mask(weights)
    if selection.live is not None:
        saved_statistics, entropy = saved_statistics[:, selection.live], entropy[selection.live]
    names = ("grad_logprob", "grad_entropy", "grad_lse")
    flowing, unit = row_flows(names, flows, student, dtype, selection)
    with no_autocast(device):
        sides = open_sides(student, None, selection, setting)

        def visit(ids: slice, s: Tensor, _: None, target: Tensor) -> Tensor:
            return engine.token_gradient(
                s, live_labels, mask, saved_statistics, entropy, temperature, student.softcap, setting.columns.within(ids),
                target, **flowing,
            )  # fmt: skip

        made = over_ids(
            sides, visit, most=setting.ids_at_a_time(selection.count, 1, device), wanted=wanted_of(setting),
            narrow_gradient=setting.triton, unit=unit, weight_like=student.weight, bias_like=student.bias,
        )  # fmt: skip
        made = finish_gradients(made, student, selection, setting)
    return tuple(or_empty(t, student.hidden, dtype) for t in made)


def _fake_backward(*inputs: Any) -> tuple[Tensor, ...]:
    student, rest = Side(*inputs[:N_SIDE]), inputs[N_SIDE + 3 :]
    setting = Setting(*rest[: len(Setting._fields)])
    return fake_row_gradients(student, setting, checks.statistics_dtype(student[:3]))


linear_tokens = torch.library.custom_op(
    "caop_fast::linear_tokens",
    tokens_forward,
    mutates_args=(),
    schema=f"({SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)
linear_tokens.register_fake(_fake)
linear_tokens_backward = torch.library.custom_op(
    "caop_fast::linear_tokens_backward",
    tokens_backward,
    mutates_args=(),
    schema=f"({SCHEMA}, Tensor saved_statistics, Tensor entropy, Tensor? grad_logprob, Tensor? grad_entropy, Tensor? grad_lse)"
    " -> (Tensor, Tensor, Tensor)",
)
linear_tokens_backward.register_fake(_fake_backward)
recomputed_by(linear_tokens, linear_tokens_backward, saved=(3, 1), flows=(0, 1, 2), labels=N_SIDE, logprob=0, once=ONCE)
