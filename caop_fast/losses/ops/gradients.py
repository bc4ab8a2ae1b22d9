"""What the operators on logits share: a gradient operator, its twin that writes over the logits, and autograd."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class GradientOperators(NamedTuple):
    """``caop_fast::<name>`` and ``caop_fast::<name>_``, from the same function."""

    fresh: Callable[..., Tensor]
    over: Callable[..., None]
    once: str


def gradient_operators(name: str, gradient: Callable[..., Tensor], *, once: str) -> GradientOperators:
    """Register ``gradient(logits, ..., *, inplace) -> Tensor`` [N, V] in the dtype of the logits as two operators.

    ``once`` is the message of the RuntimeError for a derivative of the gradient.
    """
    schema = torch.library.infer_schema(gradient, mutates_args=()).replace(", *, bool inplace", "")
    first = schema.split(",")[0].split()[-1]
    fresh = torch.library.custom_op(
        f"caop_fast::{name}", lambda *arguments: gradient(*arguments, inplace=False), mutates_args=(), schema=schema
    )
    fresh.register_fake(lambda logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format))

    def write(*arguments: Any) -> None:
        gradient(*arguments, inplace=True)

    over = torch.library.custom_op(
        f"caop_fast::{name}_",
        write,
        mutates_args=(first,),
        schema=schema.replace(f"(Tensor {first}", f"(Tensor(a0!) {first}").replace("-> Tensor", "-> ()"),
    )

    def twice(ctx: Any, *_: Any) -> None:
        raise RuntimeError(once)

    fresh.register_autograd(twice)
    return GradientOperators(fresh, over, once)


def differentiate(
    forward: Any,
    gradient: GradientOperators,
    *,
    logits: str,
    n_tensors: int,
    labels: int,
    saved: Sequence[int],
    flows: Sequence[int],
    logprob: int,
) -> None:
    """Give ``forward(logits, tensors..., scalars..., inplace, triton, validate)`` its derivative.

    The gradient takes the tensors, the outputs ``saved``, what flows into the outputs ``flows``, the scalars, triton.

    Args:
        forward: the operator; its outputs are a tuple of tensors.
        gradient: its gradient operators.
        logits: what the caller calls the logits.
        n_tensors: how many of its leading arguments are tensors or None, the logits among them.
        labels: which argument holds the labels; without labels the output ``logprob`` is empty.
        saved: outputs that the gradient needs.
        flows: differentiable outputs, in the order the gradient takes what flows into them.
        logprob: which output is the log-probability of the label.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *scalars, inplace, triton, _ = inputs[n_tensors:]
        ctx.save_for_backward(*inputs[:n_tensors], *(output[i] for i in saved))
        ctx.settings, ctx.inplace, ctx.consumed = (*scalars, triton), inplace, False
        ctx.labelled, ctx.n_inputs = inputs[labels] is not None, len(inputs)
        ctx.mark_non_differentiable(*(t for i, t in enumerate(output) if i not in flows))
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (ctx.n_inputs - 1)
        if ctx.consumed:
            raise RuntimeError(f"inplace=True: the first backward wrote its gradient over {logits}; use inplace=False")
        flowing = [upstream[i] if i != logprob or ctx.labelled else None for i in flows]
        if all(d is None for d in flowing):
            return None, *nothing
        arguments = (*ctx.saved_tensors, *flowing, *ctx.settings)
        if not ctx.inplace:
            return gradient.fresh(*arguments), *nothing
        if torch.is_grad_enabled():  # create_graph: the overwritten logits would pass as a constant
            raise RuntimeError(f"{gradient.once}, and inplace=True takes no create_graph=True")
        ctx.consumed = True
        gradient.over(*arguments)
        return arguments[0], *nothing

    forward.register_autograd(backward, setup_context=setup)
