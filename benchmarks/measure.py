"""How time, memory, the kernels of a call, and lower bounds of the time are measured.

By CUDA events and the caching allocator on a GPU, by wall time and the profiler on a CPU.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.cases import Case

Step = Callable[[], Any]
MIN_ROUNDS = 3
COPY_BYTES = {"cuda": 2 << 30, "cpu": 64 << 20}
PRODUCT_BYTES = {"cuda": 4 << 30, "cpu": 1 << 30}  # at most, of the [N, V] matrix of the products of a floor
SQUARE = {"cuda": 8192, "cpu": 1024}  # side of large matrix products
FLOOR_ROUNDS = 20
# Matrix products, and the place of the first matrix among their inputs.
PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::baddbmm": 1}


class Wrong(Exception):
    """An implementation's loss or gradient is too far from the reference."""


def timing(
    steps: Sequence[Step], device: torch.device, *, seconds: float = 2.0, rounds: int = 50, warmup: int = 2
) -> list[float]:
    """Milliseconds of each round of ``steps`` in turn, for about ``seconds``, after warm-up.

    Each step has its own inputs, so that none are in the cache. On a GPU every round lies between two events without
    synchronization between rounds: the host runs ahead as it does in training, and a step that synchronizes pays for
    it. Clocks are not locked.
    """
    turn = itertools.cycle(steps)
    each = float("inf")
    for _ in range(warmup + 1):  # the first may compile or allocate; the fastest decides how many rounds fit
        started = time.perf_counter()
        next(turn)()
        synchronize(device)
        each = min(each, time.perf_counter() - started)
        if each > seconds:
            break
    count = max(MIN_ROUNDS, min(rounds, int(seconds / max(each, 1e-9))))
    marks = []
    for step in itertools.islice(turn, count):
        marks.append(_now(device))
        step()
        marks.append(_now(device))
    synchronize(device)
    pairs = zip(marks[::2], marks[1::2], strict=True)
    return [a.elapsed_time(b) if device.type == "cuda" else 1e3 * (b - a) for a, b in pairs]


def _now(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host_ms(steps: Sequence[Step], device: torch.device) -> float:
    """Milliseconds until a step has been given to an idle device; near the time of the step, the host is the limit."""
    found = []
    for step in itertools.islice(itertools.cycle(steps), MIN_ROUNDS):
        synchronize(device)
        started = time.perf_counter()
        step()
        found.append(1e3 * (time.perf_counter() - started))
    synchronize(device)
    return statistics.median(found)


def peak(step: Step, device: torch.device) -> int:
    """Peak memory of ``step`` in bytes beyond what was allocated before; warm up with a call before."""
    if device.type != "cuda":
        return max(0, *itertools.accumulate(allocations(step)))
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def allocations(call: Step) -> list[int]:
    """Bytes that ``call`` allocates on the CPU and, negative, frees, in their order, by PyTorch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    if not events:
        raise RuntimeError("the profiler recorded no allocation: peak memory is unknown")
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def profile(step: Step, device: torch.device, copy_gbps: float) -> dict[str, Any]:
    """Where the time of ``step`` goes: {"ms": of all, "rows": [{"name", "calls", "ms", "gbps", "tflops"}, ...]}.

    A row is a kernel, or on a CPU an operator without those it calls. TFLOP/s of matrix products are computed from
    their shapes, GB/s of Triton kernels from the bytes of their tensors, each counted once; None for other kernels, and
    for those that cannot have touched all of their tensors, such as the ones that change listed ids only.
    """
    step()
    synchronize(device)
    with _bytes_of_kernels() as moved, torch.profiler.profile(record_shapes=True) as found:
        step()
        synchronize(device)
    rows: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(("calls", "ms", "operations"), 0.0))
    for event in found.events() or ():
        on_device = event.device_type != torch.autograd.DeviceType.CPU
        operations = _operations(event.name, event.input_shapes)
        for kernel in sorted(event.kernels, key=lambda kernel: kernel.duration)[-1:] if device.type == "cuda" else ():
            rows[kernel.name]["operations"] += operations
        if on_device == (device.type == "cuda"):
            row = rows[event.name]
            row["calls"] += 1
            row["ms"] += (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e3
            row["operations"] += 0 if on_device else operations
    made: list[dict[str, Any]] = []
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["ms"]):
        if row["ms"]:
            gbps = moved.get(name, 0) / row["ms"] / 1e6
            tflops = row["operations"] / row["ms"] / 1e9
            shown = {"gbps": gbps if 0 < gbps < 2 * copy_gbps else None, "tflops": tflops or None}
            made.append({"name": name[:80], "calls": int(row["calls"]), "ms": row["ms"], **shown})
    if not made:
        raise RuntimeError("the profiler recorded nothing on the device")
    return {"ms": math.fsum(row["ms"] for row in made), "rows": made}


def _operations(name: str, shapes: Sequence[Sequence[int]]) -> int:
    """Of a (batched) matrix product; 0 for any other operator."""
    if name not in PRODUCTS:
        return 0
    first, second = shapes[PRODUCTS[name] :][:2]
    return 2 * math.prod(first) * second[-1]


@contextlib.contextmanager
def _bytes_of_kernels() -> Iterator[dict[str, int]]:
    """Bytes of the tensors that Triton kernels are given inside, by the name of the kernel."""
    from triton.runtime.jit import KernelInterface

    found: dict[str, int] = {}
    kinds = [kind for kind in KernelInterface.__subclasses__() if "__getitem__" in vars(kind)] + [KernelInterface]
    originals = {kind: kind.__getitem__ for kind in kinds}

    def watched(original: Callable[..., Any]) -> Callable[..., Any]:
        def launcher(kernel: Any, grid: Any) -> Callable[..., Any]:
            launch = original(kernel, grid)

            def run(*arguments: Any, **options: Any) -> Any:
                tensors = [a for a in (*arguments, *options.values()) if isinstance(a, torch.Tensor)]
                name = kernel.fn.__name__
                found[name] = found.get(name, 0) + sum(t.nbytes for t in tensors)
                return launch(*arguments, **options)

            return run

        return launcher

    try:
        for kind, original in originals.items():
            kind.__getitem__ = watched(original)
        yield found
    finally:
        for kind, original in originals.items():
            kind.__getitem__ = original


@dataclass(frozen=True)
class Floor:
    """A lower bound of the time of a case, and the bytes or operations in that time."""

    ms: float
    kind: str  # "copy" (each input read once, each gradient written once) or "gemms" (the matrix products alone)
    bytes: int = 0
    operations: int = 0


def floor(case: Case, device: torch.device, copy_gbps: float, seconds: float = 1.0) -> Floor:
    """Of a forward and backward, by the bandwidth of a large copy or by the matrix products, which are measured."""
    n = case.unmasked
    if not case.linear:
        moved = ((2 if case.suite == "logits" else 1) * n + case.n) * case.v * case.itemsize
        return Floor(moved / copy_gbps / 1e6, "copy", bytes=moved)
    dtype = getattr(torch, case.dtype)
    rows = min(n, max(1, PRODUCT_BYTES[device.type] // (case.v * case.itemsize)))
    hidden = torch.randn(n, case.h, device=device, dtype=dtype)
    weight = torch.randn(case.v, case.h, device=device, dtype=dtype)
    logits = torch.empty(rows, case.v, device=device, dtype=dtype)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)

    def products() -> None:
        for start in range(0, n, rows):
            h = hidden[start : start + rows]
            z = logits[: h.shape[0]]
            for _ in range(2 if case.suite == "linear" else 1):
                torch.mm(h, weight.t(), out=z)
            torch.mm(z, weight, out=grad_hidden[start : start + rows])
            if case.head_trained and rows >= n:
                torch.mm(z.t(), h, out=grad_weight)
            elif case.head_trained:
                grad_weight.addmm_(z.t(), h)

    ms = statistics.median(timing([products], device, seconds=seconds, rounds=FLOOR_ROUNDS))
    return Floor(ms, "gemms", operations=case.products * 2 * n * case.v * case.h)


def copy_gbps(device: torch.device, seconds: float = 1.0) -> float:
    """Bandwidth of a large copy, bytes read plus bytes written, in 1e9 bytes/s."""
    source = torch.randn(COPY_BYTES[device.type] // 4, device=device)
    into = torch.empty_like(source)
    ms = statistics.median(timing([lambda: into.copy_(source)], device, seconds=seconds, rounds=FLOOR_ROUNDS))
    return 2 * source.nbytes / ms / 1e6


def gemm_tflops(device: torch.device, dtype: str, seconds: float = 1.0) -> float:
    """Throughput of a large square product, in 1e12 operations/s."""
    side = SQUARE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=getattr(torch, dtype)) for _ in "ab")
    ms = statistics.median(timing([lambda: a @ b], device, seconds=seconds, rounds=FLOOR_ROUNDS))
    return 2 * side**3 / ms / 1e9
