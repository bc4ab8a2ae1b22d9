"""One implementation of a loss on one case: compare it with float64, then measure time and memory beside the floor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch._dynamo

from benchmarks import measure, peers
from benchmarks.bench import Bench, Errors
from benchmarks.cases import Case
from benchmarks.failures import Dead, Wrong, attempt, dead, last_line, out_of_memory, release
from benchmarks.floors import Floors
from benchmarks.jobs import Effort
from benchmarks.peers.peer import WRONG, Peer
from benchmarks.records import Record

ROUNDED = (0.15, 0.8)  # limits of loss and gradient where logits are rounded to bfloat16: the models are that near


@dataclass(frozen=True)
class LossJob:
    """See ``jobs.Job``."""

    case: Case

    def record(self, impl: str) -> Record:
        return self.case.record(impl)

    def implementations(self) -> list[str]:
        return [peer.name for peer in peers.for_case(self.case)]

    def refusal(self, impl: str, device: torch.device) -> str | None:
        return peers.named(impl).refusal(self.case, device)

    def prepare(self, device: torch.device, floors: Floors) -> Bench:
        return Bench(self.case, device, floors)

    def measure(self, bench: Bench, impl: str, effort: Effort) -> Record:
        peer = peers.named(impl)

        def run() -> Record:
            ready = examine(bench, peer)
            return filled(bench, peer, ready, timed(bench, ready.steps, effort))

        try:
            return attempt(self.record(impl), run)
        finally:
            bench.clear()
            release(bench.device)

    def again(self, bench: Bench, found: Record, effort: Effort) -> Record:
        """Time the implementation and the floor again, which shows thermal throttling; ``found`` if that fails."""
        try:
            fresh_compiler()
            timing = timed(bench, bench.steps(peers.named(found.impl).build(bench.case)), effort)
            floor = bench.floors.again(bench.case)
        except Exception as error:
            if not out_of_memory(error) and dead(error):
                raise Dead(last_line(error)) from error
            return found
        finally:
            bench.clear()
            release(bench.device)
        return replace(found, extra={**found.extra, "again_ms": timing.median, "floor_again_ms": floor.ms})


def timed(bench: Bench, steps: Sequence[Callable[[], object]], effort: Effort) -> measure.Timing:
    return measure.timing(steps, bench.device, seconds=effort.seconds, rounds=effort.rounds)


@dataclass(frozen=True)
class Examined:
    """An implementation that may be timed.

    Attributes:
        errors, full: on a few tokens and on all.
        peak: memory in bytes.
        steps: to time in turn.
    """

    errors: Errors
    full: Errors
    peak: int
    steps: list[Callable[[], object]]


def examine(bench: Bench, peer: Peer) -> Examined:
    """Compare ``peer`` with float64 and measure its memory; ``Wrong`` if it is too far off to be timed."""
    highest_loss, highest = ROUNDED if peer.rounds(bench.case) else (peer.limit, peer.limit)
    fresh_compiler()
    errors = bench.errors(peer.build(bench.case))
    if not (errors.loss <= highest_loss and errors.gradient <= highest):
        raise Wrong(f"loss error {errors.loss:.2g}, gradient error {errors.gradient:.2g}")
    fresh_compiler()
    loss = peer.build(bench.case)
    step = bench.step(loss, bench.inputs)
    full = bench.full_errors(step())
    if not (full.loss <= highest_loss and full.gradient <= min(highest, max(WRONG / 2, 3 * errors.gradient))):
        raise Wrong(f"in the full size loss error {full.loss:.2g}, gradient error {full.gradient:.2g}")
    bench.clear()  # freed during the step they would lower its peak
    peak = measure.peak(step, bench.device)
    return Examined(errors, full, peak, [*bench.steps(loss)])


def fresh_compiler() -> None:
    """Forget what ``torch.compile`` compiled for other shapes, and make running in eager mode after all an error.

    Otherwise it would turn to dynamic shapes and, after a few of them, silently to eager mode.
    """
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch.compiler.reset()


def filled(bench: Bench, peer: Peer, ready: Examined, timing: measure.Timing) -> Record:
    """The record of what was measured."""
    case, floor, ms = bench.case, bench.floor, timing.median
    moved = peer.traffic(case, bench.inputs.count)
    found = case.record(peer.name).measured(
        timing,
        peak_bytes=ready.peak,
        loss_error=max(ready.errors.loss, ready.full.loss),
        grad_error=max(ready.errors.gradient, ready.full.gradient),
        gives=peer.gives_for(case),
        errors=ready.errors.gradients,
        full_errors=ready.full.gradients,
    )
    return replace(
        found,
        floor_ms=floor.ms,
        floor=floor.kind,
        gbps=floor.bytes / ms / 1e6 if floor.bytes else None,
        traffic_gbps=moved / ms / 1e6 if moved is not None else None,
        tflops=floor.operations / ms / 1e9 if floor.operations else None,
    )
