"""One step of on-policy distillation, whole and stage by stage: caop_fast beside the loop of the released trainer.

A step samples rollouts with ``generate``, runs the teacher on them behind its longer prompt, runs the student, makes
the loss and its gradient, and takes a step of AdamW. Sampling and optimiser are the same for all; a contender is what
lies between. The stage "loss" holds the loss and the whole backward, through the student too. A contender that works on
logits has the projections in its forwards, one that works on hidden states in its loss, so the three stages compare in
sum only. The models have published shapes and random weights, with fewer layers where a case says so.

    python -m benchmarks.step --quick
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks import measure
from benchmarks.peers.peer import installed
from benchmarks.records import Record, Status
from benchmarks.run import Dead, Wrong, dead, last_line, release
from benchmarks.step_bench import CONTENDERS, FIRST_SEED, STAGES, Bench, Contender, Taken

LOSS_ERROR = {"float32": 1e-4, "bfloat16": 2e-2}  # relative, from which a contender is wrong
GRADIENT_ERROR = {"float32": 1e-3, "bfloat16": 0.2}  # bfloat16 rounds in every layer
ROUNDS = {"cuda": 5, "cpu": 3}  # unless told otherwise


@dataclass(frozen=True)
class Architecture:
    """A published Qwen3 configuration."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    eos: int
    pad: int


MODELS = {
    "Qwen3-0.6B": Architecture(1024, 28, 3072, 16, 8, 128, 151936, True, 151645, 151643),
    "Qwen3-8B": Architecture(4096, 36, 12288, 32, 8, 128, 151936, False, 151645, 151643),
    "small": Architecture(32, 2, 48, 4, 2, 8, 211, True, 1, 0),  # not published: for tests
}


@dataclass(frozen=True)
class StepCase:
    """What a step does.

    Attributes:
        model: of ``MODELS``.
        layers: how many the models are given.
        prompts, rollouts: prompts in a step, and rollouts of each.
        prompt_tokens, teacher_prompt_tokens: of the longest prompt; they go down to three quarters of it.
        new_tokens: of each rollout, unless it ends by itself, which random weights hardly ever do.
        dtype: "float32" or "bfloat16", of weights, gradients and optimiser state.
        beta: of the divergence.
    """

    model: str
    layers: int
    prompts: int
    rollouts: int
    prompt_tokens: int
    teacher_prompt_tokens: int
    new_tokens: int
    dtype: str
    beta: float = 0.0

    @property
    def name(self) -> str:
        """Unique within the suite."""
        parts = [self.model, f"layers={self.layers}", f"rollouts={self.prompts}x{self.rollouts}x{self.new_tokens}"]
        parts += [f"prompts={self.prompt_tokens}/{self.teacher_prompt_tokens}", self.dtype]
        return " ".join([*parts, f"beta={self.beta:g}"] if self.beta else parts)

    @property
    def architecture(self) -> Architecture:
        return MODELS[self.model]


TINY = StepCase("small", 2, 3, 2, 8, 16, 6, "float32")
QUICK = StepCase("Qwen3-0.6B", 1, 2, 4, 24, 48, 4, "float32")
CPU = StepCase("Qwen3-0.6B", 2, 4, 4, 64, 128, 16, "float32")
GPU = (
    StepCase("Qwen3-0.6B", 28, 4, 8, 256, 512, 128, "bfloat16"),
    StepCase("Qwen3-8B", 4, 4, 8, 256, 512, 128, "bfloat16"),
    StepCase("Qwen3-0.6B", 28, 16, 8, 128, 256, 128, "bfloat16"),
    StepCase("Qwen3-8B", 4, 8, 8, 256, 512, 128, "bfloat16"),
)
SELECTIONS = {"gpu": GPU, "cpu": (CPU,), "quick": (QUICK,), "tiny": (TINY,)}


@dataclass(frozen=True)
class Examined:
    """A contender that may be timed: its relative errors, its loss, and its peak memory in bytes."""

    loss_error: float
    gradient_errors: dict[str, float]
    loss: float
    peak: int


def records(
    case: StepCase, device: torch.device, rounds: int | None = None, impls: Sequence[str] | None = None
) -> Iterator[Record]:
    """The records of the contenders (all, or those of ``impls``) as soon as each is known.

    Whatever goes wrong becomes a status; behind that of a dead device comes ``Dead``.
    """
    unknown = sorted(set(impls or ()) - set(CONTENDERS))
    if unknown:
        raise ValueError(f"impls must be among {list(CONTENDERS)}, got {unknown}")
    names = [name for name in CONTENDERS if impls is None or name in impls]
    if not names:
        return
    if not installed("transformers"):
        yield from (blank(case, name, "skipped", "transformers is not installed") for name in names)
        return
    bench: list[Bench] = []
    failure = attempt(lambda: bench.append(prepared(case, device)))
    if failure is not None:
        release(device)
        status, reason = failure
        yield from (blank(case, name, status, f"making models and reference: {reason}") for name in names)
        return
    for name in names:
        try:
            found = measured(bench[0], name, rounds or ROUNDS[device.type])
        except Dead as error:
            yield blank(case, name, "crashed", str(error))
            raise
        yield found


def prepared(case: StepCase, device: torch.device) -> Bench:
    """Models, and what is right."""
    bench = Bench(case, device)
    bench.truth  # noqa: B018 - made here, so that its failures are no contender's
    release(device)
    return bench


def measured(bench: Bench, name: str, rounds: int) -> Record:
    """The record of the contender ``name``."""
    found: list[Record] = []

    def run() -> None:
        ready = examine(bench, CONTENDERS[name])
        found.append(filled(bench.case, name, ready, [timed(bench, CONTENDERS[name], r) for r in range(rounds)]))

    failure = attempt(run)
    bench.clear()
    release(bench.device)
    return found[0] if failure is None else blank(bench.case, name, *failure)


def attempt(call: Callable[[], None]) -> tuple[Status, str] | None:
    """Status and reason of what ``call`` raises; by the return nothing holds the frames it was raised in."""
    try:
        call()
    except Wrong as error:
        return "wrong", str(error)
    except Exception as error:
        if out_of_memory(error):
            return "oom", "out of memory"
        if dead(error):
            raise Dead(last_line(error)) from error
        return "error", last_line(error)
    return None


def out_of_memory(error: Exception) -> bool:
    """On a GPU or on a CPU, whose allocator has no exception of its own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def examine(bench: Bench, contender: Contender) -> Examined:
    """Hold ``contender`` to the reference, warm it up and measure its memory; ``Wrong`` where it may not be timed."""
    if bench.device.type == "cuda":  # kernels are compiled and workspaces taken before memory is looked at
        bench.reset()
        bench.step(contender, FIRST_SEED)
    bench.reset()
    found: list[Taken] = []
    peak = measure.peak(lambda: found.append(bench.step(contender, FIRST_SEED, keep=True)), bench.device)
    taken, truth = found[0], bench.truth
    if not torch.equal(taken.batch.completions.ids, truth.ids):
        raise Wrong("other rollouts were sampled from the same seed")
    loss, gradients = truth.loss_error(taken), truth.gradient_errors(taken)
    if not loss <= LOSS_ERROR[bench.case.dtype]:
        raise Wrong(f"loss error {loss:.2g}")
    for name, error in gradients.items():
        if not error <= GRADIENT_ERROR[bench.case.dtype]:
            raise Wrong(f"gradient error {error:.2g} in the {name}, loss error {loss:.2g}")
    return Examined(loss, gradients, float(taken.loss), peak)


@dataclass(frozen=True)
class Round:
    """Milliseconds of a step's stages, its loss tokens, and a checksum of the ids that were sampled."""

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


def timed(bench: Bench, contender: Contender, number: int) -> Round:
    """Round ``number``, counted from 0: for every contender from the same weights, with the same rollouts."""
    bench.reset()
    gc.collect()
    return Round.of(bench.step(contender, FIRST_SEED + 1 + number))


def filled(case: StepCase, name: str, ready: Examined, rounds: Sequence[Round]) -> Record:
    """The record of what was measured."""
    found = measure.Timing(tuple(r.ms for r in rounds))
    after = [r.tokens / (r.ms - r.split["rollout"]) for r in rounds]
    return blank(
        case,
        name,
        n=round(statistics.median(r.tokens for r in rounds)),
        time_ms=found.median,
        time_low_ms=found.quantile(0.2),
        time_high_ms=found.quantile(0.8),
        rounds=len(rounds),
        peak_bytes=ready.peak,
        loss_error=ready.loss_error,
        grad_error=max(ready.gradient_errors.values()),
        gives="an updated student",
        tokens=round(statistics.median(r.tokens for r in rounds)),
        tokens_per_s=1e3 * statistics.median(r.tokens / r.ms for r in rounds),
        tokens_per_s_without_rollout=1e3 * statistics.median(after),
        split_ms={stage: statistics.median(r.split[stage] for r in rounds) for stage in STAGES},
        errors=ready.gradient_errors,
        loss=ready.loss,
        sampled=zlib.crc32(b"".join(r.sampled.to_bytes(4, "little") for r in rounds)),
        optimiser="AdamW, fused",
    )


MEASURES = frozenset(Record.__dataclass_fields__)


def blank(case: StepCase, impl: str, status: Status = "ok", reason: str | None = None, **found: object) -> Record:
    """A record of ``case`` with nothing measured but ``found``; what ``Record`` has no field for goes to ``extra``."""
    a = case.architecture
    shape = {
        "layers": case.layers,
        "layers_published": a.layers,
        "prompts": case.prompts,
        "rollouts": case.rollouts,
        "prompt_tokens": case.prompt_tokens,
        "teacher_prompt_tokens": case.teacher_prompt_tokens,
        "new_tokens": case.new_tokens,
    }
    fields = {"n": case.prompts * case.rollouts * case.new_tokens}
    fields |= {name: value for name, value in found.items() if name in MEASURES}
    return Record(
        "step",
        case.name,
        impl,
        status=status,
        reason=reason,
        model=case.model,
        dtype=case.dtype,
        v=a.vocab,
        h=a.hidden,
        beta=case.beta,
        head_trained=True,
        extra=shape | {name: value for name, value in found.items() if name not in MEASURES},
        **fields,
    )


def row(found: Record) -> str:
    """A line of the table that ``main`` prints."""
    if found.status != "ok":
        return f"{found.impl:<12} {found.status}: {found.reason}"
    spent = "".join(f"{found.extra['split_ms'][stage]:>11.1f}" for stage in STAGES)
    speed, peak = found.extra["tokens_per_s"], found.peak_bytes / 1e6
    errors = f"{found.loss_error:>12.1e}{found.grad_error:>12.1e}"
    return f"{found.impl:<12}{found.time_ms:>11.1f}{spent}{speed:>11.1f}{peak:>11.1f}{errors}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of each case of a selection; 1 when a contender was wrong or failed."""
    parser = argparse.ArgumentParser(description="One step of on-policy distillation, timed by stage.")
    parser.add_argument("--quick", action="store_true", help="the small case for a CPU")
    parser.add_argument("--selection", choices=sorted(SELECTIONS), help="cases (gpu where there is one, else cpu)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, help="timed steps of each contender")
    parser.add_argument("--impls", nargs="+", choices=tuple(CONTENDERS), help="only these contenders")
    options = parser.parse_args(argv)
    default = "gpu" if options.device == "cuda" else "cpu"
    chosen = SELECTIONS["quick" if options.quick else options.selection or default]
    columns = "".join(f"{name:>11}" for name in ("step, ms", *STAGES, "tokens/s", "peak, MB"))
    good = True
    for case in chosen:
        print(f"{case.name} ({options.device}, {torch.get_num_threads()} threads)")
        print(f"{'':<12}{columns}{'loss error':>12}{'grad. error':>12}", flush=True)
        for found in records(case, torch.device(options.device), options.rounds, options.impls):
            print(row(found), flush=True)
            good = good and found.status in ("ok", "oom", "skipped")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
