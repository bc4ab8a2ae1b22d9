"""One implementation on one case: hold it to float64, then measure time and memory beside the floor."""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch._dynamo

from benchmarks import measure
from benchmarks.bench import Bench, Errors
from benchmarks.cases import Case
from benchmarks.peers.peer import WRONG, Peer
from benchmarks.records import Record

ROUNDED = (0.15, 0.8)  # of loss and gradient, where logits are rounded to bfloat16: near models differ by as much


class Dead(RuntimeError):
    """The device no longer works in this process."""


class Wrong(Exception):
    """A contender's loss or gradient rules it out."""


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
    except Exception as error:
        if out_of_memory(error):
            return blank(case, peer.name, "oom", "out of memory")
        if dead(error):
            raise Dead(last_line(error)) from error
        return blank(case, peer.name, "error", last_line(error))
    finally:
        bench.clear()
        release(bench.device)


@dataclass(frozen=True)
class Examined:
    """A contender that may be timed: its errors on a few tokens and on all, its peak memory, steps to time in turn."""

    errors: Errors
    full: Errors
    peak: int
    steps: list[Callable[[], object]]


def examine(bench: Bench, peer: Peer) -> Examined:
    """Hold ``peer`` to float64 and measure its memory; ``Wrong`` where it may not be timed."""
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
    bench.clear()  # or their release would hide as much of what the step takes
    most = measure.peak(step, bench.device)
    return Examined(errors, full, most, bench.steps(loss))


def again(bench: Bench, peer: Peer, found: Record, *, seconds: float, rounds: int) -> Record:
    """``found`` with the time that ``peer`` and the floor take now that the others have run: what a card lost to heat.

    For information: where it cannot be measured any more, ``found`` stays as it was.
    """
    try:
        fresh_compiler()
        timing = measure.timing(bench.steps(peer.build(bench.case)), bench.device, seconds=seconds, rounds=rounds)
        floor = bench.floors.again(bench.case)
    except Exception as error:
        if not out_of_memory(error) and dead(error):
            raise Dead(last_line(error)) from error
        return found
    finally:
        bench.clear()
        release(bench.device)
    return replace(found, extra={**found.extra, "again_ms": timing.median, "floor_again_ms": floor.ms})


def fresh_compiler() -> None:
    """Forget what ``torch.compile`` made of other shapes.

    It would go on with dynamic shapes, and after a few of them, without a word, with eager code. Now that is an error.
    """
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch.compiler.reset()


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
        loss_error=max(ready.errors.loss, ready.full.loss),
        grad_error=max(ready.errors.gradient, ready.full.gradient),
        gives=peer.gives_for(case),
        extra={"errors": ready.errors.gradients, "full_errors": ready.full.gradients},
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


def out_of_memory(error: BaseException) -> bool:
    """PyTorch's own error, or that of a library that could not allocate."""
    told = ("CUBLAS_STATUS_ALLOC_FAILED", "out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in told)


def last_line(error: BaseException) -> str:
    """The exception in one line, without what follows it."""
    text = traceback.format_exception_only(error)[-1].strip().splitlines()
    return text[0][:300] if text else type(error).__name__


def release(device: torch.device) -> None:
    """Give back what a contender left: its caches would be another's out-of-memory."""
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # a dead device cannot; that it is dead is told elsewhere
            torch.cuda.empty_cache()
