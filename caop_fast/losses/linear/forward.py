"""Losses whose weights per row are known: their gradients are made in the forward, chunk of tokens by chunk of tokens.

4 units of GEMM work for two models (two projections, grad_hidden, grad_weight) where recomputing in the backward takes 6.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from caop_fast.losses.distillation import reduce_rows, total_weight
from caop_fast.losses.linear.blocks import over_tokens
from caop_fast.losses.linear.call import Setting, Side, no_autocast, open_sides, or_empty, row_upstream, wanted_of
from caop_fast.losses.linear.selection import Selection
from caop_fast.losses.rows import take

# see(tokens, student's logits, teacher's, where the gradient may go, what flows into the tokens' divergence or None)
#   -> statistics of the tokens, and the gradient of the student's logits
See = Callable[
    [slice, Tensor, "Tensor | None", Tensor, "Tensor | None"], tuple[Sequence["Tensor | None"], "Tensor | None"]
]
# Of the operators made of this: loss, five statistics, grad_hidden, grad_weight, grad_bias, factor.
OUTPUTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
GRADIENTS, FACTOR = slice(6, 9), 9
LABELLED = (1, 3)  # statistics that are empty without labels


def forward_gradients(
    student: Side,
    teacher: Side | None,
    setting: Setting,
    selection: Selection,
    weights: Tensor | None,
    see: See,
    *,
    mean: bool,
    labelled: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Loss, statistics [N], gradients of sum(w D), and the factor that makes them those of the loss.

    Gradients are in the dtype of accumulation, grad_weight and grad_bias of this rank's ids; empty where not wanted. Rows of
    the first statistic, the divergence, are what the loss adds up.
    """
    device, wanted = student.hidden.device, wanted_of(setting)
    with no_autocast(device):
        sides = open_sides(student, teacher, selection, setting)
        flow = unit = None
        if any(wanted):
            live_weights = selection.take(weights)
            ones = student.hidden.new_ones(selection.count, dtype=dtype)
            flow, unit = row_upstream(ones if live_weights is None else live_weights, student, selection.dead)
        found = [student.hidden.new_zeros(selection.count, dtype=dtype) for _ in range(5)]

        def visit(tokens: slice, s: Tensor, t: Tensor | None, target: Tensor) -> Tensor | None:
            seen, gradient = see(tokens, s, t, target, take(flow, tokens))
            for column, value in zip(found, seen, strict=True):
                if value is not None and value.numel():
                    column[tokens] = value.view(-1)
            return gradient

        alone = teacher is None  # a sparse teacher: its ids may be anybody's
        most = setting.tokens_at_a_time(1 if alone else 2, device, weight_gradient=wanted.weight, gathers=alone)
        made = over_tokens(sides, visit, most=most, wanted=wanted, narrow_gradient=setting.triton)
        if wanted.hidden and setting.layout is not None:
            setting.layout.add(made.hidden)
        found = [selection.spread(column) for column in found]
        loss = reduce_rows(found[0], weights, "mean" if mean else "sum", torch.Size(found[0].shape))
        factor = torch.ones((), dtype=dtype, device=device) if unit is None else unit.clone()
        if mean:
            factor = factor / total_weight(weights, found[0])
    if not labelled:
        for i in LABELLED:
            found[i] = found[i].new_empty(0)
    hidden = None if made.hidden is None else selection.spread_rows(made.hidden)
    gradients = [or_empty(t, student.hidden, sides.accumulator) for t in (hidden, made.weight, made.bias)]
    return (loss, *found, *gradients, factor)


def fake_gradients(student: Side, setting: Setting, *, labelled: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What ``forward_gradients`` returns, without values."""
    n_rows, n_features = student.hidden.shape
    new: Any = student.hidden.new_empty
    found = [new(n_rows if labelled or i not in LABELLED else 0, dtype=dtype) for i in range(5)]
    shapes = ((n_rows, n_features), (setting.columns.width, n_features), (setting.columns.width,))
    made = [new(s if w else (0,), dtype=setting.statistics) for s, w in zip(shapes, setting.wanted, strict=True)]
    return (new((), dtype=dtype), *found, *made, new((), dtype=dtype))
