"""What the linear losses hand to their operators, and the checks of arguments that they share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from caop_fast.losses import checks
from caop_fast.losses.backends.resolve import get_backend, resolve_backend
from caop_fast.losses.linear.distributed import (
    ShardedBackend,
    VocabularyLayout,
    check_local,
    gather_dtensor,
    resolve_layout,
)
from caop_fast.losses.linear.lm_head import LMHead, ProjectedSide, projection_dtypes
from caop_fast.losses.options import ExecutionConfig


class NeedsGrad(NamedTuple):
    """Which of the student's tensors need a gradient."""

    hidden: bool
    weight: bool
    bias: bool


class LinearConfig(NamedTuple):
    """How a call runs; but for the ids that ``layout`` compares, nothing here changes a result beyond rounding."""

    layout: VocabularyLayout
    chunk_size: int | None
    """Tokens per chunk (with ``low_memory``, ids per block); None to choose by memory."""
    low_memory: bool
    """Go over the vocabulary in small blocks, in the forward pass as well."""
    needs_grad: NeedsGrad
    execution: ExecutionConfig

    def backend(self, dtype: torch.dtype) -> ShardedBackend:
        """What computes rows, with statistics in ``dtype``."""
        return ShardedBackend(get_backend(self.execution.backend), self.layout, dtype)


class PreparedCall(NamedTuple):
    """Checked arguments of a call."""

    sides: tuple[ProjectedSide, ...]  # hidden states flattened to [N, H]; all but the first detached
    lead: torch.Size
    dtype: torch.dtype  # of the statistics
    device: torch.device
    config: LinearConfig


def prepare(
    sides: dict[str, ProjectedSide],
    others: dict[str, Any],
    *,
    vocab_size: int | None,
    logits_dtype: torch.dtype | None,
    chunk_size: int | None,
    process_group: Any,
    backend: str,
    validate: bool | None,
    low_memory: bool = False,
) -> PreparedCall:
    """Check the arguments that all linear losses have, gather distributed heads, choose dtypes.

    Args:
        sides: the student and maybe the teacher, by what their arguments' names start with ("student_", or nothing).
        others: further arguments that may be tensors, by name.
    """
    sides = _checked_sides(sides, sharded=process_group is not None)
    tensors = {f"{prefix}{name}": t for prefix, side in sides.items() for name, t in named_tensors(side).items()}
    check_local({**{name: t for name, t in tensors.items() if name.endswith("hidden")}, **others})
    device = checks.one_device({**tensors, **others})
    dtype = checks.statistics_dtype(tensors.values())
    rows = {name: t.shape[0] for name, t in tensors.items() if name.endswith("weight") and t is not None}
    layout = resolve_layout(process_group, vocab_size, rows, device)
    result = check_logits_dtype(logits_dtype) or dtype
    student, *teacher = [_with_dtypes(side, result) for side in sides.values()]
    grad = torch.is_grad_enabled()
    config = LinearConfig(
        layout=layout,
        chunk_size=checks.positive_integer("chunk_size", chunk_size),
        low_memory=low_memory,
        needs_grad=NeedsGrad(*[grad and t is not None and t.requires_grad for t in named_tensors(student).values()]),
        execution=ExecutionConfig(resolve_backend(backend, device), checks.checks_values(validate, device)),
    )
    lead = next(iter(sides.values())).hidden.shape[:-1]
    return PreparedCall((student, *[_detached(side) for side in teacher]), lead, dtype, device, config)


def named_tensors(side: ProjectedSide) -> dict[str, Tensor | None]:
    """The tensors of a side, in the order of ``NeedsGrad``."""
    return {"hidden": side.hidden, "weight": side.head.weight, "bias": side.head.bias}


def statistics_dtype(*sides: ProjectedSide) -> torch.dtype:
    """float64 when a tensor of one of the sides is, else float32."""
    return checks.statistics_dtype(t for side in sides for t in named_tensors(side).values())


def _checked_sides(sides: dict[str, ProjectedSide], *, sharded: bool) -> dict[str, ProjectedSide]:
    """Sides whose tensors fit together, with distributed heads gathered; one that serves both is gathered once."""
    (first, student), *others = list(sides.items())
    checked = {first: _checked_side(first, student, sharded=sharded)}
    lead = student.hidden.shape[:-1]
    for prefix, side in others:
        if side.head.weight is student.head.weight:
            side = side._replace(head=side.head._replace(weight=checked[first].head.weight))
        checked[prefix] = _checked_side(prefix, side, sharded=sharded)
        if side.hidden.shape[:-1] != lead:
            raise ValueError(
                f"{prefix}hidden must have the leading shape of {first}hidden, "
                f"{tuple(lead)}, got {tuple(side.hidden.shape[:-1])}"
            )
    return checked


def _checked_side(prefix: str, side: ProjectedSide, *, sharded: bool) -> ProjectedSide:
    hidden, head = side
    checks.floating_tensor(f"{prefix}hidden", hidden, min_ndim=2)
    if hidden.shape[-1] == 0:
        raise ValueError(f"{prefix}hidden must have at least one feature, got shape {tuple(hidden.shape)}")
    checks.floating_tensor(f"{prefix}weight", head.weight, ndim=2)
    if head.weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{prefix}weight must be [V, {hidden.shape[-1]}] to fit {prefix}hidden {tuple(hidden.shape)}, "
            f"got {tuple(head.weight.shape)}"
        )
    bias = head.bias
    if bias is not None:
        checks.floating_tensor(f"{prefix}bias", bias, ndim=1)
        if bias.shape[0] != head.weight.shape[0]:
            raise ValueError(f"{prefix}bias must have shape ({head.weight.shape[0]},), got {tuple(bias.shape)}")
    weight = gather_dtensor(f"{prefix}weight", head.weight, sharded=sharded)
    if bias is not None:
        bias = gather_dtensor(f"{prefix}bias", bias, sharded=sharded)
    return ProjectedSide(hidden, LMHead(weight, bias, checks.finite(f"{prefix}scale", head.scale)))


def _with_dtypes(side: ProjectedSide, logits_dtype: torch.dtype) -> ProjectedSide:
    """The side with its hidden states flattened to [N, H], and the dtypes of its projection."""
    hidden = side.hidden.reshape(-1, side.hidden.shape[-1])
    operand, result = projection_dtypes(hidden, side.head.weight, logits_dtype)
    return ProjectedSide(hidden, side.head._replace(operand_dtype=operand, logits_dtype=result))


def _detached(side: ProjectedSide) -> ProjectedSide:
    hidden, head = side
    bias = None if head.bias is None else head.bias.detach()
    return ProjectedSide(hidden.detach(), head._replace(weight=head.weight.detach(), bias=bias))


def check_logits_dtype(logits_dtype: Any) -> torch.dtype | None:
    """A floating dtype, or None."""
    if logits_dtype is not None:
        if not isinstance(logits_dtype, torch.dtype):
            raise TypeError(f"logits_dtype must be a torch.dtype or None, got {type(logits_dtype).__name__}")
        if logits_dtype not in checks.FLOAT_DTYPES:
            raise ValueError(f"logits_dtype must be float32, bfloat16, float16 or float64, got {logits_dtype}")
    return logits_dtype


def check_reduction(reduction: str, function: str, instead: str) -> None:
    """ "mean" or "sum": gradients are computed in the forward pass, for one weighting of the rows."""
    if reduction == "none":
        raise ValueError(
            f"reduction='none' needs gradients per row, which {function} does not keep: use 'mean' or 'sum', or "
            f"{instead}, whose fields are differentiable per token"
        )
    checks.choice("reduction", reduction, ("mean", "sum"))
