"""Ahead-of-time compilation of recorded variants into a Triton cache, and what a cache's keys depend on."""

from __future__ import annotations

import functools
import hashlib
import importlib
import multiprocessing
import os
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from operator import attrgetter
from pathlib import Path
from unittest import mock

Variant = dict[str, str]  # module and name of a kernel, and Triton's serialized specialization


def identity() -> dict[str, str]:
    """What the keys of this Python's Triton depend on besides the kernels, and the suffix of compiled launchers."""
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler.compiler import make_backend
    from triton.runtime.cache import triton_key

    from tools.triton_cache.recording import TARGET

    return {
        "triton": triton.__version__,
        "compiler": hashlib.sha256(triton_key().encode()).hexdigest(),  # of its sources and of libtriton.so
        "assembler": str(make_backend(TARGET).hash()),
        "environment": str(sorted(get_cache_invalidating_env_vars().items())),
        "extensions": str(sysconfig.get_config_var("EXT_SUFFIX")),
    }


def compile_variants(variants: Sequence[Variant], cache: Path, processes: int) -> Iterator[tuple[Variant, str, float]]:
    """Compile into ``cache`` what it lacks: each variant with "found", "compiled" or an error, and its CPU seconds."""
    os.environ |= {"TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}  # read when Triton is imported
    with tempfile.TemporaryDirectory() as folder:
        if processes == 1:
            prepare(folder)
            yield from map(compile_one, variants)
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, context, prepare, (folder,)) as pool:
            yield from pool.map(compile_one, variants, chunksize=4)


@functools.cache
def prepare(folder: str) -> None:
    """This process can compile kernels and the C code that launches them, but load neither.

    The launchers are linked against libcuda.so.1, which comes with a GPU's driver; an empty library of that name in
    ``folder`` takes its place.
    """
    import triton
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import build

    from tools.triton_cache.keys import settle
    from tools.triton_cache.recording import Driver

    settle()
    triton.runtime.driver.set_active(Driver())
    build._load_module_from_path = lambda name, path: mock.Mock()
    triton.knobs.nvidia.libcuda_path = folder
    command = [os.environ.get("CC", "cc"), "-shared", "-x", "c", os.devnull, "-o", f"{folder}/{os.getpid()}"]
    try:
        subprocess.run([*command, "-Wl,-soname,libcuda.so.1"], check=True, capture_output=True)
        os.replace(f"{folder}/{os.getpid()}", f"{folder}/libcuda.so.1")
        triton.runtime.driver.active.utils = nvidia.CudaUtils()
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"no C compiler, so launchers are left to the machine with the GPU: {error}")
        nvidia.CudaLauncher = lambda src, metadata: None


def compile_one(variant: Variant) -> tuple[Variant, str, float]:
    import triton
    from triton.backends.nvidia import driver as nvidia

    outcomes = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: outcomes.append("found" if cache_hit else "compiled")
    start = cpu_seconds()
    try:
        kernel = attrgetter(variant["kernel"])(importlib.import_module(variant["module"]))
        while not hasattr(kernel, "preload"):  # within an autotuner or heuristics
            kernel = kernel.fn
        compiled = kernel.preload(variant["data"])
        nvidia.CudaLauncher(compiled.src, compiled.metadata)
    except Exception as error:
        outcomes.append(f"{type(error).__name__}: {error}")
    return variant, outcomes[-1], cpu_seconds() - start


def cpu_seconds() -> float:
    """Of this process and of those it waited for (ptxas, the C compiler)."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
