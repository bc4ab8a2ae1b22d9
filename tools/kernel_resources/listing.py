"""What the compiler made of a kernel, read from machine code: registers, spills, loads, instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from tools.kernel_resources.variant import Variant


@dataclass(frozen=True)
class Resources:
    """What a compiled variant takes. Counts are per thread; spills in bytes (NVIDIA) or registers (AMD)."""

    registers: int
    spills: int
    instructions: int  # of the main loop's body without loops in it; of the whole kernel when it has no such loop
    pairs: int  # (student, teacher) pairs that one trip of the main loop takes; 0 without
    per_id: float  # of a loop in the main loop, which goes over the ids listed in a tile; 0 without
    ids_per_pair: float  # trips of that loop for each pair, as the variant says
    load_bits: tuple[int, ...]  # widths of the loop's loads from global memory, one entry per instruction
    synchronisations: int  # barriers, shuffles and shared-memory accesses in the loop

    @property
    def per_pair(self) -> float | None:
        """Instructions per (student, teacher) pair of the main loop, listed ids and all."""
        return round(self.instructions / self.pairs + self.ids_per_pair * self.per_id, 2) if self.pairs else None


def read_listing(compiled: Any, variant: Variant) -> Resources:
    """Registers, spills, loads and loop instructions of a compiled variant."""
    if "cubin" in compiled.asm:
        return _read_cubin(compiled.asm["cubin"], variant)
    return _read_amdgcn(compiled.asm["amdgcn"], variant)


# --- NVIDIA ---------------------------------------------------------------------------------------------------------

_SASS_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]+?)\s*;")
_SASS_BRANCH = re.compile(r"\bBRA\S*\s.*?(0x[0-9a-f]+)")
_SASS_LOAD = re.compile(r"\bLDG\.(\S+)")
_SASS_SYNC = re.compile(r"\b(BAR|SHFL|LDS|STS|ATOMS|WARPSYNC|REDUX)\b")


def _cuobjdump(flag: str, cubin: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), flag, str(cubin)], check=True, capture_output=True, text=True).stdout


def _read_cubin(cubin: bytes, variant: Variant) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _cuobjdump("-res-usage", path)))
        code = [(int(a, 16), text) for a, text in _SASS_LINE.findall(_cuobjdump("-sass", path))]
    code = [(address, text) for address, text in code if not re.search(r"\bNOP\b", text)]  # padding
    places = {address: i for i, (address, _) in enumerate(code)}
    loops = []
    for i, (address, text) in enumerate(code):
        branch = _SASS_BRANCH.search(text)
        if branch and int(branch[1], 16) < address:
            loops.append(range(places[int(branch[1], 16)], i + 1))
    return _summarise(
        [text for _, text in code],
        loops,
        variant,
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


def _read_amdgcn(listing: str, variant: Variant) -> Resources:
    body = listing.split(".section", 1)[0]
    lines = [line.split(";")[0].strip() for line in body.splitlines()]
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in lines:
        if line.endswith(":"):
            labels[line[:-1]] = len(code)
        elif line and not line.startswith("."):
            code.append(line)
    loops = []
    for i, text in enumerate(code):
        branch = re.match(r"s_c?branch\w*\s+(\S+)", text)
        if branch and labels.get(branch[1], i + 1) <= i:
            loops.append(range(labels[branch[1]], i + 1))
    spilled = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", listing)
    return _summarise(
        code,
        loops,
        variant,
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
    code: list[str], loops: list[range], variant: Variant, *, registers: int, spills: int, load: Any, synchronises: Any
) -> Resources:
    """The main loop is the one that moves the most bytes per trip (an unrolled loop leaves a shorter one behind)."""
    if not variant.pair_bytes:
        return Resources(registers, spills, len(code), 0, 0.0, 0.0, (), 0)
    main = max(loops, key=lambda loop: sum(load(code[i]) or 0 for i in loop), default=range(0))
    inner = [loop for loop in loops if loop.start > main.start and loop.stop < main.stop]
    body = [code[i] for i in main if not any(i in loop for loop in inner)]
    bits = tuple(width for text in body if (width := load(text)))
    if not bits:
        raise ValueError("found no loop that loads from global memory: the listing's form must have changed")
    if inner and not variant.ids_per_pair:
        raise ValueError("found a loop in the main loop: the variant has to say how often it runs")
    pairs = variant.pairs or sum(bits) // (8 * variant.pair_bytes)
    per_id = round(sum(map(len, inner)) / len(inner), 2) if inner else 0.0
    synchronisations = sum(synchronises(code[i]) for i in main)
    return Resources(registers, spills, len(body), pairs, per_id, variant.ids_per_pair, bits, synchronisations)
