"""``caop_fast::scaled_gradient``: a gradient made in the forward, times what flows into the loss."""

from typing import Any

import torch
from torch import Tensor

from caop_fast.losses.linear.sizes import pieces
from caop_fast.losses.ops.distillation import ONCE

ROUNDED_ELEMENTS = 1 << 22  # on a CPU; elsewhere nothing lies between


def _rows_at_a_time(total: Tensor, dtype: torch.dtype) -> int:
    if total.device.type != "cpu" or dtype == total.dtype:
        return max(1, total.shape[0])
    return max(1, ROUNDED_ELEMENTS // max(1, total[:1].numel()))


@torch.library.custom_op("caop_fast::scaled_gradient", mutates_args=())
def scaled_gradient(total: Tensor, factor: Tensor, dtype: torch.dtype, height: int, anchor: Tensor | None) -> Tensor:
    """``total * factor`` rounded once to ``dtype``, in a new tensor of ``height`` rows, 0 beyond those of ``total``.

    ``anchor`` is any tensor that requires grad: with it, a derivative of the result is an error.
    """
    out = total.new_empty((height, *total.shape[1:]), dtype=dtype)
    out[total.shape[0] :] = 0
    for rows in pieces(total.shape[0], _rows_at_a_time(total, dtype)):
        torch.mul(total[rows], factor, out=out[rows])  # a CPU makes the product in the dtype of ``total`` first
    return out


@scaled_gradient.register_fake
def _(total: Tensor, factor: Tensor, dtype: torch.dtype, height: int, anchor: Tensor | None) -> Tensor:
    return total.new_empty((height, *total.shape[1:]), dtype=dtype)


def _twice(ctx: object, *_: object) -> None:
    raise RuntimeError(ONCE)


scaled_gradient.register_autograd(_twice)


def scaled_by_loss(operator: Any, *, gradients: slice, factor: int) -> None:
    """Give an operator of hidden states, weight and bias (its first arguments) the derivative of its first output.

    Its outputs ``gradients`` are those of hidden states, weight and bias, empty where not wanted; its output ``factor``
    is a scalar that belongs to them.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*output[gradients], output[factor])
        ctx.like = [None if t is None else (t.dtype, t.shape[0]) for t in inputs[:3]]
        ctx.n_inputs = len(inputs)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (ctx.n_inputs - 3)
        if grad_loss is None:
            return None, None, None, *nothing
        *made, scale = ctx.saved_tensors
        # Under create_graph=True going on from these gradients must be an error, not a derivative of 0.
        anchor = torch.zeros((), requires_grad=True) if torch.is_grad_enabled() else None
        scale = grad_loss * scale
        found = [
            scaled_gradient(total, scale, *like, anchor) if needed else None
            for total, like, needed in zip(made, ctx.like, ctx.needs_input_grad, strict=False)
        ]
        return *found, *nothing

    operator.register_autograd(backward, setup_context=setup)
