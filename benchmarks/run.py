"""One implementation on one case: hold it to float64, then measure time and memory beside the floor."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.cases import Case
from benchmarks.floors import Floor, Floors
from benchmarks.inputs import Inputs, make
from benchmarks.peers.peer import Loss, Peer
from benchmarks.records import Record
from benchmarks.truth import Truth, truth

CHECKED = 64  # tokens whose loss and gradients are compared with float64
SPREAD = 6  # of all tokens, those whose gradient is looked at when all are there
UPSTREAM = 0.7  # a loss that ignores the upstream gradient is wrong
# Relative error of loss or gradient from which a contender is not timed; rounding logits to bfloat16 comes near 0.4.
WRONG = {"float32": 0.02, "bfloat16": 0.6}


class Dead(RuntimeError):
    """The device no longer works in this process."""


class Wrong(Exception):
    """A contender's loss or gradient rules it out."""


@dataclass(frozen=True)
class Errors:
    """Relative errors against float64, of the gradients by the name of the input."""

    loss: float
    gradients: dict[str, float]

    @property
    def gradient(self) -> float:
        return max(self.gradients.values())


@dataclass
class Bench:
    """A case on a device: inputs, truth and floor are made once for all contenders."""

    case: Case
    device: torch.device
    floors: Floors
    inputs: Inputs = field(init=False)
    small: Inputs = field(init=False)
    truth: Truth = field(init=False)
    full_truth: Truth = field(init=False)
    floor: Floor = field(init=False)

    def __post_init__(self) -> None:
        self.inputs = make(self.case, self.device)
        self.small = self.inputs.first(CHECKED)
        self.truth = truth(self.small)
        self.full_truth = truth(self.inputs.rows(self._spread()))
        self.floor = self.floors.of(self.case)

    def _spread(self) -> Tensor:
        """Tokens that count from the first to the last, so that no chunk of a contender goes unseen for long."""
        counting = torch.arange(self.case.n, device=self.device) if self.inputs.keep is None else self.inputs.keep
        at = torch.linspace(0, counting.shape[0] - 1, min(SPREAD, counting.shape[0]), dtype=torch.float64)
        return counting[at.round().long().to(self.device)]

    def step(self, loss: Loss, inputs: Inputs) -> Callable[[], None]:
        """Forward and backward with fresh gradients."""
        leaves = list(inputs.leaves().values())

        def run() -> None:
            for leaf in leaves:
                leaf.grad = None
            loss(inputs).backward()

        return run

    def errors(self, loss: Loss) -> Errors:
        """Loss and gradients of the first tokens against float64, at an upstream gradient that is not 1."""
        leaves = self.small.leaves()
        for leaf in leaves.values():
            leaf.grad = None
        value = loss(self.small)
        value.backward(torch.full_like(value, UPSTREAM))
        gradients = {name: leaf.grad / UPSTREAM for name, leaf in leaves.items() if leaf.grad is not None}
        for leaf in leaves.values():
            leaf.grad = None
        return Errors(self.truth.loss_error(value), self.truth.gradient_errors(gradients))

    def spread_error(self) -> float:
        """Of the gradients that lie in the full inputs: rows from the first token to the last against float64."""
        rows, share = self.full_truth.inputs, self.full_truth.inputs.case.n / self.inputs.count
        name = "hidden" if self.case.linear else "student"
        at = self._spread()
        gradient = getattr(self.inputs, name).grad[at] / share
        return self.full_truth.gradient_errors({name: gradient, "weight": rows.weight})[name]

    def clear(self) -> None:
        """Drop the gradients."""
        for leaf in self.inputs.leaves().values():
            leaf.grad = None


def record(bench: Bench, peer: Peer, *, seconds: float = 2.0, rounds: int = 50) -> Record:
    """The record of ``peer`` on ``bench``; whatever goes wrong becomes its status. ``Dead`` when the device is."""
    case = bench.case
    refusal = peer.refusal(case, bench.device)
    if refusal is not None:
        return blank(case, peer.name, "skipped", refusal)
    try:
        ready = examine(bench, peer)
        return filled(bench, peer, ready, measure.timing(ready.steps, bench.device, seconds=seconds, rounds=rounds))
    except Wrong as error:
        return blank(case, peer.name, "wrong", str(error))
    except torch.OutOfMemoryError:
        return blank(case, peer.name, "oom", "out of memory")
    except Exception as error:
        if dead(error):
            raise Dead(last_line(error)) from error
        return blank(case, peer.name, "error", last_line(error))
    finally:
        bench.clear()
        release(bench.device)


@dataclass(frozen=True)
class Examined:
    """A contender that may be timed: its errors, its peak memory, and steps to time in turn."""

    errors: Errors
    spread: float
    peak: int
    steps: list[Callable[[], None]]


def examine(bench: Bench, peer: Peer) -> Examined:
    """Hold ``peer`` to float64 and measure its memory; ``Wrong`` where it may not be timed."""
    loss = peer.build(bench.case)
    errors = bench.errors(loss)
    limit = WRONG[bench.case.dtype]
    if not (errors.loss <= limit and errors.gradient <= limit):
        raise Wrong(f"loss error {errors.loss:.2g}, gradient error {errors.gradient:.2g}")
    step = bench.step(loss, bench.inputs)
    step()
    spread = bench.spread_error()
    if not spread <= max(limit / 10, 4 * errors.gradient):
        raise Wrong(f"gradient error {spread:.2g} in rows of the full size, {errors.gradient:.2g} in the first ones")
    bench.clear()  # or their release would hide as much of what the step takes
    highest = measure.peak(step, bench.device)
    sets = [bench.inputs]
    if bench.device.type == "cuda":  # more inputs than the cache holds
        while sum(s.bytes() for s in sets) < 3 * measure.cache_bytes(bench.device):
            sets.append(bench.inputs.copy())
    return Examined(errors, spread, highest, [bench.step(loss, s) for s in sets])


def filled(bench: Bench, peer: Peer, ready: Examined, found: measure.Timing) -> Record:
    """The record of what was measured."""
    case, floor, ms = bench.case, bench.floor, found.median
    moved = peer.traffic(case, bench.inputs.count)
    return blank(
        case,
        peer.name,
        "ok",
        None,
        time_ms=ms,
        time_low_ms=found.quantile(0.2),
        time_high_ms=found.quantile(0.8),
        rounds=len(found.rounds),
        floor_ms=floor.ms,
        floor=floor.kind,
        gbps=floor.bytes / ms / 1e6 if floor.bytes else None,
        traffic_gbps=moved / ms / 1e6 if moved is not None else None,
        tflops=floor.operations / ms / 1e9 if floor.operations else None,
        peak_bytes=ready.peak,
        loss_error=ready.errors.loss,
        grad_error=ready.errors.gradient,
        gives=peer.gives,
        extra={"spread_error": ready.spread, "errors": ready.errors.gradients},
    )


def blank(case: Case, impl: str, status: str, reason: str | None, **measured: object) -> Record:
    """A record of ``case`` with nothing measured but ``measured``."""
    return Record(
        case.suite,
        case.name,
        impl,
        status=status,
        reason=reason,
        model=case.model,
        dtype=case.dtype,
        n=case.n,
        v=case.v,
        h=case.h,
        beta=case.beta,
        head_trained=case.head_trained,
        masked=case.masked,
        **measured,
    )


def dead(error: BaseException) -> bool:
    """Whether ``error`` left the GPU of this process unusable: asked of the GPU, since messages differ and mislead."""
    accelerator = isinstance(error, RuntimeError) and torch.cuda.is_initialized()
    return accelerator and not measure.alive(torch.device("cuda"))


def last_line(error: BaseException) -> str:
    """The exception in one line, without what follows it."""
    text = traceback.format_exception_only(error)[-1].strip().splitlines()
    return text[0][:300] if text else type(error).__name__


def release(device: torch.device) -> None:
    """Give back what a contender left: its caches would be another's out-of-memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
