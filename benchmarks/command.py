"""The command behind ``python -m benchmarks.gpu`` and ``python -m benchmarks.cpu``: correctness first, then times."""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
import traceback
from pathlib import Path

import torch

from benchmarks import cases, peers, step
from benchmarks.campaign import Campaign, Job
from benchmarks.records import RESULTS, Results, file_name, header, load
from benchmarks.run import Dead
from benchmarks.stage import Stage
from benchmarks.supervise import AGAIN, BROKEN, DEADLINE, ENDED, PIPE, RESULT, Lifeline, supervise

TARGETS, SWEEPS = 7, 15  # the first cases of a GPU's selection, and those with the sweeps over N behind them
STEPS = 2  # training steps between the two; the others come behind


def parser(device: str, selection: str, minutes: float) -> argparse.ArgumentParser:
    """Options, with the defaults of a device."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the results; a run begun there is resumed")
    made.add_argument("--minutes", type=float, default=minutes, help="after this nothing new is begun")
    made.add_argument("--device", choices=("cuda", "cpu"), default=device)
    made.add_argument("--selection", choices=sorted(cases.SELECTIONS), default=selection)
    made.add_argument("--suites", nargs="+", choices=(*cases.SUITES, "step"), default=(*cases.SUITES, "step"))
    made.add_argument("--impls", nargs="+", choices=(*peers.BY_NAME,), help="only these contenders")
    made.add_argument("--seconds", type=float, default=2.0, help="of timed rounds for each contender")
    made.add_argument("--rounds", type=int, default=50, help="most timed rounds for each contender")
    made.add_argument("--correctness-minutes", type=float, help="of them for correctness; a third unless told; 0: none")
    made.add_argument("--kernel-tests", metavar="TEXT", help="only kernel tests whose file name holds TEXT")
    made.add_argument(
        "--patience",
        type=float,
        help="seconds after which a contender is given up (180 on a GPU, 900 on a CPU)",
    )
    made.add_argument("--fresh", action="store_true", help="do not resume: begin another file")
    return made


def parsed(argv: list[str] | None, device: str, selection: str, minutes: float) -> argparse.Namespace:
    """The options, with what follows from others."""
    options = parser(device, selection, minutes).parse_args(argv)
    if options.correctness_minutes is None:
        options.correctness_minutes = options.minutes / 3
    if options.patience is None:
        options.patience = 180.0 if options.device == "cuda" else 900.0
    return options


def main(argv: list[str] | None, *, device: str, selection: str, minutes: float) -> int:
    """Run; 0 when all was right, 1 when a correctness check failed, 2 when nothing could run."""
    options = parsed(argv, device, selection, minutes)
    if PIPE in os.environ:
        try:
            return work(options, float(os.environ[DEADLINE]), Lifeline.of_environment())
        except Exception:  # Python's own exit code would be that of a failed check
            traceback.print_exc()
            return BROKEN
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA or ROCm device is visible to PyTorch; --device cpu runs the same on a CPU", file=sys.stderr)
        return 2
    module = f"benchmarks.{'gpu' if device == 'cuda' else 'cpu'}"
    until = time.time() + 60 * options.minutes
    return supervise(module, sys.argv[1:] if argv is None else argv, until=until, say=say)


def work(options: argparse.Namespace, until: float, lifeline: Lifeline) -> int:
    """What ``main`` has a process do until the unix time ``until``; ``AGAIN`` where the device is dead."""
    deadline = time.monotonic() + until - time.time()
    target = torch.device(options.device)
    ended = os.environ.get(ENDED)
    begin = functools.partial(lifeline.begin, seconds=options.patience)
    results = open_results(options.out, target, fresh=options.fresh)
    results.save()  # before it is told: whoever goes on begins by reading it
    lifeline.results(results.path)
    say(f"results: {results.path}")
    try:
        campaign = Campaign(
            results, target, deadline, options.seconds, options.rounds, options.impls, say, begin, ended
        )
        failed = Stage(
            results,
            target,
            deadline,
            60 * options.correctness_minutes,
            lambda name, more: lifeline.begin(name, options.patience + more),
            say,
            ended,
            options.kernel_tests,
        ).run()
        campaign.ceilings(("bfloat16", "float32"))
        finished = campaign.run(jobs(options.selection, options.suites))
    except Dead as error:
        say(f"the device is dead: {error}")
        return AGAIN
    results.header["finished"] = finished
    results.save()
    print(f"{len(results.records)} records in {results.path}{'' if finished else '; the time ran out, run it again'}")
    if failed:
        print(f"{failed} correctness checks FAILED: the times above are of wrong code", file=sys.stderr)
    return 1 if failed else 0


def jobs(selection: str, suites: tuple[str, ...]) -> list[Job]:
    """The cases of a selection, and behind the most important of them the training steps."""
    chosen = cases.of_suites(cases.SELECTIONS[selection](), suites)
    steps = list(step.SELECTIONS[selection]) if "step" in suites else []
    return [*chosen[:TARGETS], *steps[:STEPS], *chosen[TARGETS:SWEEPS], *steps[STEPS:], *chosen[SWEEPS:]]


def say(text: str) -> None:
    """A line of progress, at once."""
    print(text, flush=True)


def open_results(folder: Path, device: torch.device, *, fresh: bool) -> Results:
    """The run to go on with: the newest in ``folder`` of this device, code and versions; or a new file."""
    if RESULT in os.environ:
        return load(Path(os.environ[RESULT]))
    found = header(device)
    same = ("device", "device_id", "driver", "cuda", "sources", "interpreted", "versions", "float32_matmul_precision")
    same += (
        "tf32_override",
        "cpu_capability",
    )
    path = folder / file_name(found)
    earlier = [] if fresh else [run for run in map(_loaded, folder.glob("*.json")) if run is not None]
    for run in sorted(earlier, key=lambda run: run.header["date"], reverse=True):
        if all(run.header.get(key) == found[key] for key in same):
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
