"""Time and peak memory of a call, by CUDA events and the caching allocator, or by wall time and the profiler."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Step = Callable[[], Any]
MIN_ROUNDS = 3


@dataclass(frozen=True)
class Timing:
    """Milliseconds of each round, after warm-up."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def quantile(self, share: float) -> float:
        """By position, without interpolation: one of the measured times."""
        return sorted(self.rounds)[round(share * (len(self.rounds) - 1))]


def timing(
    steps: Sequence[Step], device: torch.device, *, seconds: float = 2.0, rounds: int = 50, warmup: int = 2
) -> Timing:
    """Time ``steps`` in turn for about ``seconds``; each has its own inputs, so that none are in the cache.

    On a GPU every round lies between two events without synchronization between rounds: the host runs ahead as it does
    in training, and a step that synchronizes pays for it. Clocks are not locked.
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
    return Timing(tuple(_events(turn, count) if device.type == "cuda" else _wall(turn, count)))


def _events(turn: Iterator[Step], count: int) -> list[float]:
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, end in marks:
        step = next(turn)
        start.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in marks]


def _wall(turn: Iterator[Step], count: int) -> list[float]:
    found = []
    for _ in range(count):
        step = next(turn)
        start = time.perf_counter()
        step()
        found.append((time.perf_counter() - start) * 1e3)
    return found


class EventTimer:
    """A timer for pytest-benchmark that uses CUDA events: the difference of two calls is in seconds."""

    def __init__(self) -> None:
        self._start: torch.cuda.Event | None = None

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        if self._start is None:
            self._start = event
            return 0.0
        event.synchronize()
        start, self._start = self._start, None
        return start.elapsed_time(event) * 1e-3


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alive(device: torch.device) -> bool:
    """Whether the device still works in this process; after an illegal memory access no call succeeds."""
    try:
        return torch.ones(2, device=device).sum().item() == 2
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:
        return False


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return 64 << 20


def peak(step: Step, device: torch.device) -> int:
    """Peak memory of ``step`` in bytes beyond what was allocated before; warm up with a call before."""
    if device.type != "cuda":
        return peak_bytes(step)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@dataclass(frozen=True)
class Allocations:
    """The allocations of a call on the CPU, as PyTorch's profiler reports them.

    Attributes:
        count: number of allocations.
        total: bytes of all.
        peak: most bytes allocated at one time beyond what was allocated before.
        largest: bytes of the largest.
    """

    count: int
    total: int
    peak: int
    largest: int


def allocations(call: Step) -> Allocations:
    """The allocations of ``call``; RuntimeError if the profiler reports none."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    if not events:
        raise RuntimeError("the profiler recorded no allocation: peak memory is unknown")
    live = highest = 0
    taken = []
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
        if event.nbytes() > 0:
            taken.append(event.nbytes())
    return Allocations(len(taken), sum(taken), highest, max(taken, default=0))


def peak_bytes(call: Step) -> int:
    """Peak memory of ``call`` on the CPU in bytes, beyond what was allocated before."""
    return allocations(call).peak
