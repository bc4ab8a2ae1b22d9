"""The command behind ``python -m benchmarks.gpu`` and ``python -m benchmarks.cpu``: correctness first, then times."""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, correctness, peers
from benchmarks.campaign import Campaign
from benchmarks.failures import Dead
from benchmarks.jobs import Effort, Job
from benchmarks.records import RESULTS, Results, file_name, header, load
from benchmarks.run import LossJob
from benchmarks.step.cases import SELECTIONS as STEP_SELECTIONS
from benchmarks.step.job import StepJob
from benchmarks.supervise import AGAIN, BROKEN, DEADLINE, ENDED, PIPE, RESULT, Lifeline, supervise

TARGETS, SWEEPS = 7, 15  # the first cases of a GPU's selection, and those and the sweeps over N
STEPS = 2  # training steps between the two; the others come after them
# Header fields that must be equal in a run that is resumed.
SAME = (
    *("device", "device_id", "driver", "cuda", "sources", "interpreted", "versions"),
    *("float32_matmul_precision", "tf32_override", "cpu_capability"),
)


@dataclass(frozen=True)
class Options:
    """Of the command line; see ``parser``."""

    out: Path
    minutes: float
    device: str
    selection: str
    suites: Sequence[str]
    impls: Sequence[str] | None
    seconds: float
    rounds: int
    correctness_minutes: float | None
    correctness_tests: str | None
    patience: float | None
    fresh: bool

    @property
    def correctness_seconds(self) -> float:
        minutes = self.minutes / 3 if self.correctness_minutes is None else self.correctness_minutes
        return 60 * minutes

    @property
    def patience_seconds(self) -> float:
        return self.patience if self.patience is not None else 180.0 if self.device == "cuda" else 900.0


def parser(device: str, selection: str, minutes: float) -> argparse.ArgumentParser:
    """Options, with the defaults of a device."""
    made = argparse.ArgumentParser(description=__doc__)
    suites = (*cases.SUITES, "step")
    made.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of the results, resumed if there are (%(default)s)"
    )
    made.add_argument("--minutes", type=float, default=minutes, help="after which nothing new is started (%(default)s)")
    made.add_argument("--device", choices=("cuda", "cpu"), default=device)
    made.add_argument("--selection", choices=sorted(cases.SELECTIONS), default=selection)
    made.add_argument("--suites", nargs="+", choices=suites, default=suites)
    made.add_argument("--impls", nargs="+", choices=[p.name for p in peers.ALL], help="only these implementations")
    made.add_argument(
        "--seconds", type=float, default=2.0, help="of timed rounds for each implementation (%(default)s)"
    )
    made.add_argument("--rounds", type=int, default=50, help="at most, for each implementation (%(default)s)")
    made.add_argument("--correctness-minutes", type=float, help="of the minutes (a third; 0: no checks)")
    made.add_argument("--correctness-tests", metavar="TEXT", help="only tests that match, as with pytest -k")
    made.add_argument("--patience", type=float, help="seconds for an implementation (180; on a CPU 900)")
    made.add_argument("--fresh", action="store_true", help="begin another file instead of resuming one")
    return made


def main(argv: list[str] | None, *, device: str, selection: str, minutes: float) -> int:
    """Run; 0 if all was right, 1 if a correctness check failed, 2 if nothing could run."""
    options = Options(**vars(parser(device, selection, minutes).parse_args(argv)))
    if PIPE in os.environ:
        try:
            return work(options, float(os.environ[DEADLINE]), Lifeline.of_environment())
        except Exception:  # Python's own exit code would be that of a failed check
            traceback.print_exc()
            return BROKEN
    if options.device == "cuda" and not torch.cuda.is_available():
        print("PyTorch finds no CUDA or ROCm device; --device cpu runs the same on a CPU", file=sys.stderr)
        return 2
    module = f"benchmarks.{'gpu' if device == 'cuda' else 'cpu'}"
    until = time.time() + 60 * options.minutes
    return supervise(module, sys.argv[1:] if argv is None else argv, until=until, say=say)


def work(options: Options, until: float, lifeline: Lifeline) -> int:
    """The work of one process until the unix time ``until``; returns ``AGAIN`` if the device is dead."""
    deadline = time.monotonic() + until - time.time()
    device = torch.device(options.device)
    results = open_results(options.out, device, fresh=options.fresh)
    results.save()  # before the supervisor is told of the file, from which the next process resumes
    lifeline.results(results.path)
    say(f"results: {results.path}")
    campaign = Campaign(
        results,
        device,
        deadline,
        Effort(options.seconds, options.rounds),
        options.impls,
        say,
        functools.partial(lifeline.begin, seconds=options.patience_seconds),
        os.environ.get(ENDED),
    )
    failed = check(options, results, min(options.correctness_seconds, deadline - time.monotonic()), lifeline)
    try:
        campaign.ceilings(("bfloat16", "float32"))
        finished = campaign.run(jobs(options.selection, options.suites))
    except Dead as error:
        say(f"the device no longer works: {error}")
        return AGAIN
    results.header["finished"] = finished
    results.save()
    say(f"{len(results.records)} records in {results.path}{'' if finished else '; the time ran out, run it again'}")
    if failed:
        print(f"{failed} correctness checks FAILED: the times above are of incorrect code", file=sys.stderr)
    return 1 if failed else 0


def check(options: Options, results: Results, seconds: float, lifeline: Lifeline) -> int:
    """Correctness, unless an earlier process finished it; returns how many checks failed."""
    known = results.header.get("correctness")
    if seconds > 0 and (known is None or known.get("finished") is False):
        lifeline.begin("correctness", seconds + options.patience_seconds)
        found = correctness.check(torch.device(options.device), seconds=seconds, select=options.correctness_tests)
        for failure in found.failures:
            say(f"FAILED  {failure}")
        known = results.header["correctness"] = found.as_json()
        results.save()
    if known is None:
        say("correctness: not checked")
        return 0
    say(f"correctness: {known['passed']} passed, {known['failed']} failed, {known['skipped']} skipped")
    return int(known["failed"])


def jobs(selection: str, suites: Sequence[str]) -> list[Job[Any]]:
    """The cases of a selection, and the training steps after the most important of them."""
    chosen = [LossJob(case) for case in cases.of_suites(cases.SELECTIONS[selection](), suites)]
    steps = [StepJob(case) for case in STEP_SELECTIONS[selection]] if "step" in suites else []
    return [*chosen[:TARGETS], *steps[:STEPS], *chosen[TARGETS:SWEEPS], *steps[STEPS:], *chosen[SWEEPS:]]


def say(text: str) -> None:
    """A line of progress, flushed."""
    print(text, flush=True)


def open_results(folder: Path, device: torch.device, *, fresh: bool) -> Results:
    """The run to resume: the newest in ``folder`` with the same device, code and versions; or a new file."""
    if RESULT in os.environ:
        return load(Path(os.environ[RESULT]))
    found = header(device)
    path = folder / file_name(found)
    earlier = [] if fresh else [run for run in map(_loaded, folder.glob("*.json")) if run is not None]
    for run in sorted(earlier, key=lambda run: str(run.header["date"]), reverse=True):
        if all(run.header.get(key) == found[key] for key in SAME):
            return run
    for number in range(2, 1000):
        if not path.exists():
            break
        path = folder / f"{Path(file_name(found)).stem}-{number}.json"
    return Results(path, found)


def _loaded(path: Path) -> Results | None:
    try:
        return load(path)
    except ValueError:
        return None
