"""One implementation of a training step: compare it with the reference, then time it stage by stage."""

from __future__ import annotations

import gc
import statistics
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks import measure
from benchmarks.failures import Wrong, attempt, release
from benchmarks.floors import Floors
from benchmarks.jobs import Effort
from benchmarks.peers.peer import installed
from benchmarks.records import Record
from benchmarks.step.bench import FIRST_SEED, IMPLEMENTATIONS, STAGES, Bench, Implementation, Taken
from benchmarks.step.cases import StepCase

LOSS_ERROR = {"float32": 1e-4, "bfloat16": 2e-2}  # largest relative errors of what may be timed
GRADIENT_ERROR = {"float32": 1e-3, "bfloat16": 0.2}  # bfloat16 rounds in every layer
ROUNDS = {"cuda": 5, "cpu": 3}


@dataclass(frozen=True)
class StepJob:
    """See ``jobs.Job``. A step takes so long that the number of rounds is fixed."""

    case: StepCase

    def record(self, impl: str) -> Record:
        return self.case.record(impl)

    def implementations(self) -> list[str]:
        return [*IMPLEMENTATIONS]

    def refusal(self, impl: str, device: torch.device) -> str | None:
        return None if installed("transformers") else "transformers is not installed"

    def prepare(self, device: torch.device, floors: Floors | None = None) -> Bench:
        bench = Bench(self.case, device)
        bench.reference  # noqa: B018 - computed here, so that its failure is not that of an implementation
        release(device)
        return bench

    def measure(self, bench: Bench, impl: str, effort: Effort | None = None) -> Record:
        chosen = IMPLEMENTATIONS[impl]

        def run() -> Record:
            ready = examine(bench, chosen)
            return filled(self.record(impl), ready, [timed(bench, chosen, r) for r in range(ROUNDS[bench.device.type])])

        try:
            return attempt(self.record(impl), run)
        finally:
            bench.clear()
            release(bench.device)

    def again(self, bench: Bench, found: Record, effort: Effort) -> Record:
        return found


@dataclass(frozen=True)
class Examined:
    """An implementation that may be timed: its relative errors, its loss, and its peak memory in bytes."""

    loss_error: float
    gradient_errors: dict[str, float]
    loss: float
    peak: int


def examine(bench: Bench, implementation: Implementation) -> Examined:
    """Compare with the reference, warm up and measure the memory; ``Wrong`` if it is too far off to be timed."""
    if bench.device.type == "cuda":  # compile kernels and allocate workspaces before memory is measured
        bench.reset()
        bench.step(implementation, FIRST_SEED)
    bench.reset()
    found: list[Taken] = []
    peak = measure.peak(lambda: found.append(bench.step(implementation, FIRST_SEED, keep=True)), bench.device)
    taken, reference = found[0], bench.reference
    if not torch.equal(taken.batch.completions.ids, reference.ids):
        raise Wrong("other rollouts were sampled from the same seed")
    loss, gradients = reference.loss_error(taken), reference.gradient_errors(taken)
    if not loss <= LOSS_ERROR[bench.case.dtype]:
        raise Wrong(f"loss error {loss:.2g}")
    for name, error in gradients.items():
        if not error <= GRADIENT_ERROR[bench.case.dtype]:
            raise Wrong(f"gradient error {error:.2g} in the {name}, loss error {loss:.2g}")
    return Examined(loss, gradients, float(taken.loss), peak)


@dataclass(frozen=True)
class Round:
    """Milliseconds of a step's stages, its loss tokens, and a checksum of the sampled ids."""

    split: dict[str, float]
    tokens: int
    sampled: int

    @classmethod
    def of(cls, taken: Taken) -> Round:
        split = taken.clock.split()
        return cls(split, taken.batch.tokens, zlib.crc32(taken.batch.completions.ids.cpu().numpy().tobytes()))

    @property
    def ms(self) -> float:
        return sum(self.split.values())


def timed(bench: Bench, implementation: Implementation, number: int) -> Round:
    """Round ``number``, counted from 0: the same weights and the same rollouts for every implementation."""
    bench.reset()
    gc.collect()
    return Round.of(bench.step(implementation, FIRST_SEED + 1 + number))


def filled(record: Record, ready: Examined, rounds: Sequence[Round]) -> Record:
    """``record`` with what was measured."""
    tokens = round(statistics.median(r.tokens for r in rounds))
    after = [r.tokens / (r.ms - r.split["rollout"]) for r in rounds]
    return replace(record, shape=replace(record.shape, n=tokens)).measured(
        measure.Timing(tuple(r.ms for r in rounds)),
        peak_bytes=ready.peak,
        loss_error=ready.loss_error,
        grad_error=max(ready.gradient_errors.values()),
        gives="an updated student",
        tokens=tokens,
        tokens_per_s=1e3 * statistics.median(r.tokens / r.ms for r in rounds),
        tokens_per_s_without_rollout=1e3 * statistics.median(after),
        split_ms={stage: statistics.median(r.split[stage] for r in rounds) for stage in STAGES},
        errors=ready.gradient_errors,
        loss=ready.loss,
        sampled=zlib.crc32(b"".join(r.sampled.to_bytes(4, "little") for r in rounds)),
        optimiser="AdamW, fused",
    )
