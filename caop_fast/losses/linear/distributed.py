"""Heads over several ranks: a vocabulary cut by rows, and FSDP2's ``DTensor``s.

With a vocabulary cut by rows every rank holds the same tokens, consecutive rows of both heads, and makes the same calls
in the same order. Per token, 48 bytes of state are gathered and merged (``reference/states.py``), and grad_hidden is
summed over the ranks once.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from caop_fast.losses import checks
from caop_fast.losses.backends.base import Backend
from caop_fast.losses.batches import (
    Columns,
    DistillationBatch,
    DistillationGrads,
    DistillationRows,
    TokenBatch,
    TokenRows,
)
from caop_fast.losses.options import DivergenceOptions, TokenOptions
from caop_fast.losses.reference.states import empty_state

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
            raise TypeError(
                f"process_group must be a torch.distributed ProcessGroup, got {type(process_group).__name__}"
            )
        teacher_rows = student_rows if teacher_rows is None else teacher_rows
        _check_rows("student_rows", student_rows)
        _check_rows("teacher_rows", teacher_rows)
        if device is None and dist.get_backend(process_group) != "gloo":
            device = torch.accelerator.current_accelerator()
        own = torch.tensor([student_rows, teacher_rows], dtype=torch.int64, device=device)
        gathered = own.new_empty(dist.get_world_size(process_group), 2)
        _all_gather(gathered, own, process_group)
        student, teacher = gathered.t().tolist()
        _GROUPS[process_group.group_name] = process_group
        self.name: str = process_group.group_name
        self.rank = dist.get_rank(process_group)
        self.student_rows: tuple[int, ...] = tuple(student)
        self.teacher_rows: tuple[int, ...] = tuple(teacher)

    def layout(self, vocab_size: int | None, held: dict[str, int]) -> VocabularyLayout:
        """Which ids are compared where, given this rank's rows by argument, the student's head first."""
        sizes = dict(zip(held, (self.student_rows, self.teacher_rows), strict=False))
        for name, promised in sizes.items():
            if held[name] != promised[self.rank]:
                raise ValueError(
                    f"{name} has {held[name]} rows on rank {self.rank}, but process_group was told of "
                    f"{promised[self.rank]}"
                )
        return VocabularyLayout(self.name, self.rank, _compared_sizes(sizes, vocab_size))


class VocabularyLayout(NamedTuple):
    """The ids compared on each rank: ``sizes[r]`` of them on rank r, in order. Without a group, one rank has all."""

    group: str | None
    rank: int
    sizes: tuple[int, ...]

    @property
    def is_sharded(self) -> bool:
        return self.group is not None

    @property
    def columns(self) -> Columns:
        """Of this rank."""
        return Columns(sum(self.sizes[: self.rank]), self.sizes[self.rank], sum(self.sizes))

    def gather(self, values: Tensor) -> Tensor:
        """``values`` of all ranks, [R, ...], in their order."""
        if self.group is None:
            return values.unsqueeze(0)
        values = values.contiguous()
        out = values.new_empty(len(self.sizes), *values.shape)
        if values.numel():
            _all_gather(out, values, _GROUPS[self.group])
        return out

    def gather_columns(self, logits: Tensor) -> Tensor:
        """All columns [R, V] of logits of which each rank has its own."""
        if self.group is None:
            return logits
        n_rows, width = logits.shape[0], max(self.sizes)
        own = logits.new_zeros(n_rows, width)
        own[:, : logits.shape[1]] = logits
        return torch.cat([part[:, :size] for part, size in zip(self.gather(own), self.sizes, strict=True)], dim=1)

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over the ranks, in place."""
        if self.group is not None and values.numel():
            dist.all_reduce(values, group=_GROUPS[self.group])
        return values


class ShardedBackend(NamedTuple):
    """A backend's row computations where other ranks may hold some of the columns: states are merged over the ranks."""

    local: Backend  # computes this rank's columns
    layout: VocabularyLayout
    dtype: torch.dtype  # of the statistics

    def distillation_rows(self, batch: DistillationBatch, options: DivergenceOptions) -> DistillationRows:
        """Statistics of rows of which this rank has its columns."""
        if not self.layout.is_sharded:
            return self.local.distillation_rows(batch, options, self.layout.columns.total, self.dtype)
        state = self.state(batch, options, self.layout.columns)
        rows = self.finish([state], batch.labels, options)
        if not options.interior:
            return rows
        return self.finish_mixture(rows, [self.mixture_sums(batch, options, rows)], options)

    def distillation_rows_with_gradient(
        self, batch: DistillationBatch, options: DivergenceOptions, grad_divergence: Tensor | None, out: Tensor
    ) -> DistillationRows:
        """The same and, given ``grad_divergence`` [N], the gradient of this rank's columns in ``out``.

        The logits may be overwritten.
        """
        if not self.layout.is_sharded:
            return self.local.distillation_rows_with_gradient(batch, options, self.dtype, grad_divergence, out)
        rows = self.distillation_rows(batch, options)
        if grad_divergence is not None and out.shape[1] > 0:
            grads = DistillationGrads(grad_divergence)
            self.local.distillation_gradient(batch, options, self.layout.columns, rows.saved, grads, out)
        return rows

    def state(self, batch: DistillationBatch, options: DivergenceOptions, columns: Columns) -> Tensor:
        """The state [12, N] of some columns."""
        width = batch.student.shape[1]
        if width == 0:
            return empty_state(batch.student.shape[0], self.dtype, batch.student.device)
        local = batch._replace(labels=columns.local(batch.labels))
        return self.local.row_state(local, options, width, self.dtype)

    def finish(self, states: Sequence[Tensor], labels: Tensor | None, options: DivergenceOptions) -> DistillationRows:
        """Statistics from the states of this rank's columns, and those of the other ranks."""
        return self.local.finish_distillation(self._merged(states), labels, options)

    def _merged(self, states: Sequence[Tensor]) -> Tensor:
        merged = self.local.merge_states(torch.stack(list(states))) if len(states) > 1 else states[0]
        return self.local.merge_states(self.layout.gather(merged)) if self.layout.is_sharded else merged

    def mixture_sums(self, batch: DistillationBatch, options: DivergenceOptions, rows: DistillationRows) -> Tensor:
        """The sums [1, 2, N] of an interior divergence over some columns."""
        if batch.student.shape[1] == 0:
            return rows.saved_statistics.new_zeros(1, 2, batch.student.shape[0])
        sums = self.local.mixture_sums(batch.student, batch.teacher, options, rows.saved_statistics)
        return sums.sum(0, keepdim=True)

    def finish_mixture(
        self, rows: DistillationRows, sums: Sequence[Tensor], options: DivergenceOptions
    ) -> DistillationRows:
        """``rows`` with the divergence that follows from sums over this rank's columns, and the other ranks'."""
        total = torch.cat(list(sums))
        if self.layout.is_sharded:
            total = self.layout.gather(total.sum(0))
        return rows._replace(divergence=self.local.finish_mixture(total, rows.saved_statistics, options))

    def token_rows(self, batch: TokenBatch, options: TokenOptions) -> TokenRows:
        """Statistics of one model's rows of which this rank has its columns."""
        if not self.layout.is_sharded:
            dtype = checks.statistics_dtype((batch.logits,))
            return self.local.token_rows(batch, options, self.layout.columns.total, dtype)
        both = DistillationBatch(batch.logits, batch.logits, batch.labels, None)
        alike = DivergenceOptions(0.0, options.temperature, options.softcap, options.softcap)
        return self.local.finish_tokens(self._merged([self.state(both, alike, self.layout.columns)]), batch.labels)


def resolve_layout(
    process_group: Any, vocab_size: int | None, rows: dict[str, int], device: torch.device
) -> VocabularyLayout:
    """The layout that ``process_group`` stands for, given this rank's rows by argument."""
    if process_group is None:
        return VocabularyLayout(None, 0, (checks.vocabulary(vocab_size, **rows),))
    check_process_group(process_group)
    if not isinstance(process_group, VocabularyShards):
        process_group = _exchange_sizes(process_group, rows, device)
    return process_group.layout(vocab_size, rows)


@torch.compiler.disable(
    reason="process_group: a bare group exchanges sizes in every call, which cannot be traced; pass VocabularyShards"
)
def _exchange_sizes(group: dist.ProcessGroup, rows: dict[str, int], device: torch.device) -> VocabularyShards:
    sizes = list(rows.values())
    return VocabularyShards(group, sizes[0], sizes[1] if len(sizes) > 1 else None, device)


def check_process_group(process_group: Any) -> None:
    """A process group, VocabularyShards, or None."""
    if process_group is None or isinstance(process_group, VocabularyShards):
        return
    if not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        raise TypeError(
            "process_group must be a ProcessGroup (of a DeviceMesh: mesh.get_group()), VocabularyShards or None, "
            f"got {type(process_group).__name__}"
        )


def _compared_sizes(sizes: dict[str, tuple[int, ...]], vocab_size: int | None) -> tuple[int, ...]:
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
    compared = []
    for rows in sizes.values():
        starts = [sum(rows[:rank]) for rank in range(len(rows))]
        compared.append(tuple(max(0, min(n, vocab_size - start)) for n, start in zip(rows, starts, strict=True)))
    if len(set(compared)) > 1:
        raise ValueError(f"process_group needs both heads cut at the same ids, but {described}")
    return compared[0]


def _check_rows(name: str, rows: Any) -> None:
    """How many rows this rank holds: an integer >= 0."""
    if isinstance(rows, bool) or not isinstance(rows, Integral):
        raise TypeError(f"{name} must be an integer >= 0, got {type(rows).__name__}")
    if int(rows) < 0:
        raise ValueError(f"{name} must be an integer >= 0, got {rows}")


def _all_gather(out: Tensor, values: Tensor, group: dist.ProcessGroup) -> None:
    """``values`` [...] of all ranks into ``out`` [R, ...], both contiguous."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
    gather(out.view(-1), values.view(-1), group=group)  # gloo takes a single axis


def gather_dtensor(name: str, weight: Tensor, *, sharded: bool) -> Tensor:
    """A plain tensor of the whole of a ``DTensor``, as FSDP2 (``fully_shard``) leaves heads; others as they are.

    The ranks of its mesh hold different tokens, so their gradients are averaged over it, as FSDP2 averages those of its
    parameters: the full gradient of each rank is a partial sum that is reduced and scattered. (``full_tensor()`` alone
    takes it for a replica and keeps this rank's slice of this rank's gradient.) With ``sharded`` a ``process_group``
    shards the vocabulary, and a DTensor of another kind is an error.
    """
    if not dist.is_available():
        return weight
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    if not isinstance(weight, DTensor):
        return weight
    data_parallel = all(isinstance(p, (Shard, Replicate)) for p in weight.placements) and (
        sum(isinstance(p, Shard) for p in weight.placements) <= 1
    )
    if sharded or not data_parallel:
        placed = f"{tuple(weight.placements)} on a mesh of shape {tuple(weight.device_mesh.shape)}"
        raise ValueError(
            f"{name} is a DTensor placed {placed}: "
            + (
                f"with process_group pass this rank's rows of it, {name}.to_local()"
                if sharded
                else "only heads sharded once over data-parallel ranks (FSDP2) are gathered; for tensor parallelism "
                f"pass {name}.to_local() and process_group"
            )
        )
    mesh = weight.device_mesh
    full = weight.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if full.requires_grad and torch.is_grad_enabled():
        full.register_hook(lambda gradient: gradient / mesh.size())
    return full


def check_local(tensors: dict[str, Any]) -> None:
    """ValueError on a ``DTensor``: what belongs to tokens is this rank's own."""
    if not dist.is_available():
        return
    from torch.distributed.tensor import DTensor

    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            raise ValueError(
                f"{name} must be a plain tensor of this rank's tokens, got a DTensor placed "
                f"{tuple(tensor.placements)}: pass {name}.to_local(), or {name}.full_tensor() with process_group"
            )
