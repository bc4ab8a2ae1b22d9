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
from benchmarks.peers.ours import backend
from benchmarks.records import RESULTS, Results, file_name, header, load
from benchmarks.run import Dead

DEADLINE = "CAOP_BENCH_DEADLINE"  # unix time, handed to the process that goes on after a dead device
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
    made.add_argument("--correctness-minutes", type=float, default=minutes / 3, help="of them for correctness; 0: none")
    made.add_argument("--kernel-tests", metavar="TEXT", help="only kernel tests whose file name holds TEXT")
    made.add_argument("--fresh", action="store_true", help="do not resume: begin another file")
    return made


def main(argv: list[str] | None, *, device: str, selection: str, minutes: float) -> int:
    """Run; 0 when all was right, 1 when a correctness check failed, 2 when nothing could run."""
    options = parser(device, selection, minutes).parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA or ROCm device is visible to PyTorch; --device cpu runs the same on a CPU", file=sys.stderr)
        return 2
    until = float(os.environ.get(DEADLINE, time.time() + 60 * options.minutes))
    deadline = time.monotonic() + until - time.time()
    target = torch.device(options.device)
    results = open_results(options.out, target, fresh=options.fresh)
    print(f"results: {results.path}")
    failed = check(results, target, options, deadline)
    try:
        campaign = Campaign(results, target, deadline, options.seconds, options.rounds, options.impls, say)
        campaign.ceilings(("bfloat16", "float32"))
        finished = campaign.run(jobs(options.selection, options.suites))
    except Dead as error:
        print(f"the device is dead ({error}); going on in a new process", flush=True)
        os.environ[DEADLINE] = str(until)
        arguments = [a for a in (sys.argv[1:] if argv is None else argv) if a != "--fresh"]
        module = f"benchmarks.{'gpu' if device == 'cuda' else 'cpu'}"
        os.execv(sys.executable, [sys.executable, "-m", module, *arguments])
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
    """The correctness stage into the header; how many checks failed. A stage that was run is not run again."""
    if "correctness" not in results.header and options.correctness_minutes > 0:
        until = min(deadline, time.monotonic() + 60 * options.correctness_minutes)

        def failure(found: correctness.Check) -> None:
            if found.outcome == "failed":
                say(f"FAILED  {found.name}: {found.detail}")

        sizes = "full" if device.type == "cuda" else "small"
        chosen = "triton" if device.type == "cuda" else backend()
        found = correctness.check_losses(device, chosen, sizes=sizes, deadline=until, report=failure)
        if chosen == "triton":  # elsewhere no kernel runs
            found += kernel_tests.check_kernels(device, only=options.kernel_tests, deadline=until, report=failure)
        results.header["correctness"] = correctness.summary(found)
        results.save()
    summary = results.header.get("correctness")
    if summary is None:
        print("correctness: not checked")
        return 0
    print(f"correctness: {summary['passed']} passed, {summary['failed']} failed, {summary['skipped']} skipped")
    return summary["failed"]


def say(text: str) -> None:
    """A line of progress, at once."""
    print(text, flush=True)


def open_results(folder: Path, device: torch.device, *, fresh: bool) -> Results:
    """The run to go on with: the newest in ``folder`` of this device, commit and interpreter; or a new file."""
    found = header(device)
    same = ("device", "commit", "dirty", "interpreted", "versions")
    path = folder / file_name(found)
    for known in () if fresh else sorted(folder.glob("*.json"), reverse=True):
        try:
            earlier = load(known)
        except ValueError:
            continue
        if all(earlier.header.get(key) == found[key] for key in same):
            return earlier
    for number in range(2, 1000):
        if not path.exists():
            break
        path = folder / f"{Path(file_name(found)).stem}-{number}.json"
    return Results(path, found)
