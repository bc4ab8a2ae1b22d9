"""Backward functions that may be differentiated no further, and say so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _End(torch.autograd.Function):
    """Identity on a gradient; going back through it is an error."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            "the distillation losses can be differentiated once: double backward through them is not supported"
        )


def first_derivative_only(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    """Run a backward without a graph; under ``create_graph=True`` a derivative of its result is a RuntimeError.

    (``torch.autograd.function.once_differentiable`` lets the result pass as a constant where the upstream gradient is
    one, so that a gradient penalty would vanish without a word.)
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *upstream)
        anchor = torch.zeros((), requires_grad=True)
        candidates = (*upstream, *ctx.saved_tensors)
        sources = [t for t in candidates if t is not None and t.requires_grad]
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        return tuple(None if g is None else _End.apply(g, anchor, *sources) for g in gradients)

    return wrapper
