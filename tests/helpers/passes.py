"""Counts of what PyTorch does to the elements of large tensors: a guard of time that needs no clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd.profiler_util import FunctionEvent

# Of no cost that grows with the tensor they are given, or counted by what they call.
FREE = frozenset(
    """
    _local_scalar_dense _to_copy alias as_strided chunk clone contiguous detach empty empty_like
    empty_strided expand expand_as flatten gather is_nonzero item lift_fresh narrow new_empty
    new_empty_strided new_zeros ones_like permute reshape reshape_as resize_ resolve_conj resolve_neg
    result_type select slice split squeeze squeeze_ t to transpose unbind unsqueeze view view_as zeros
    zeros_like
    """.split()  # noqa: SIM905 - one a line would be a page
)
PRODUCTS = frozenset(("addmm", "addmm_", "matmul", "mm", "linear"))


@dataclass(frozen=True)
class Passes:
    """Elementwise operations and reductions of a call.

    Attributes:
        by_name: elements of the largest operand, added up for every operation, by its name without a final ``_``.
        largest: most elements that one operation went through.
    """

    by_name: Counter[str]
    largest: int

    @property
    def total(self) -> int:
        return sum(self.by_name.values())


def passes(call: Callable[[], object]) -> Passes:
    """Of ``call``, on the CPU; matrix products and views are left out, and what a counted operation calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        call()
    found: Counter[str] = Counter()
    largest = 0
    for event in profile.events():
        if not _counts(event) or _inside_a_counted(event):
            continue
        elements = max((torch.Size(shape).numel() for shape in event.input_shapes if _is_shape(shape)), default=0)
        found[event.name.removeprefix("aten::").removesuffix("_")] += elements
        largest = max(largest, elements)
    return Passes(found, largest)


def _counts(event: FunctionEvent) -> bool:
    name = event.name.removeprefix("aten::")
    return event.name.startswith("aten::") and name not in FREE and name not in PRODUCTS


def _inside_a_counted(event: FunctionEvent) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if _counts(parent):
            return True
        parent = parent.cpu_parent
    return False


def _is_shape(shape: object) -> bool:
    """Not a list of shapes, as lists of tensors have."""
    return isinstance(shape, list) and all(isinstance(size, int) for size in shape)
