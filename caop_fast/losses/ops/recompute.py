"""Autograd for operators whose backward makes the logits again."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from caop_fast.losses.linear.call import recall, remember


def recomputed_by(
    forward: Any,
    backward_operator: Any,
    *,
    saved: Sequence[int],
    flows: Sequence[int],
    labels: int | None = None,
    logprob: int | None = None,
    once: str,
) -> None:
    """Give ``forward(hidden, weight, bias, ...)`` the derivative that ``backward_operator`` makes.

    The latter takes the forward's inputs, its outputs ``saved``, and what flows into its outputs ``flows``; it returns
    gradients of the first three inputs, empty where they were not wanted.

    Args:
        labels: which input holds labels; without them nothing flows into the output ``logprob``.
        once: the message for a derivative of the gradients.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        remember(ctx, inputs, [output[i] for i in saved])
        ctx.labelled = labels is None or inputs[labels] is not None
        ctx.mark_non_differentiable(*(t for i, t in enumerate(output) if i not in flows))
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, outputs = recall(ctx)
        flowing = [upstream[i] if i != logprob or ctx.labelled else None for i in flows]
        if all(flow is None for flow in flowing):
            return (None,) * len(inputs)
        made = backward_operator(*inputs, *outputs, *flowing)
        first = [t if needed else None for t, needed in zip(made, ctx.needs_input_grad, strict=False)]
        return *first, *(None,) * (len(inputs) - 3)

    def twice(ctx: Any, *_: Any) -> None:
        raise RuntimeError(once)

    forward.register_autograd(backward, setup_context=setup)
    backward_operator.register_autograd(twice)
