"""A vocabulary cut by rows over a process group: who holds which ids, and what the ranks tell each other.

Every rank holds the same tokens, rows [first, first + width) of both heads, and makes the same calls in the same order.
Per token, 48 bytes of state are gathered, and grad_hidden is summed over the ranks once; see ``reference/states.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from caop_fast.losses import checks
from caop_fast.losses.rows import Columns

# Operators take strings, so groups are kept here by name; a program has few.
_GROUPS: dict[str, dist.ProcessGroup] = {}


class VocabularyShards:
    """How the rows of the heads are cut over the ranks of a process group; made once, passed as ``process_group``.

    Making it is a collective call: the ranks tell each other how many rows they hold, which the host waits for. A bare
    process group works as well, at the price of that exchange in every call, which ``torch.compile`` cannot trace.

    Args:
        process_group: its ranks hold consecutive ids, in the order of their ranks in the group.
        student_rows: rows of the student's head on this rank; 0 is allowed.
        teacher_rows: rows of the teacher's head; None where there is none, or for as many.
        device: where the exchange takes place; None for the CPU under gloo and the current accelerator otherwise.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup,
        student_rows: int,
        teacher_rows: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        if not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(f"process_group must be a torch.distributed ProcessGroup, got {_name(process_group)}")
        teacher_rows = student_rows if teacher_rows is None else teacher_rows
        _check_rows("student_rows", student_rows)
        _check_rows("teacher_rows", teacher_rows)
        if device is None and dist.get_backend(process_group) != "gloo":
            device = torch.accelerator.current_accelerator()
        told = torch.tensor([student_rows, teacher_rows], dtype=torch.int64, device=device)
        everyone = told.new_empty(dist.get_world_size(process_group), 2)
        _all_gather(everyone, told, process_group)
        columns = everyone.t().tolist()
        self.name = register(process_group)
        self.rank = dist.get_rank(process_group)
        self.student_rows, self.teacher_rows = (tuple(rows) for rows in columns)

    def layout(self, vocab_size: int | None, held: dict[str, int]) -> Layout:
        """Who compares which ids, given the rows of this rank by argument (student's head first) and ``vocab_size``."""
        sizes = dict(zip(held, (self.student_rows, self.teacher_rows), strict=False))
        for name, rows in sizes.items():
            if held[name] != rows[self.rank]:
                raise ValueError(
                    f"{name} has {held[name]} rows on rank {self.rank}, but process_group was told of {rows[self.rank]}"
                )
        return Layout(self.name, self.rank, shared_sizes(sizes, vocab_size))


class Layout(NamedTuple):
    """The ids compared on each rank: ``sizes[r]`` of them on rank r, in order."""

    group: str
    rank: int
    sizes: tuple[int, ...]

    @property
    def columns(self) -> Columns:
        """Of this rank."""
        return Columns(sum(self.sizes[: self.rank]), self.sizes[self.rank], sum(self.sizes))

    def gather(self, values: Tensor) -> Tensor:
        """``values`` of all ranks, [R, ...], in their order."""
        values = values.contiguous()
        out = values.new_empty(len(self.sizes), *values.shape)
        if values.numel():
            _all_gather(out, values, _GROUPS[self.group])
        return out

    def gather_columns(self, logits: Tensor) -> Tensor:
        """All columns [R, V] of logits of which each rank has its own."""
        n_rows, width = logits.shape[0], max(self.sizes)
        mine = logits.new_zeros(n_rows, width)
        mine[:, : logits.shape[1]] = logits
        return torch.cat([part[:, :size] for part, size in zip(self.gather(mine), self.sizes, strict=True)], dim=1)

    def add(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over the ranks, in place."""
        if values.numel():
            dist.all_reduce(values, group=_GROUPS[self.group])
        return values


def resolve_layout(
    process_group: Any, vocab_size: int | None, held: dict[str, int], device: torch.device
) -> Layout | None:
    """The layout that the argument ``process_group`` stands for, given the rows held by argument; None without one."""
    if process_group is None:
        return None
    check_process_group(process_group)
    if not isinstance(process_group, VocabularyShards):
        process_group = _exchanged(process_group, held, device)
    return process_group.layout(vocab_size, held)


@torch.compiler.disable(
    reason="process_group: a bare group exchanges sizes in every call, which cannot be traced; pass VocabularyShards"
)
def _exchanged(group: dist.ProcessGroup, held: dict[str, int], device: torch.device) -> VocabularyShards:
    return VocabularyShards(group, *held.values(), device=device)


def check_process_group(process_group: Any) -> None:
    """A process group, VocabularyShards, or None."""
    if process_group is None or isinstance(process_group, VocabularyShards):
        return
    if not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        raise TypeError(
            "process_group must be a ProcessGroup (of a DeviceMesh: mesh.get_group()), VocabularyShards or None, "
            f"got {type(process_group).__name__}"
        )


def shared_sizes(sizes: dict[str, Sequence[int]], vocab_size: int | None) -> tuple[int, ...]:
    """How many ids each rank compares, given the rows it holds of each head, by argument name."""
    vocab_size = checks.positive_integer("vocab_size", vocab_size)
    totals = {name: sum(rows) for name, rows in sizes.items()}
    smallest = min(totals.values())
    described = ", ".join(f"{name} has {list(rows)}" for name, rows in sizes.items())
    if smallest < 1:
        raise ValueError(f"the vocabulary must not be empty, got {described}")
    if vocab_size is None:
        if len(set(totals.values())) > 1:
            raise ValueError(
                f"vocabulary sizes differ over the ranks ({described}); pass vocab_size={smallest} (or fewer) to "
                "compare only the first ids, which both sides share, and of a whole head only this rank's rows"
            )
        vocab_size = smallest
    if not 1 <= vocab_size <= smallest:
        raise ValueError(f"vocab_size must be in [1, {smallest}] ({described}), got {vocab_size}")
    cut = []
    for rows in sizes.values():
        starts = [sum(rows[:rank]) for rank in range(len(rows))]
        cut.append(tuple(max(0, min(n, vocab_size - start)) for n, start in zip(rows, starts, strict=True)))
    if len(set(cut)) > 1:
        raise ValueError(f"process_group needs both heads cut at the same ids, but {described}")
    return cut[0]


def _check_rows(name: str, rows: Any) -> None:
    """How many rows this rank holds: an integer >= 0."""
    if isinstance(rows, bool) or not isinstance(rows, Integral):
        raise TypeError(f"{name} must be an integer >= 0, got {type(rows).__name__}")
    if rows < 0:
        raise ValueError(f"{name} must be an integer >= 0, got {rows}")


def _all_gather(out: Tensor, values: Tensor, group: dist.ProcessGroup) -> None:
    """``values`` [...] of all ranks into ``out`` [R, ...], both contiguous."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
    gather(out.view(-1), values.view(-1), group=group)  # gloo takes a single axis


def register(group: dist.ProcessGroup) -> str:
    """Keep a group so that operators can find it by its name."""
    _GROUPS[group.group_name] = group
    return group.group_name


def _name(value: Any) -> str:
    return type(value).__name__
