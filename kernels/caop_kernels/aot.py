"""Ahead-of-time compiles of every kernel variant, and what the compiler made of them. Needs no GPU.

For NVIDIA targets the machine code is read back with the cuobjdump that the Triton wheel carries; for AMD the listing
the compiler itself prints is read. `Resources` holds registers, spills, load widths and the instruction count of the
main loop, so a test can hold the kernels to a recorded budget and a reader can see the effect of a change.

Do not import this with TRITON_INTERPRET=1: interpreted kernels cannot be compiled.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from caop_kernels.launch import MERGE_ROWS, merge_warps, statistics_launch
from caop_kernels.row_stats import (
    STATISTICS,
    merge_statistics_kernel,
    row_statistics_kernel,
    statistics_flags,
)
from caop_kernels.state import STATE_FIELDS

TARGETS: Mapping[str, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

_ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


@dataclass(frozen=True)
class Variant:
    """One specialisation of one kernel, as the launcher would ask for it."""

    name: str
    kernel: Any  # a triton JITFunction
    types: Mapping[str, str]  # argument -> Triton type, e.g. "*bf16"
    constants: Mapping[str, Any]  # constexpr arguments, and None for absent pointers
    divisible: tuple[str, ...]  # arguments known to divide by 16
    num_warps: Mapping[str, int]  # by Triton backend
    num_stages: int | None = None  # None: Triton's default
    pair_bytes: int = 0  # bytes one (student, teacher) pair takes in memory; 0 for kernels without a main loop
    aligned: bool = False
    double: bool = False


@dataclass(frozen=True)
class Resources:
    """What a compiled variant takes. Counts are per thread; spills in bytes (NVIDIA) or registers (AMD)."""

    registers: int
    spills: int
    instructions: int  # of the main loop's body; of the whole kernel when it has no such loop
    pairs: int  # (student, teacher) pairs that one trip of the main loop takes; 0 without
    load_bits: tuple[int, ...]  # widths of the loop's loads from global memory, one entry per instruction
    synchronisations: int  # barriers, shuffles and shared-memory accesses in the loop

    @property
    def per_pair(self) -> float | None:
        """Instructions per (student, teacher) pair of the main loop."""
        return round(self.instructions / self.pairs, 2) if self.pairs else None


def variants() -> Iterator[Variant]:
    """Every specialisation that the budget covers; names are stable and index the recorded budget."""
    for dtype in ("bf16", "fp16", "fp32", "fp64"):
        for aligned in (True, False):
            for softcap in (False, True):
                yield _statistics_variant(dtype, dtype, aligned=aligned, softcap=softcap)
    for student, teacher in (("fp32", "bf16"), ("bf16", "fp32")):
        yield _statistics_variant(student, teacher, aligned=True)
    subsets = {
        "forward": ("forward_kl",),
        "reverse": ("reverse_kl",),
        "both-kl": ("forward_kl", "reverse_kl"),
        "entropies": ("student_entropy", "teacher_entropy"),
        "lse": ("student_lse", "teacher_lse"),
    }
    for name, asked in subsets.items():
        yield _statistics_variant("bf16", "bf16", aligned=True, asked=asked, suffix=f"-{name}")
    for dtype in ("bf16", "fp16", "fp32", "fp64"):
        for labels in (True, False):
            for softcap in (False, True) if labels else (False,):
                yield _merge_variant(dtype, labels=labels, softcap=softcap)


def _statistics_variant(
    student: str,
    teacher: str,
    *,
    aligned: bool,
    softcap: bool = False,
    asked: tuple[str, ...] = STATISTICS,
    suffix: str = "",
) -> Variant:
    double = "fp64" in (student, teacher)
    itemsize = min(_ITEMSIZE[student], _ITEMSIZE[teacher])
    launch = {
        b: statistics_launch(b, itemsize, aligned=aligned, softcap=softcap, double=double) for b in ("cuda", "hip")
    }
    dtypes = student if student == teacher else f"{student}+{teacher}"
    name = f"statistics-{dtypes}-{'aligned' if aligned else 'unaligned'}{'-softcap' if softcap else ''}{suffix}"
    divisible = ("student_ptr", "teacher_ptr", "states_ptr")
    if aligned:
        divisible += ("student_stride", "teacher_stride", "n_cols")
    return Variant(
        name=name,
        kernel=row_statistics_kernel,
        types=_types(row_statistics_kernel, student, teacher, double),
        constants={
            **launch["cuda"].constants(),
            **statistics_flags(asked),
            **_common_constants(softcap, double),
        },
        divisible=divisible,
        num_warps={b: config.num_warps for b, config in launch.items()},
        num_stages=launch["cuda"].num_stages,
        pair_bytes=_ITEMSIZE[student] + _ITEMSIZE[teacher],
        aligned=aligned,
        double=double,
    )


def _merge_variant(dtype: str, *, labels: bool, softcap: bool) -> Variant:
    double = dtype == "fp64"
    absent = {} if labels else dict.fromkeys(("labels_ptr", "student_logprob_ptr", "teacher_logprob_ptr"))
    types = _types(merge_statistics_kernel, dtype, dtype, double)
    pointers = tuple(n for n, t in types.items() if t.startswith("*") and n not in absent)
    return Variant(
        name=f"merge-{dtype}{'-labels' if labels else ''}{'-softcap' if softcap else ''}",
        kernel=merge_statistics_kernel,
        types=types,
        constants={"ROWS": MERGE_ROWS, **_common_constants(softcap, double), **absent},
        divisible=(*pointers, "student_stride", "teacher_stride", "n_cols"),
        num_warps={b: merge_warps(b) for b in ("cuda", "hip")},
        double=double,
    )


def _common_constants(softcap: bool, double: bool) -> dict[str, Any]:
    return {
        "SOFTCAP_S": softcap,
        "SOFTCAP_T": softcap,
        "COMPUTE": tl.float64 if double else tl.float32,
        "FIELDS": STATE_FIELDS,
    }


def _types(kernel: Any, student: str, teacher: str, double: bool) -> dict[str, str]:
    """Triton types of the run-time arguments; constexpr arguments are left out."""
    compute = "fp64" if double else "fp32"
    special = {"student_ptr": f"*{student}", "teacher_ptr": f"*{teacher}", "labels_ptr": "*i64"}
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


def compile_variant(variant: Variant, target: GPUTarget) -> Any:
    """Compile one variant for one target; returns Triton's compiled kernel (`.asm` holds PTX, cubin or amdgcn)."""
    kernel = variant.kernel
    signature = {n: "constexpr" if n in variant.constants else variant.types[n] for n in kernel.arg_names}
    attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in variant.divisible}
    source = ASTSource(kernel, signature, dict(variant.constants), attributes)
    options = {"num_warps": variant.num_warps[target.backend]}
    if variant.num_stages is not None:
        options["num_stages"] = variant.num_stages
    return triton.compile(source, target=target, options=options)


def resources(variant: Variant, compiled: Any) -> Resources:
    """Read registers, spills, loads and loop instructions out of a compiled variant."""
    if "cubin" in compiled.asm:
        return _read_cubin(compiled.asm["cubin"], variant.pair_bytes)
    return _read_amdgcn(compiled.asm["amdgcn"], variant.pair_bytes)


def measure(name: str, target: str) -> Resources:
    """Compile the variant of that name for one of `TARGETS` and read its resources."""
    variant = next(v for v in variants() if v.name == name)
    return resources(variant, compile_variant(variant, TARGETS[target]))


def survey(names: Sequence[str], targets: Sequence[str]) -> dict[str, dict[str, Resources]]:
    """{target: {variant: Resources}}, compiled in parallel by processes (the compiler holds the lock)."""
    jobs = [(name, target) for target in targets for name in names]
    workers = min(os.cpu_count() or 1, 8, len(jobs))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.map(measure, *zip(*jobs, strict=True), chunksize=max(1, min(8, len(jobs) // (4 * workers))))
        table: dict[str, dict[str, Resources]] = {}
        for (name, target), figures in zip(jobs, found, strict=True):
            table.setdefault(target, {})[name] = figures
    return table


# --- NVIDIA ---------------------------------------------------------------------------------------------------------

_SASS_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]+?)\s*;")
_SASS_BRANCH = re.compile(r"\bBRA\S*\s.*?(0x[0-9a-f]+)")
_SASS_LOAD = re.compile(r"\bLDG\.(\S+)")
_SASS_SYNC = re.compile(r"\b(BAR|SHFL|LDS|STS|ATOMS|WARPSYNC|REDUX)\b")


def _cuobjdump(flag: str, cubin: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), flag, str(cubin)], check=True, capture_output=True, text=True).stdout


def _read_cubin(cubin: bytes, pair_bytes: int) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _cuobjdump("-res-usage", path)))
        code = [(int(a, 16), text) for a, text in _SASS_LINE.findall(_cuobjdump("-sass", path))]
    loops = []
    for address, text in code:
        branch = _SASS_BRANCH.search(text)
        if branch and int(branch[1], 16) < address:
            loops.append([t for a, t in code if int(branch[1], 16) <= a <= address])
    whole = [text for _, text in code if not re.search(r"\bNOP\b", text)]  # padding
    return _summarise(
        whole,
        loops,
        pair_bytes,
        registers=int(usage["REG"]),
        spills=int(usage["STACK"]) + int(usage["LOCAL"]),
        load=_sass_bits,
        synchronises=lambda text: _SASS_SYNC.search(text) is not None,
    )


def _sass_bits(text: str) -> int | None:
    load = _SASS_LOAD.search(text)
    if load is None:
        return None
    width = re.search(r"(?:^|\.)[US]?(8|16|64|128|256)(?:\.|$)", load[1])
    return int(width[1]) if width else 32


# --- AMD ------------------------------------------------------------------------------------------------------------

_GCN_LOAD = re.compile(r"\b(?:global|buffer)_load_(u?short|u?byte|dword)(?:x(\d))?")
_GCN_SYNC = re.compile(r"\b(s_barrier|ds_\w+|\w+_dpp)\b")


def _read_amdgcn(listing: str, pair_bytes: int) -> Resources:
    body = listing.split(".section", 1)[0]
    lines = [line.split(";")[0].strip() for line in body.splitlines()]
    labels = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}

    def instructions(first: int, last: int) -> list[str]:
        return [t for t in lines[first : last + 1] if t and not t.endswith(":") and not t.startswith(".")]

    loops = []
    for i, text in enumerate(lines):
        branch = re.match(r"s_c?branch\w*\s+(\S+)", text)
        if branch and labels.get(branch[1], i) < i:
            loops.append(instructions(labels[branch[1]], i))
    spilled = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", listing)
    return _summarise(
        instructions(0, len(lines)),
        loops,
        pair_bytes,
        registers=int(re.findall(r"\.vgpr_count:\s*(\d+)", listing)[0]),
        spills=sum(map(int, spilled)),
        load=_gcn_bits,
        synchronises=lambda text: _GCN_SYNC.search(text) is not None,
    )


def _gcn_bits(text: str) -> int | None:
    load = _GCN_LOAD.search(text)
    if load is None:
        return None
    return {"dword": 32, "short": 16, "ushort": 16, "byte": 8, "ubyte": 8}[load[1]] * int(load[2] or 1)


# --- both -----------------------------------------------------------------------------------------------------------


def _summarise(
    whole: list[str], loops: list[list[str]], pair_bytes: int, *, registers: int, spills: int, load: Any,
    synchronises: Any,
) -> Resources:  # fmt: skip
    """The main loop is the one that moves the most bytes per trip (an unrolled loop leaves a shorter one behind)."""
    if not pair_bytes:
        return Resources(registers, spills, len(whole), 0, (), 0)
    body = max(loops, key=lambda loop: sum(load(text) or 0 for text in loop), default=[])
    bits = tuple(width for text in body if (width := load(text)))
    if not bits:
        raise ValueError("found no loop that loads from global memory: the listing's form must have changed")
    pairs = sum(bits) // (8 * pair_bytes)
    return Resources(registers, spills, len(body), pairs, bits, sum(map(synchronises, body)))
