"""``caop_fast::linear_confidence``: scores of confidence candidates from hidden states, and their gradient.

The backward makes the logits again, chunk of tokens by chunk of tokens: there is one such token per answer, so their
projection is a small part of a step, and every output stays differentiable. With a sharded vocabulary the logits of a
chunk are gathered on every rank.
"""

from typing import Any

import torch
from torch import Tensor

from caop_fast.losses.linear.blocks import Wanted, over_tokens
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
from caop_fast.losses.linear.selection import Selection
from caop_fast.losses.ops.confidence import (
    ONCE,
    SAVED_FIELDS,
    check_values,
    confidence_gradient,
    confidence_rows,
)
from caop_fast.losses.ops.recompute import recomputed_by
from caop_fast.losses.rows import take

N_SIDE = len(Side._fields)
SCHEMA = (
    f"{Side.schema('student')}, Tensor candidate_ids, Tensor candidate_values, Tensor target, Tensor? weights, "
    f"str kind, float outside_weight, float eps, float temperature, {Setting.SCHEMA}"
)
SIDES_AND_SCRATCH = 2  # the gradient of a chunk lies beside its logits


def confidence_forward(*inputs: Any) -> tuple[Tensor, ...]:
    """Loss, expected value, variance, outside mass, [N] each, and the saved_statistics."""
    student = Side(*inputs[:N_SIDE])
    ids, values, target, weights, kind, outside_weight, eps, temperature, *rest = inputs[N_SIDE:]
    setting = Setting(*rest)
    vocab, layout = setting.columns.total, setting.layout
    if setting.validate:
        check_values(student.hidden, ids, values, target, weights, vocab)
    selection = Selection.of(weights, student.hidden.shape[0])
    target, mask = selection.take(target), selection.mask(weights)
    device, dtype, work = student.hidden.device, values.dtype, setting.statistics
    values, target = values.to(work), target.to(work)
    settings = (kind, outside_weight, eps, temperature, student.softcap, vocab, setting.triton)
    with no_autocast(device):
        sides = open_sides(student, None, selection, setting)
        new = student.hidden.new_zeros
        found = [new(selection.count, dtype=dtype) for _ in range(4)]
        saved = new((SAVED_FIELDS, selection.count if setting.triton else 0), dtype=work)

        def visit(tokens: slice, s: Tensor, _: None, __: Tensor) -> None:
            logits = s if layout is None else layout.gather_columns(s)
            *seen, known = confidence_rows(logits, ids, values, target[tokens], take(mask, tokens), *settings, False)
            for column, value in zip(found, seen, strict=True):
                column[tokens] = value
            if setting.triton:
                saved[:, tokens] = known

        most = setting.tokens_at_a_time(SIDES_AND_SCRATCH, device, weight_gradient=False, gathers=True)
        over_tokens(sides, visit, most=most, wanted=Wanted(), narrow_gradient=False)
        spread = [selection.spread(column) for column in found]
        if setting.triton:
            saved = torch.stack([selection.spread(row) for row in saved])
    return (*spread, saved)


def _fake(*inputs: Any) -> tuple[Tensor, ...]:
    student, (_, values, *_), setting = Side(*inputs[:N_SIDE]), inputs[N_SIDE:], Setting(*inputs[N_SIDE + 8 :])
    new, n_rows = student.hidden.new_empty, student.hidden.shape[0]
    found = [new(n_rows, dtype=values.dtype) for _ in range(4)]
    return (*found, new((SAVED_FIELDS, n_rows if setting.triton else 0), dtype=setting.statistics))


def confidence_backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """grad_hidden, grad_weight, grad_bias in the dtypes of what they belong to; empty where not wanted.

    After the forward's inputs come its saved_statistics, and what flows into its four scores.
    """
    student = Side(*inputs[:N_SIDE])
    ids, values, target, weights, kind, outside_weight, eps, temperature, *rest = inputs[N_SIDE:]
    n_setting = len(Setting._fields)
    setting, (saved, *flows) = Setting(*rest[:n_setting]), rest[n_setting:]
    vocab, layout, wanted = setting.columns.total, setting.layout, wanted_of(setting)
    selection = Selection.of(weights, student.hidden.shape[0])
    target, mask = selection.take(target), selection.mask(weights)
    saved = saved if selection.live is None or not setting.triton else saved[:, selection.live]
    device, dtype, work = student.hidden.device, values.dtype, setting.statistics
    values, target = values.to(work), target.to(work)
    names = ("grad_loss", "grad_expected", "grad_variance", "grad_outside")
    flowing, unit = row_flows(names, flows, student, work, selection)
    settings = (kind, outside_weight, eps, temperature, student.softcap, vocab, setting.triton)
    with no_autocast(device):
        sides = open_sides(student, None, selection, setting)

        def visit(tokens: slice, s: Tensor, _: None, out: Tensor) -> Tensor:
            logits = s if layout is None else layout.gather_columns(s)
            some = [take(flow, tokens) for flow in flowing.values()]
            known = saved[:, tokens].contiguous() if setting.triton else saved
            gradient = confidence_gradient(
                logits, ids, values, target[tokens], take(mask, tokens), known, *some, *settings
            )
            return out.copy_(gradient if layout is None else setting.columns.of(gradient))

        most = setting.tokens_at_a_time(SIDES_AND_SCRATCH, device, weight_gradient=wanted.weight, gathers=True)
        made = over_tokens(sides, visit, most=most, wanted=wanted, narrow_gradient=setting.triton)
        if unit is not None:
            made = made._replace(**{k: v.mul_(unit) for k, v in made._asdict().items() if v is not None})
        made = finish_gradients(made, student, selection, setting)
    return tuple(or_empty(t, student.hidden, dtype) for t in made)


def _fake_backward(*inputs: Any) -> tuple[Tensor, ...]:
    student, setting = Side(*inputs[:N_SIDE]), Setting(*inputs[N_SIDE + 8 : N_SIDE + 8 + len(Setting._fields)])
    return fake_row_gradients(student, setting, inputs[N_SIDE + 1].dtype)


linear_confidence = torch.library.custom_op(
    "caop_fast::linear_confidence",
    confidence_forward,
    mutates_args=(),
    schema=f"({SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
linear_confidence.register_fake(_fake)
linear_confidence_backward = torch.library.custom_op(
    "caop_fast::linear_confidence_backward",
    confidence_backward,
    mutates_args=(),
    schema=f"({SCHEMA}, Tensor saved_statistics, Tensor? grad_loss, Tensor? grad_expected, Tensor? grad_variance, Tensor? grad_outside)"
    " -> (Tensor, Tensor, Tensor)",
)
linear_confidence_backward.register_fake(_fake_backward)
recomputed_by(linear_confidence, linear_confidence_backward, saved=(4,), flows=(0, 1, 2, 3), once=ONCE)
