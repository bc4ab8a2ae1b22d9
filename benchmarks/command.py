"""The command behind ``python -m benchmarks.gpu`` and ``python -m benchmarks.cpu``: correctness first, then times."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch

from benchmarks import cases, correctness, kernel_tests, peers, step
from benchmarks.campaign import Campaign, Job
from benchmarks.measure import alive
from benchmarks.peers.ours import backend
from benchmarks.records import RESULTS, Results, file_name, header, load
from benchmarks.run import Dead

# Handed to the process that goes on after a dead device: unix time, the results file, and how often that happened.
DEADLINE, RESULT, RESTARTS = "CAOP_BENCH_DEADLINE", "CAOP_BENCH_RESULT", "CAOP_BENCH_RESTARTS"
MOST_RESTARTS = 25
LOSSES = 0.6  # of the time for correctness; the rest is for the kernels' own tests
TARGETS = 7  # the first cases of a GPU's selection; the training step comes right behind them


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
    made.add_argument("--fresh", action="store_true", help="do not resume: begin another file")
    return made


def main(argv: list[str] | None, *, device: str, selection: str, minutes: float) -> int:
    """Run; 0 when all was right, 1 when a correctness check failed, 2 when nothing could run."""
    options = parser(device, selection, minutes).parse_args(argv)
    if options.correctness_minutes is None:
        options.correctness_minutes = options.minutes / 3
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA or ROCm device is visible to PyTorch; --device cpu runs the same on a CPU", file=sys.stderr)
        return 2
    until = float(os.environ.get(DEADLINE, time.time() + 60 * options.minutes))
    deadline = time.monotonic() + until - time.time()
    target = torch.device(options.device)
    results = open_results(options.out, target, fresh=options.fresh)
    say(f"results: {results.path}")
    try:
        failed = check(results, target, options, deadline)
        campaign = Campaign(results, target, deadline, options.seconds, options.rounds, options.impls, say)
        campaign.ceilings(("bfloat16", "float32"))
        finished = campaign.run(jobs(options.selection, options.suites))
    except Dead as error:
        restarts = int(os.environ.get(RESTARTS, 0)) + 1
        if restarts > MOST_RESTARTS:
            print(f"the device died {restarts} times ({error}); {results.path} has what was measured", file=sys.stderr)
            return 2
        say(f"the device is dead ({error}); going on in a new process")
        os.environ.update({DEADLINE: str(until), RESULT: str(results.path), RESTARTS: str(restarts)})
        module = f"benchmarks.{'gpu' if device == 'cuda' else 'cpu'}"
        os.execv(sys.executable, [sys.executable, "-m", module, *(sys.argv[1:] if argv is None else argv)])
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
    return [*chosen[:TARGETS], *steps, *chosen[TARGETS:]]


def check(results: Results, device: torch.device, options: argparse.Namespace, deadline: float) -> int:
    """The correctness stage into the header; how many checks failed. A stage that was finished is not run again."""
    header, begun = results.header, "correctness_begun"
    if header.pop(begun, False):  # and no process would get past it
        header["correctness"] = {"passed": 0, "failed": 1, "skipped": 0, "skips": {}}
        header["correctness"]["failures"] = ["the process ended during the correctness checks"]
    earlier = header.get("correctness")
    if (earlier is None or correctness.OUT_OF_TIME in earlier["skips"]) and options.correctness_minutes > 0:
        header[begun] = True
        results.save()
        header["correctness"] = correctness.summary(_checks(device, options, deadline))
        del header[begun]
    results.save()
    summary = header.get("correctness")
    if summary is None:
        say("correctness: not checked")
        return 0
    say(f"correctness: {summary['passed']} passed, {summary['failed']} failed, {summary['skipped']} skipped")
    if not alive(device):
        raise Dead("a correctness check left it so")
    return summary["failed"]


def _checks(device: torch.device, options: argparse.Namespace, deadline: float) -> list[correctness.Check]:
    def failure(found: correctness.Check) -> None:
        if found.outcome == "failed":
            say(f"FAILED  {found.name}: {found.detail}")

    seconds, start = 60 * options.correctness_minutes, time.monotonic()
    chosen = "triton" if device.type == "cuda" else backend()
    sizes = "full" if device.type == "cuda" else "small"
    until = min(deadline, start + (LOSSES * seconds if chosen == "triton" else seconds))
    found = correctness.check_losses(device, chosen, sizes=sizes, deadline=until, report=failure)
    if chosen == "triton":  # elsewhere no kernel runs
        until = min(deadline, start + seconds)
        found += kernel_tests.check_kernels(device, only=options.kernel_tests, deadline=until, report=failure)
    return found


def say(text: str) -> None:
    """A line of progress, at once."""
    print(text, flush=True)


def open_results(folder: Path, device: torch.device, *, fresh: bool) -> Results:
    """The run to go on with: the newest in ``folder`` of this device, code and versions; or a new file."""
    if RESULT in os.environ:
        return load(Path(os.environ[RESULT]))
    found = header(device)
    same = ("device", "sources", "interpreted", "versions", "float32_matmul_precision", "tf32_override")
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
