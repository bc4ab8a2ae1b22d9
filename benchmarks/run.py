"""One implementation on one case: compare it with float64, then measure time and memory beside the floor.

``measure`` does that in the process that calls it; a ``Worker`` is a process of its own for it, so that a crash or a
hang costs one record.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import multiprocessing.connection
import signal
import statistics
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch._dynamo
from torch import Tensor

from benchmarks import measure, peers
from benchmarks.cases import Case
from benchmarks.inputs import Inputs, make, reference
from benchmarks.measure import Wrong
from benchmarks.peers import Loss, Peer, known_traffic
from benchmarks.records import OURS, Record, quantiles
from benchmarks.step import StepBench, StepCase, needed_bytes
from caop_fast.losses.linear.lm_head import accumulating_gemms
from tools.device_tests import alive

T = TypeVar("T")
SAMPLED = 64  # tokens and ids, of all, whose rows of the gradients are compared with float64
UPSTREAM = 0.25  # upstream gradient of the comparison: a loss that ignores it is wrong by a factor of four
CACHES = 3  # inputs that are timed in turn are together so many times as large as a GPU's cache
# Messages of CPU allocators and of libraries that have no exception of their own for it.
OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator")


@dataclass(frozen=True)
class Setting:
    """Where and for how long implementations are measured."""

    device: str  # "cuda" or "cpu"
    copy_gbps: float  # bandwidth of a large copy, in 1e9 bytes/s
    seconds: float = 1.0  # of timed rounds for each implementation, about
    rounds: int = 50  # at most


class Bench:
    """Inputs, reference and floor of a case on a device, made once for all implementations."""

    def __init__(self, case: Case, setting: Setting) -> None:
        self.case, self.setting, self.device = case, setting, torch.device(setting.device)
        self.inputs = make(case, self.device)
        self.reference = reference(self.inputs, SAMPLED)
        self.floor = measure.floor(case, self.device, setting.copy_gbps, setting.seconds / 2)

    def examine(self, peer: Peer) -> tuple[dict[str, float], int, Loss]:
        """Errors of the loss and each gradient, peak memory, and the loss; ``Wrong`` if it is too far off."""
        fresh_compiler()
        loss = peer.build(self.case)
        self.inputs.clear()
        value = loss(self.inputs)
        value.backward(torch.full_like(value, UPSTREAM))
        gradients = {name: gradient / UPSTREAM for name, gradient in self.inputs.gradients().items()}
        errors = self.reference.errors(value, gradients)
        del value, gradients
        limits = peer.limits(self.case)
        if not all(error <= limits[name != "loss"] for name, error in errors.items()):
            raise Wrong(", ".join(f"{name} error {error:.2g}" for name, error in errors.items()))
        self.inputs.clear()  # gradients freed during the step would lower its peak
        return errors, measure.peak(step(loss, self.inputs), self.device), loss

    def steps(self, loss: Loss) -> list[Callable[[], Tensor]]:
        """Steps to time in turn."""
        sets = [self.inputs]
        if self.device.type == "cuda":
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
            sets += [self.inputs.copy() for _ in range(CACHES * cache // max(1, self.inputs.bytes()))]
        return [step(loss, inputs) for inputs in sets]

    def measure(self, impl: str, timing: Callable[..., list[float]] = measure.timing) -> Record:
        """The record of an implementation, timed by ``timing``."""
        peer = peers.named(impl)
        errors, peak, loss = self.examine(peer)
        steps = self.steps(loss)
        rounds = timing(steps, self.device, seconds=self.setting.seconds, rounds=self.setting.rounds)
        host = {"host_ms": measure.host_ms(steps, self.device)} if self.device.type == "cuda" else {}
        found, floor = replace(self.case.record(impl), **quantiles(rounds)), self.floor
        moved = known_traffic(self.case) if impl == OURS else None
        return replace(
            found,
            floor_ms=floor.ms,
            floor=floor.kind,
            gbps=floor.bytes / found.ms / 1e6 if floor.bytes else None,
            traffic_gbps=moved / found.ms / 1e6 if moved is not None else None,
            tflops=floor.operations / found.ms / 1e9 if floor.operations else None,
            peak_bytes=peak,
            loss_error=errors["loss"],
            grad_error=max(error for name, error in errors.items() if name != "loss"),
            gives=peer.gives_for(self.case),
            extra={"errors": errors, **host},
        )

    def again(self, impl: str) -> dict[str, float]:
        """The median time of an implementation, and the floor, measured again."""
        fresh_compiler()
        steps = self.steps(peers.named(impl).build(self.case))
        rounds = measure.timing(steps, self.device, seconds=self.setting.seconds, rounds=self.setting.rounds)
        half = self.setting.seconds / 2
        copied = 0.0 if self.case.linear else measure.copy_gbps(self.device, half)
        floor = measure.floor(self.case, self.device, copied, half)
        return {"again_ms": statistics.median(rounds), "floor_again_ms": floor.ms}

    def profile(self) -> dict[str, Any]:
        """Where the time of a forward and backward of caop_fast goes."""
        loss = peers.named(OURS).build(self.case)
        return measure.profile(step(loss, self.inputs), self.device, self.setting.copy_gbps)

    def clear(self) -> None:
        """Drop the gradients."""
        self.inputs.clear()


def step(loss: Loss, inputs: Inputs) -> Callable[[], Tensor]:
    """Forward and backward with fresh gradients; returns the loss."""

    def run() -> Tensor:
        inputs.clear()
        value = loss(inputs)
        value.backward()
        return value.detach()

    return run


def fresh_compiler() -> None:
    """Forget what ``torch.compile`` compiled for other shapes, and make running in eager mode after all an error.

    Otherwise it would turn to dynamic shapes and, after a few of them, silently to eager mode.
    """
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch.compiler.reset()


_current: tuple[Case | StepCase, Bench | StepBench] | None = None  # of this process


def prepared(case: Case | StepCase, setting: Setting) -> Bench | StepBench:
    """The bench of ``case``, made anew where the last one was of another case."""
    global _current
    if _current is None or _current[0] != case:
        _current = None  # freed before the next one is made
        release()
        device = torch.device(setting.device)
        _current = case, Bench(case, setting) if isinstance(case, Case) else StepBench(case, device)
    return _current[1]


def refusal(case: Case | StepCase, impl: str, device: torch.device) -> str | None:
    """Why an implementation is not measured, or None."""
    if isinstance(case, Case):
        return peers.named(impl).refusal(case, device)
    if not peers.installed("transformers"):
        return "transformers is not installed"
    return peers.too_large(needed_bytes(case, impl), device)


def measured(case: Case | StepCase, impl: str, setting: Setting, *timing: Any) -> Record:
    """The record of an implementation, see ``Bench.measure``; what goes wrong becomes its status.

    No traceback, and so no tensor of the frames, is referenced after the return.
    """
    record, device = case.record(impl), torch.device(setting.device)
    try:
        reason = refusal(case, impl, device)
        return record.failed("skipped", reason) if reason else prepared(case, setting).measure(impl, *timing)
    except Wrong as error:
        return record.failed("wrong", str(error))
    except Exception as error:
        if out_of_memory(error):
            return record.failed("oom", "out of memory")
        return record.failed("crashed" if dead(error) else "error", last_line(error))
    finally:
        if _current is not None:
            _current[1].clear()
        release()


def called(case: Case, setting: Setting, method: str, *arguments: Any) -> Any:
    """What a method of the bench of ``case`` returns, such as ``again`` and ``profile``."""
    bench = prepared(case, setting)
    try:
        return getattr(bench, method)(*arguments)
    finally:
        bench.clear()
        release()


def ceilings(device: str, seconds: float) -> dict[str, Any]:
    """The bandwidth of a large copy, the throughput of large products by dtype, and which have float32 results."""
    place = torch.device(device)
    tflops = {dtype: measure.gemm_tflops(place, dtype, seconds) for dtype in ("bfloat16", "float32")}
    wide = accumulating_gemms(place, torch.bfloat16)
    return {"copy_gbps": measure.copy_gbps(place, seconds), "gemm_tflops": tflops, "bfloat16_to_float32": wide}


def release() -> None:
    """Free the memory that the last implementation left cached, so that the next one does not run out of it."""
    gc.collect()
    if torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):  # raised by a dead device, which is reported elsewhere
            torch.cuda.empty_cache()


def dead(error: BaseException) -> bool:
    """Whether ``error`` left the GPU of this process unusable; the GPU is asked, since messages differ."""
    accelerator = isinstance(error, RuntimeError) and torch.cuda.is_initialized()
    return accelerator and not alive()


def out_of_memory(error: BaseException) -> bool:
    """PyTorch's own error, or that of an allocator or library."""
    own = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return own or any(text in str(error) for text in OUT_OF_MEMORY)


def last_line(error: BaseException) -> str:
    """Type and message of the exception, in one line."""
    text = traceback.format_exception_only(error)[-1].strip().splitlines()
    return text[0][:300] if text else type(error).__name__


class Lost(RuntimeError):
    """A worker ended, or was stopped after the seconds it had, before it answered."""


class Worker:
    """A process that calls functions, one at a time; the next call starts another if it ended."""

    def __init__(self) -> None:
        self._process: multiprocessing.process.BaseProcess | None = None

    def call(self, seconds: float, function: Callable[..., T], *arguments: Any) -> T:
        """``function(*arguments)`` there. Raises a RuntimeError for what that raised, and ``Lost``, see there."""
        process, pipe = self._process or self._start(), self._pipe
        ready: Sequence[object] = ["it ended before"]
        try:
            pipe.send((function, arguments))
            ready = multiprocessing.connection.wait([pipe, process.sentinel], seconds)
            if not pipe.poll():
                raise EOFError
            answer, error = pipe.recv()
        except (EOFError, OSError):
            process.join(1 if ready else 0)
            code = process.exitcode or 0
            self.stop()
            ending = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise Lost(f"the process ended: {ending}" if ready else f"no answer within {seconds:g} s") from None
        if error is not None:
            raise error
        return answer

    def _start(self) -> multiprocessing.process.BaseProcess:
        context = multiprocessing.get_context("spawn")  # a CUDA context does not survive a fork
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()
        return self._process

    def close(self) -> None:
        """End the process, which has a while to end by itself."""
        self.stop(5.0)

    def stop(self, seconds: float = 0.0) -> None:
        """End the process; it has ``seconds`` to end by itself, which it does unless it hangs."""
        if self._process is not None:
            self._pipe.close()
            self._process.join(seconds)
            self._process.kill()
            self._process.join()
            self._process = None


def _serve(pipe: multiprocessing.connection.Connection) -> None:
    """Answer calls until the other end is closed."""
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        answer = error = None
        try:
            answer = function(*arguments)
        except Exception as raised:
            error = RuntimeError(last_line(raised))
        pipe.send((answer, error))
