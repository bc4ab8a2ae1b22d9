"""``caop_fast::linear_topk``: loss, statistics and gradients against a sparse teacher, from hidden states.

With a sharded vocabulary the logits of a chunk are gathered on every rank: the listed ids of a token may lie anywhere.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from caop_fast.losses import checks
from caop_fast.losses.linear.call import Setting, Side
from caop_fast.losses.linear.forward import FACTOR, GRADIENTS, OUTPUTS, fake_gradients, forward_gradients
from caop_fast.losses.linear.selection import Selection
from caop_fast.losses.ops.scale import scaled_by_loss
from caop_fast.losses.ops.topk import check_values, topk_gradient_, topk_rows
from caop_fast.losses.rows import take

N_SIDE = len(Side._fields)


def _dtype(student: Side, logprobs: Tensor) -> torch.dtype:
    return checks.statistics_dtype((*student[:3], logprobs))


def topk(*inputs: Any) -> tuple[Tensor, ...]:
    """Loss, the five statistics [N], gradients, factor: see ``forward_gradients``."""
    student = Side(*inputs[:N_SIDE])
    ids, logprobs, labels, weights, beta_rows, tail, beta, temperature, mean, *rest = inputs[N_SIDE:]
    setting = Setting(*rest)
    vocab, layout = setting.columns.total, setting.layout
    if setting.validate:
        check_values(ids, logprobs, labels, weights, beta_rows, vocab)
    selection = Selection.of(weights, student.hidden.shape[0])
    per_row = [selection.take(t) for t in (ids, logprobs, labels)] + [
        selection.mask(weights),
        selection.take(beta_rows),
    ]
    scalars = (tail, beta, temperature, student.softcap, vocab)

    def see(
        tokens: slice, s: Tensor, _: None, target: Tensor, flow: Tensor | None
    ) -> tuple[Sequence[Tensor], Tensor | None]:
        logits = s if layout is None else layout.gather_columns(s)
        some = [take(t, tokens) for t in per_row]
        *seen, saved_statistics = topk_rows(logits, *some, *scalars, False, setting.triton, False)
        if flow is None:
            return seen, None
        flow = flow.to(saved_statistics.dtype)
        topk_gradient_(logits, *some, saved_statistics, seen[2], flow, None, None, *scalars, setting.triton)
        gradient = logits if layout is None else setting.columns.of(logits)
        return seen, gradient if target is s else target.copy_(gradient)

    return forward_gradients(
        student, None, setting, selection, weights, see, mean=mean, labelled=labels is not None,
        dtype=_dtype(student, logprobs),
    )  # fmt: skip


def _fake(*inputs: Any) -> tuple[Tensor, ...]:
    student = Side(*inputs[:N_SIDE])
    _, logprobs, labels, _, _, _, _, _, _, *rest = inputs[N_SIDE:]
    return fake_gradients(student, Setting(*rest), labelled=labels is not None, dtype=_dtype(student, logprobs))


linear_topk = torch.library.custom_op(
    "caop_fast::linear_topk",
    topk,
    mutates_args=(),
    schema=f"({Side.schema('student')}, Tensor teacher_ids, Tensor teacher_logprobs, Tensor? labels, Tensor? weights, "
    f"Tensor? beta_rows, str tail, float beta, float temperature, bool mean, {Setting.SCHEMA}) -> {OUTPUTS}",
)
linear_topk.register_fake(_fake)
scaled_by_loss(linear_topk, gradients=GRADIENTS, factor=FACTOR)
