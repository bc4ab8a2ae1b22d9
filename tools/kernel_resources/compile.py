"""Ahead-of-time compiles of kernel variants, in parallel. Needs no GPU.

Do not import this with TRITON_INTERPRET=1: interpreted kernels cannot be compiled.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from caop_kernels.launch import compiled_with
from tools.kernel_resources.catalogue import find
from tools.kernel_resources.listing import Resources, read_listing
from tools.kernel_resources.variant import Variant

TARGETS: Mapping[str, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def compile_variant(variant: Variant, target: GPUTarget, *, fp_fusion: bool = True) -> Any:
    """Compile one variant for one target; returns Triton's compiled kernel (`.asm` holds PTX, cubin or amdgcn).

    With the launchers' options, but for `fp_fusion`: False does without what they ask for.
    """
    kernel = variant.kernel
    constants = {**variant.constants, **(variant.hip_constants if target.backend == "hip" else {})}
    signature = {n: "constexpr" if n in constants else variant.types[n] for n in kernel.arg_names}
    attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in variant.divisible}
    source = ASTSource(kernel, signature, constants, attributes)
    options = compiled_with(variant.num_warps[target.backend], variant.num_stages)
    options["enable_fp_fusion"] = fp_fusion
    return triton.compile(source, target=target, options=options)


def measure(name: str, target: str, fp_fusion: bool = True) -> Resources:
    """Compile the variant of that name for one of `TARGETS` and read its resources."""
    variant = find(name)
    return read_listing(compile_variant(variant, TARGETS[target], fp_fusion=fp_fusion), variant)


def survey(names: Sequence[str], targets: Sequence[str], *, fp_fusion: bool = True) -> dict[str, dict[str, Resources]]:
    """{target: {variant: Resources}}, compiled in parallel by processes (the compiler holds the lock)."""
    jobs = [(name, target) for target in targets for name in names]
    workers = min(os.cpu_count() or 1, 8, len(jobs))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        run = functools.partial(measure, fp_fusion=fp_fusion)
        found = pool.map(run, *zip(*jobs, strict=True), chunksize=max(1, min(8, len(jobs) // (4 * workers))))
        table: dict[str, dict[str, Resources]] = {}
        for (name, target), figures in zip(jobs, found, strict=True):
            table.setdefault(target, {})[name] = figures
    return table
