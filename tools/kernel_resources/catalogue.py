"""Every variant that the budget covers, by name; names are stable and index the recorded budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from tools.kernel_resources import calibration, rows, topk
from tools.kernel_resources.variant import Variant


def variants() -> Iterator[Variant]:
    """All variants of all kernels."""
    return chain(rows.variants(), topk.variants(), calibration.variants())


def find(name: str) -> Variant:
    """The variant of that name."""
    return next(v for v in variants() if v.name == name)


def branches(variant: Variant) -> set[tuple[object, ...]]:
    """What a variant compiles of its kernel: compile-time choices, absent pointers, alignment, float64 or not."""
    kernel = variant.kernel.fn.__name__
    found: set[tuple[object, ...]] = {(kernel, "aligned", variant.aligned), (kernel, "float64", variant.double)}
    for name, value in variant.constants.items():
        if value is None or isinstance(value, (bool, str)):
            found.add((kernel, name, value))
    return found


def covering(always: Sequence[str] = ()) -> list[str]:
    """Names of few variants, ``always`` among them, that together have every branch of every kernel."""
    open_variants = {variant.name: branches(variant) for variant in variants()}
    chosen = list(always)
    missing = set().union(*open_variants.values()) - set().union(*(open_variants[name] for name in chosen))
    while missing:
        best = max(open_variants, key=lambda name: len(open_variants[name] & missing))  # the first of equals
        chosen.append(best)
        missing -= open_variants[best]
    return chosen
