"""Launch configurations: the one table, by vendor and dtype, with the reason for each entry.

Nothing is autotuned unless `tuning.py` is switched on: the configuration follows from the device and the tensors alone,
so a row's bits do not depend on which kernel happened to win a race. Tiles are [groups, threads, vector]: each thread
owns `groups * vector` = 8 columns of a tile and its own online state, so the loop needs no shuffle and no barrier.

The architecture enters through the vendor's warp width only: 256 threads are 8 warps of 32 on NVIDIA (sm_80 to sm_120)
and 4 wavefronts of 64 on AMD CDNA (gfx942). The compiler schedules the same tile differently for each;
`python -m tools.kernel_resources` shows the result.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from caop_kernels.constants import LOG2E

# Columns per program, the same for every N, dtype and device: with a fixed split the order of additions in a row never
# depends on the batch. 16384 columns are 8 tiles: long enough to pay for the reduction at the end of the program, short
# enough that one row of V = 151936 already makes ten programs.
CHUNK = 16384
THREADS = 256
ELEMENTS = 8  # columns of a tile per thread: the cost of rebasing the running maxima is shared by eight pairs

# Rows per program of the merge kernel: one row per thread of four warps.
MERGE_ROWS = 128

# Widest load per thread is 16 bytes. The key is the byte size of the *smaller* dtype of the pair; the wider operand
# then takes two loads, which keeps both operands in one register layout (a conversion would cost a barrier).
_VECTOR_BY_ITEMSIZE = {
    2: 8,  # bfloat16, float16: one 128-bit load per operand and tile
    4: 4,  # float32: two 128-bit loads per operand and tile, 2 groups
    8: 2,  # float64: four; exists for gradcheck and for measuring errors, not for speed
}

# Threads of one warp by Triton backend. Anything unknown is taken as 32 wide, which is correct everywhere (a layout
# is legal for any number of warps) and at worst slow.
_WARP_WIDTH = {"cuda": 32, "hip": 64, "xpu": 32}


@dataclass(frozen=True)
class RowLaunch:
    """How to launch a kernel over chunks of rows: tile [groups, threads, vector], tiles per trip of the loop, warps."""

    groups: int
    threads: int
    vector: int
    unroll: int
    num_warps: int
    # 1: from global memory straight to registers. More stages would go through shared memory, with barriers.
    num_stages: int = 1

    def constants(self) -> dict[str, int]:
        """The constexpr arguments of such a kernel that this configuration fixes."""
        return {
            "CHUNK": CHUNK,
            "GROUPS": self.groups,
            "THREADS": self.threads,
            "VECTOR": self.vector,
            "UNROLL": self.unroll,
        }


def compiled_with(num_warps: int, num_stages: int | None = None) -> dict[str, int | bool]:
    """Compiler options of a launch: `num_stages` as given, or Triton's default, and floating-point fusion.

    Contracting a * b + c saves an instruction in five and a rounding; Triton up to 3.9 does so unless told otherwise,
    later ones do not. Nothing rests on it: where one rounding is needed, kernels say `tl.fma`.
    """
    stages = {} if num_stages is None else {"num_stages": num_stages}
    return {"num_warps": num_warps, **stages, "enable_fp_fusion": True}


def statistics_launch(
    backend: str, itemsize: int, *, aligned: bool, softcap: bool = False, double: bool = False
) -> RowLaunch:
    """The configuration for a Triton backend ("cuda", "hip", "xpu") and the byte size of the smaller logits dtype.

    Without alignment neighbouring threads take neighbouring columns (vector = 1): narrow loads, but coalesced ones.
    Two tiles per trip halve the loop's own instructions (1 in 25 per pair) and put twice the bytes in flight. Not with
    a softcap or in float64, where arithmetic outweighs the loop by far and the longer body only costs registers.
    """
    vector = _VECTOR_BY_ITEMSIZE[itemsize] if aligned else 1
    return RowLaunch(
        groups=ELEMENTS // vector,
        threads=THREADS,
        vector=vector,
        unroll=1 if softcap or double else 2,
        num_warps=THREADS // _WARP_WIDTH.get(backend, 32),
    )


def mixture_launch(backend: str, itemsize: int, *, aligned: bool, lean: bool) -> RowLaunch:
    """The configuration of the mixture's second read: the statistics kernel's tile, with two sums per thread only."""
    return gradient_launch(backend, itemsize, aligned=aligned, lean=lean)


def gradient_launch(backend: str, itemsize: int, *, aligned: bool, lean: bool) -> RowLaunch:
    """The configuration of the elementwise gradient kernel; `itemsize` is that of the smallest dtype it loads
    (the store of a narrower gradient is then narrower, too, and still whole sectors).

    The tile is the statistics kernel's. Nothing is carried from tile to tile, so one tile per trip keeps registers low
    and occupancy, which hides the latency here, high. `lean` variants take two to halve the loop's own instructions,
    but not without alignment, where sixteen addresses in flight took 128 registers.
    """
    vector = _VECTOR_BY_ITEMSIZE[itemsize] if aligned else 1
    return RowLaunch(
        groups=ELEMENTS // vector,
        threads=THREADS,
        vector=vector,
        unroll=2 if lean and aligned else 1,
        num_warps=THREADS // _WARP_WIDTH.get(backend, 32),
    )


def tail_launch(backend: str, itemsize: int, *, aligned: bool, softcap: bool, double: bool) -> RowLaunch:
    """The configuration of the tail's kernel: the statistics kernel's, but one warp to a program.

    Every thread goes over every listed id among the program's columns, at some 27 instructions each. With one warp a
    thread has eight times the columns to share them: k = 256 costs 1.5 instructions per column instead of 12. On what
    is no GPU (the interpreter), as wide as the others.
    """
    config = statistics_launch(backend, itemsize, aligned=aligned, softcap=softcap, double=double)
    if backend not in _WARP_WIDTH:
        return config
    return replace(config, threads=_WARP_WIDTH[backend], num_warps=1)


def merge_warps(backend: str) -> int:
    """Warps of a merge program, one thread per row."""
    return MERGE_ROWS // _WARP_WIDTH.get(backend, 32)


def is_aligned(*tensors: torch.Tensor) -> bool:
    """Whether every row of every 2-D tensor starts on 16 bytes in a way the compiler can know.

    Triton specialises a kernel on pointers divisible by 16 bytes and on strides divisible by 16 *elements*; anything
    less is compiled as if nothing were known and loads one element at a time.
    """
    return all(t.data_ptr() % 16 == 0 and t.stride(0) % 16 == 0 for t in tensors)


def backend_of(device: torch.device) -> str:
    """The Triton backend that serves a torch device: "hip" for ROCm, else the device's own name."""
    if device.type == "cuda" and torch.version.hip is not None:
        return "hip"
    return device.type


def fast_log2(backend: str, double: bool) -> bool:
    """Whether a kernel may use the approximate base-2 logarithm of NVIDIA's special-function unit (inline assembly)."""
    return backend == "cuda" and not double


def scaling(temperature: float, softcap: float | None) -> tuple[float, float]:
    """(scale, 1 / cap) that take raw logits to log2 units: z * scale, or tanh(z / cap) * scale with a softcap."""
    cap = 1.0 if softcap is None else softcap
    assert temperature > 0, temperature
    assert cap > 0, cap
    return LOG2E / temperature * cap, 1.0 / cap


def scalings(temperature: float, student_softcap: float | None, teacher_softcap: float | None) -> dict[str, float]:
    """The same for both sides, as arguments of kernels."""
    scale_s, inverse_cap_s = scaling(temperature, student_softcap)
    scale_t, inverse_cap_t = scaling(temperature, teacher_softcap)
    return {
        "scale_s": scale_s,
        "scale_t": scale_t,
        "inverse_cap_s": inverse_cap_s,
        "inverse_cap_t": inverse_cap_t,
    }


def compute_type(dtype: torch.dtype) -> Any:
    """The Triton type of a kernel's arithmetic, for statistics of `dtype`."""
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device; this makes it the tensors' own."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    if device.type == "xpu":
        return torch.xpu.device(device)
    return nullcontext()
