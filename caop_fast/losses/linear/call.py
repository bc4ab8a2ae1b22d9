"""What the operators of the linear losses take, flattened for their schemas and put together again inside."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from caop_fast.losses.linear.blocks import Gradients, Sides, Wanted
from caop_fast.losses.linear.head import make_head
from caop_fast.losses.linear.selection import Selection
from caop_fast.losses.linear.shards import Layout
from caop_fast.losses.linear.sizes import block_ids, chunk_tokens
from caop_fast.losses.rows import Columns

# Gradients of logits, in units of what flows into their rows, seldom exceed a few hundred: p (log p - log q) / T.
FLOAT16_ROOM = 64.0


class Side(NamedTuple):
    """One model: hidden states [N, H] and what makes logits of them."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    operand: torch.dtype  # of the projection's GEMM

    @staticmethod
    def schema(name: str) -> str:
        return (
            f"Tensor {name}_hidden, Tensor {name}_weight, Tensor? {name}_bias, float {name}_scale, "
            f"float? {name}_softcap, ScalarType {name}_operand"
        )


class Setting(NamedTuple):
    """How the work is done; nothing here changes a result by more than rounding, but for ``result`` and ``vocab``."""

    result: torch.dtype  # of the logits
    vocab: int  # ids to compare
    chunk: int  # tokens (over tokens) or ids (over ids) at a time; 0 to choose by memory
    small: bool  # over ids all the way, in small blocks
    wanted: Sequence[bool]  # gradients of hidden states, weight, bias
    group: str | None  # of a sharded vocabulary
    rank: int
    sizes: Sequence[int]
    triton: bool
    validate: bool

    SCHEMA = (
        "ScalarType result, int vocab, int chunk, bool small, bool[] wanted, str? group, int rank, int[] sizes, "
        "bool triton, bool validate"
    )

    @property
    def statistics(self) -> torch.dtype:
        """The dtype of statistics made of such logits."""
        return torch.float64 if self.result == torch.float64 else torch.float32

    @property
    def layout(self) -> Layout | None:
        return None if self.group is None else Layout(self.group, self.rank, tuple(self.sizes))

    @property
    def columns(self) -> Columns:
        """The ids of this rank."""
        return Columns.whole(self.vocab) if self.layout is None else self.layout.columns

    def tokens_at_a_time(
        self, sides: int, device: torch.device, *, weight_gradient: bool, gathers: bool = False
    ) -> int:
        """The same on all ranks, however many ids each has, since they exchange something in every chunk.

        With ``gathers`` that is the logits, which a rank then holds twice more: as they came, and side by side.
        """
        width = max(self.sizes, default=self.vocab) + (2 * sum(self.sizes) if gathers else 0)
        return self.chunk or chunk_tokens(width, sides, self.result, device, weight_gradient=weight_gradient)

    def ids_at_a_time(self, n_rows: int, sides: int, device: torch.device) -> int:
        chunk = self.chunk if self.small else 0
        return chunk or block_ids(n_rows, sides, self.result, device, small=self.small)


def open_sides(student: Side, teacher: Side | None, selection: Selection, setting: Setting) -> Sides:
    """The rows that count, and both heads over the ids of this rank."""
    found: list[Any] = []
    for side in (student, teacher):
        if side is not None:
            head = make_head(side.weight, side.bias, side.scale, setting.columns.width, side.operand, setting.result)
            found += [selection.take(side.hidden.detach()), head]
    return Sides(*found)._replace(dead=selection.dead)


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """The products inside of an operator take the dtypes they were given."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def row_upstream(upstream: Tensor, side: Side, dead: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What flows into the rows of hidden W^T, [..., R], given what flows into those of the logits.

    float16 GEMM operands have their full precision above 6e-5 only, which probabilities times weights divided by a
    token count seldom reach: there the rows are brought to magnitudes up to FLOAT16_ROOM, and what was taken out is
    returned to be multiplied in at the end. Dead rows have no say in that, nor have infinite ones.
    """
    upstream = upstream * side.scale
    if dead is not None:
        upstream = upstream.masked_fill(dead, 0)
    if side.operand != torch.float16 or upstream.numel() == 0:
        return upstream, None
    largest = torch.where(upstream.isfinite(), upstream.abs(), 0.0).amax()
    unit = torch.where(largest > 0, largest / FLOAT16_ROOM, 1.0)
    return upstream / unit, unit


def row_flows(
    names: Sequence[str],
    flows: Sequence[Tensor | None],
    side: Side,
    dtype: torch.dtype,
    selection: Selection,
) -> tuple[dict[str, Tensor | None], Tensor | None]:
    """``row_upstream`` of what flows into several outputs [N] (one at least), by name, with one unit for all."""
    present = torch.stack([selection.take(flow).to(dtype) for flow in flows if flow is not None])
    scaled, unit = row_upstream(present, side, selection.dead)
    given = iter(scaled)
    return {n: None if flow is None else next(given) for n, flow in zip(names, flows, strict=True)}, unit


def finish_gradients(found: Gradients, side: Side, selection: Selection, setting: Setting) -> Gradients:
    """Summed over the ranks, for all rows and ids, in the dtypes of hidden states, weight and bias."""
    hidden = found.hidden
    if hidden is not None:
        hidden = hidden if setting.layout is None else setting.layout.add(hidden)
        hidden = selection.spread_rows(hidden.to(side.hidden.dtype))
    return Gradients(
        hidden, *(whole(part, like) for part, like in ((found.weight, side.weight), (found.bias, side.bias)))
    )


def fake_row_gradients(side: Side, setting: Setting, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What an operator returns as gradients of hidden states, weight and bias, without values."""
    return tuple(
        side.hidden.new_empty(like.shape, dtype=like.dtype) if w else side.hidden.new_empty(0, dtype=dtype)
        for like, w in zip(side[:3], setting.wanted, strict=True)
    )


def whole(part: Tensor | None, like: Tensor | None) -> Tensor | None:
    """A gradient of the first ids as one of all rows of ``like``, 0 in the others, in its dtype."""
    if part is None:
        return None
    if part.shape == like.shape:
        return part.to(like.dtype)
    out = part.new_zeros(like.shape, dtype=like.dtype)
    out[: part.shape[0]] = part
    return out


def or_empty(value: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Operators return tensors: an empty one stands for None."""
    return like.new_empty(0, dtype=dtype) if value is None else value


def wanted_of(setting: Setting) -> Wanted:
    return Wanted(*setting.wanted)


def remember(ctx: Any, inputs: Sequence[Any], extra: Sequence[Tensor]) -> None:
    """Save an operator's inputs, and some outputs, for the backward."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    ctx.rest = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.places = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
    ctx.save_for_backward(*tensors, *extra)


def recall(ctx: Any) -> tuple[list[Any], list[Tensor]]:
    """The inputs and the outputs that ``remember`` saved."""
    saved = list(ctx.saved_tensors)
    inputs = list(ctx.rest)
    for place, tensor in zip(ctx.places, saved, strict=False):
        inputs[place] = tensor
    return inputs, saved[len(ctx.places) :]
