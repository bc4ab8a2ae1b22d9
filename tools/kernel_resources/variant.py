"""A kernel variant: one specialisation, as the launcher would ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


@dataclass(frozen=True)
class Variant:
    """One specialisation of one kernel, as the launcher would ask for it."""

    name: str
    kernel: Any  # a triton JITFunction
    types: Mapping[str, str]  # argument -> Triton type, e.g. "*bf16"
    constants: Mapping[str, Any]  # constexpr arguments, and None for absent pointers
    divisible: tuple[str, ...]  # arguments known to divide by 16
    num_warps: Mapping[str, int]  # by Triton backend
    hip_constants: Mapping[str, Any] = field(default_factory=dict)  # what differs on AMD
    num_stages: int | None = None  # None: Triton's default
    pair_bytes: int = 0  # bytes one column (of both sides) takes in memory; 0 for kernels without a main loop
    pairs: int = 0  # columns per thread and trip of the main loop; 0: to be told from its loads
    ids_per_pair: float = 0.0  # trips of a loop over listed ids within the main loop, for each pair
    aligned: bool = False
    double: bool = False


def argument_types(kernel: Any, special: Mapping[str, str], *, double: bool) -> dict[str, str]:
    """Triton types of the run-time arguments; constexpr arguments are left out.

    `special` gives pointers by name; every other pointer is to the type of computation.
    """
    compute = "fp64" if double else "fp32"
    types = {}
    for parameter in kernel.params:
        name = parameter.name
        if parameter.is_constexpr:
            continue
        if name.endswith("_ptr"):
            types[name] = special.get(name, f"*{compute}")
        else:  # the launcher types a scalar by its annotation; the others are ints below 2^31
            types[name] = parameter.annotation_type or "i32"
    return types
