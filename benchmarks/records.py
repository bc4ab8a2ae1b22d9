"""The results of a benchmark run: one JSON file with a header and a list of records, written atomically.

A file is ``results/<date>-<device>.json``. The header describes the hardware and software; a record is one
implementation on one case. What could not be measured is a record too, with its ``status`` and ``reason``, so that
every empty cell of a table is explained.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch

FORMAT = 1
RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
# ok: measured. skipped: not installed, or does not support the case. oom: out of memory. wrong: loss or gradient too
# far from float64, so not timed. error: raised an exception. crashed: the process died or the device stopped working.
Status = Literal["ok", "skipped", "oom", "wrong", "error", "crashed"]
OURS = "caop_fast"  # the implementation that the others are compared with; its variants begin with that
PACKAGES = ("torch", "triton", "transformers", "numpy", "liger-kernel", "trl", "cut-cross-entropy", "flash-attn")


@dataclass(frozen=True)
class Shape:
    """What tells the cases of a suite apart, as in ``cases.Case``; None where it does not apply, or is not known."""

    model: str | None = None
    dtype: str | None = None
    n: int | None = None
    v: int | None = None
    h: int | None = None
    beta: float | None = None
    head_trained: bool | None = None
    masked: float = 0.0


@dataclass(frozen=True)
class Record:
    """One implementation on one case."""

    suite: str  # one of ``cases.SUITES``, or "step"
    case: str  # names the inputs within the suite; the same for every implementation
    impl: str  # "caop_fast", or a peer's name
    status: Status = "ok"
    reason: str | None = None  # None when ok
    shape: Shape = Shape()
    time_ms: float | None = None  # median of a forward and backward
    time_low_ms: float | None = None  # 20 % and 80 % quantiles of ``rounds``
    time_high_ms: float | None = None
    rounds: int = 0
    floor_ms: float | None = None  # lower bound of the time, see ``measure.Floor``
    floor: str | None = None
    gbps: float | None = None  # for losses on logits, the floor's bytes over the time, in 1e9 bytes/s
    traffic_gbps: float | None = None  # the bytes it is known to read and write over the time; None if not known
    tflops: float | None = None  # for linear losses, the floor's operations over the time, in 1e12/s
    peak_bytes: int | None = None  # peak memory beyond the inputs (gradients of the inputs count)
    loss_error: float | None = None  # |value - reference| / |reference| (Euclidean norms), the reference in float64
    grad_error: float | None = None  # the same, the largest of all gradients
    gives: str | None = None  # what is returned besides the gradient
    # "errors" by input, "host_ms" (see ``measure.host_ms``), "again_ms" and "floor_again_ms" (measured behind all
    # others), and what only ``step`` has (tokens_per_s, split_ms, layers, ...).
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is the record of."""
        return self.suite, self.case, self.impl

    @property
    def ms(self) -> float:
        """``time_ms`` of a record that has one."""
        assert self.time_ms is not None
        return self.time_ms

    def failed(self, status: Status, reason: str) -> Record:
        """This record with the reason why nothing was measured."""
        return replace(self, status=status, reason=reason)

    def row(self) -> dict[str, Any]:
        """As it is stored: one flat JSON object."""
        row = dataclasses.asdict(self)
        return {**row.pop("shape"), **row}

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> Record:
        """The inverse of ``row``."""
        shape = {f.name: row[f.name] for f in dataclasses.fields(Shape)}
        return cls(shape=Shape(**shape), **{name: value for name, value in row.items() if name not in shape})

    def __str__(self) -> str:
        """In one line."""
        name = f"{self.suite:<18} {self.case:<58} {self.impl:<24}"
        if self.status != "ok" or self.time_ms is None:
            return f"{name} {self.status}: {self.reason}"
        parts = [f"{self.time_ms:10.2f} ms"]
        parts += [f"floor {100 * self.floor_ms / self.time_ms:3.0f} %"] if self.floor_ms else []
        parts += [f"{self.peak_bytes / 1e6:9.1f} MB"] if self.peak_bytes is not None else []
        parts += [f"gradient error {self.grad_error:.1e}"] if self.grad_error is not None else []
        return f"{name} {'  '.join(parts)}"


def quantiles(rounds: Sequence[float]) -> dict[str, Any]:
    """The fields of a record that tell the times of ``rounds`` in ms; quantiles by position, without interpolation."""
    ordered = sorted(rounds)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8))
    return {"time_ms": statistics.median(ordered), "time_low_ms": low, "time_high_ms": high, "rounds": len(ordered)}


@dataclass
class Results:
    """A run: header and records, bound to its file."""

    path: Path
    header: dict[str, Any]
    records: list[Record] = field(default_factory=list)

    def add(self, record: Record) -> None:
        """Append, or replace the record with the same key, and save."""
        self.records = [r for r in self.records if r.key != record.key] + [record]
        self.save()

    def done(self) -> set[tuple[str, str, str]]:
        return {r.key for r in self.records if r.status != "crashed"}  # which another process tries again

    def save(self) -> None:
        """Write atomically: a run that is killed at any moment leaves the previous file."""
        payload = {"header": self.header, "records": [r.row() for r in self.records]}
        text = json.dumps(payload, indent=1, allow_nan=False)  # before anything is written
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f".{self.path.name}.tmp")
        with beside.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)


def load(path: Path) -> Results:
    """Read a results file. ValueError if it is not one, or has another format."""
    try:
        payload = json.loads(path.read_text(encoding="utf-8"))
        header, rows = payload["header"], payload["records"]
        if header.get("format") != FORMAT:
            raise ValueError(f"format {header.get('format')!r}, this reads {FORMAT}")
        return Results(path, header, [Record.of_row(row) for row in rows])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a results file: {error}") from error


def header(kind: str) -> dict[str, Any]:
    """The hardware ("cuda" or "cpu") and software of this process."""
    gpu, versions = kind == "cuda", dict[str, str | None]()
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    uuid = getattr(torch.cuda.get_device_properties(kind), "uuid", None) if gpu else None
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None
    return {
        "format": FORMAT,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(kind) if gpu else _processor(),
        "device_type": kind,
        # Distinguishes this GPU from others of its model without identifying it.
        "device_id": None if uuid is None else hashlib.sha256(str(uuid).encode()).hexdigest()[:12],
        "driver": None if driver is None else driver.split("\n")[0],
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "interpreted": os.environ.get("TRITON_INTERPRET", "0") == "1",
        "versions": versions,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "sources": sources(),
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD") or os.environ.get("CAOP_COMMIT"),
        "dirty": None if changed is None else bool(changed),
    }


def sources() -> str:
    """Digest of the measured code and of the benchmarks: only records with the same digest share a file."""
    digest = hashlib.sha256()
    for folder in ("caop_fast", "kernels", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def file_name(header: dict[str, Any]) -> str:
    """``<date>-<device>.json``, the device in lower-case words."""
    name = f"{'cpu ' if header['device_type'] == 'cpu' else ''}{header['device'].lower()}"
    name = re.sub(r"nvidia|\(r\)|\(tm\)|processor|80gb hbm3", " ", name)
    words = re.sub(r"[^a-z0-9.]+", "-", name).strip("-")
    return f"{header['date'][:10]}-{'interpreted-' if header['interpreted'] else ''}{words}.json"


def _processor() -> str:
    """Its name, and the threads used of it."""
    told = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", told.read_text("utf-8"), re.MULTILINE) if told.is_file() else None
    return f"{found[1] if found else platform.machine()} ({torch.get_num_threads()} threads)"


def _output(*command: str) -> str | None:
    """What a command prints; None if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
