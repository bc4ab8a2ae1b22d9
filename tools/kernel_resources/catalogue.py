"""Every variant that the budget covers, by name; names are stable and index the recorded budget."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from tools.kernel_resources import calibration, rows, topk
from tools.kernel_resources.variant import Variant


def variants() -> Iterator[Variant]:
    """All variants of all kernels."""
    return chain(rows.variants(), topk.variants(), calibration.variants())


def find(name: str) -> Variant:
    """The variant of that name."""
    return next(v for v in variants() if v.name == name)
