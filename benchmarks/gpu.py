"""Everything on a machine with a GPU, in the order of what it tells: see README.md for the stages::

    python -m benchmarks.gpu --minutes 8 --out DIR

Every record and every outcome of a test is on disk as soon as it is known, and the same command goes on where the last
one stopped. It needs torch, triton, numpy, pytest and pytest-xdist (transformers for training steps), and a checkout:
installed, or with ``PYTHONPATH=.:kernels``.
Peers: liger-kernel, trl (with datasets, which its kernels import), cut-cross-entropy, flash-attn.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers, report, run, step
from benchmarks.cases import STAGES, SUITES, Case
from benchmarks.records import OURS, RESULTS, Record, Results, file_name, header, load
from benchmarks.run import Lost, Setting, Worker
from benchmarks.step import StepCase
from tools import device_tests
from tools.triton_cache.pack import environment, foreign, unpack

say = functools.partial(print, flush=True)
ORDER = ("correctness", "targets", "profile", "compiled", "sweep", "steps", "rest")
# Header fields that must be equal in a run that is resumed.
SAME = (
    *("device", "device_id", "driver", "cuda", "sources", "interpreted", "versions", "cpu_capability", "threads"),
    *("cases", "seconds", "rounds"),
)


def main(argv: list[str] | None = None) -> int:
    """Run; 0 if all was right, 1 if a test failed, 2 if nothing could run."""
    options = parser().parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("PyTorch finds no CUDA or ROCm device; --device cpu runs the same on a CPU", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes are stopped
    typed = [Path(a).name if os.path.isabs(a) else a for a in (sys.argv[1:] if argv is None else argv)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, contextlib.closing(Worker()) as worker:
        if options.triton_cache is not None:  # for the processes that this one starts
            os.environ.update(environment(Path(folder)))
            for name, (theirs, here) in foreign(unpack(options.triton_cache, Path(folder))).items():
                say(f"the Triton cache is of no use, all will be compiled: {name} is {here}, it was {theirs}")
        return Command(options, ["python -m benchmarks.gpu", *typed], worker).run()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--out", type=Path, default=RESULTS, help="folder of the results, resumed if there are (%(default)s)")
    add("--minutes", type=float, default=8.0, help="after which nothing new is started (%(default)s)")
    add("--stages", nargs="+", choices=ORDER, default=ORDER, help="(all)")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--cases", choices=sorted(STAGES), help="those of a device, or tiny ones (those of the device)")
    add("--suites", nargs="+", choices=(*SUITES, "step"), help="only these suites")
    add("--impls", nargs="+", choices=[p.name for p in peers.ALL], help="only these implementations")
    add("--seconds", type=float, default=1.0, help="of timed rounds for each implementation (%(default)s)")
    add("--rounds", type=int, default=50, help="at most, for each implementation (%(default)s)")
    add("--correctness-minutes", type=float, default=2.0, help="of the minutes, at most (%(default)s)")
    add("--correctness-tests", metavar="TEXT", help="only tests that match, as with pytest -k")
    add("--patience", type=float, help="seconds for an implementation (75; on a CPU 900)")
    add("--triton-cache", type=Path, metavar="PACK", help="compiled kernels, from tools.triton_cache pack")
    add("--fresh", action="store_true", help="begin another file instead of resuming one")
    return made


class Command:
    """One run of the command: what is left to measure is measured into ``results`` until ``deadline``."""

    def __init__(self, options: argparse.Namespace, typed: Sequence[str], worker: Worker) -> None:
        self.options, self.worker = options, worker
        self.deadline = time.monotonic() + 60 * options.minutes
        self.patience = options.patience or (75.0 if options.device == "cuda" else 900.0)
        self.cases = options.cases or options.device
        # In the worker, since the process that stays must not use the device.
        effort = {"cases": self.cases, "seconds": options.seconds, "rounds": options.rounds}
        found = {**self.call(header, options.device), "command": " ".join(typed), **effort}
        self.results = open_results(options.out, found, fresh=options.fresh)
        self.head = self.results.header
        self.setting = Setting(options.device, 1.0, options.seconds, options.rounds)

    def call(self, function: Any, *arguments: Any) -> Any:
        return self.worker.call(self.patience, function, *arguments)

    def run(self) -> int:
        say(f"results: {self.results.path}")
        done = [self.stage(name) for name in ORDER if name in self.options.stages]
        self.head["finished"] = finished = all(done)
        self.results.save()
        end = "" if finished else "; not all was measured, run it again"
        say(f"{len(self.results.records)} records in {self.results.path}{end}")
        say("\n".join(report.table(report.targets(self.results))))
        failures = self.head.get("correctness", {}).get("failures", [])
        for failure in failures:
            say(f"FAILED  {failure}")
        if failures:
            print(f"{len(failures)} correctness tests FAILED: the times are of incorrect code", file=sys.stderr)
        return 1 if failures else 0

    def stage(self, name: str) -> bool:
        """Whether all of a stage is done now."""
        started = time.monotonic()
        if name == "correctness":
            done = self.correctness()
        elif time.monotonic() > self.deadline or not self.ceilings():
            return False
        elif name == "profile":
            done = self.profile(STAGES[self.cases]["profile"]())
        elif name == "steps":
            done = all(self.measure(case, [*step.IMPLEMENTATIONS]) for case in step.SELECTIONS[self.cases])
        else:
            cases = STAGES[self.cases]["targets" if name == "compiled" else name]()
            wanted = {"compiled": (True,), "rest": (False, True)}.get(name, (False,))
            done = all(
                self.measure(case, [p.name for p in peers.of_case(case) if p.compiled in wanted]) for case in cases
            )
        seconds = self.head.setdefault("stage_seconds", {})
        seconds[name] = seconds.get(name, 0.0) + time.monotonic() - started
        say(f"{name}: {seconds[name]:.0f} s")
        return done

    def correctness(self) -> bool:
        seconds = min(60 * self.options.correctness_minutes, self.deadline - time.monotonic())
        found, select = self.head.get("correctness", {}), self.options.correctness_tests
        if (not found.get("finished") or found["failed"] or found["select"] != select) and seconds > 0:
            outcomes = self.results.path.with_suffix(".tests.jsonl")
            found = device_tests.check(self.options.device, outcomes, seconds=seconds, select=select)
            self.head["correctness"] = found = {**found, "select": select}
            self.results.save()
        say("correctness: " + ", ".join(f"{found.get(kind)} {kind}" for kind in ("passed", "failed", "skipped")))
        return found.get("finished") is True

    def ceilings(self) -> bool:
        """Measure the bandwidth of a large copy and large products, unless that is done."""
        if "ceilings" not in self.head:
            try:
                self.head["ceilings"] = self.call(run.ceilings, self.options.device, self.options.seconds / 2)
            except (Lost, RuntimeError) as error:
                say(f"a large copy and large products: {error}")
                return False
            self.results.save()
        self.setting = replace(self.setting, copy_gbps=self.head["ceilings"]["copy_gbps"])
        return True

    def profile(self, cases: Sequence[Case]) -> bool:
        found = self.head.setdefault("profile", {})
        wanted = {f"{case.suite}: {case.name}": case for case in cases if case.suite in (self.options.suites or SUITES)}
        for name, case in wanted.items():
            if name in found or time.monotonic() > self.deadline:
                continue
            try:
                found[name] = self.call(run.called, case, self.setting, "profile")
            except (Lost, RuntimeError) as error:
                self.worker.stop()
                say(f"profile of {name}: {error}")
            self.results.save()
        return found.keys() >= wanted.keys()

    def measure(self, case: Case | StepCase, impls: Sequence[str]) -> bool:
        """The implementations that have no record; False if the deadline came first."""
        suites, only, done = self.options.suites, self.options.impls, self.results.done()
        first: Record | None = None
        if suites is not None and case.record("").suite not in suites:
            return True
        for impl in impls:
            if case.record(impl).key in done or (only is not None and impl not in only):
                continue
            if time.monotonic() > self.deadline:
                return False
            try:
                record = self.call(run.measured, case, impl, self.setting)
            except Lost as error:
                record = case.record(impl).failed("crashed", str(error))
            if record.status == "crashed":
                self.worker.stop()
            self.results.add(record)
            say(str(record))
            first = first or (record if record.status == "ok" else None)
        if first is not None and first.impl == OURS and isinstance(case, Case):
            try:  # ours and the floor behind all others, which shows what the order did
                extra = self.call(run.called, case, self.setting, "again", OURS)
                self.results.add(replace(first, extra={**first.extra, **extra}))
            except (Lost, RuntimeError):
                self.worker.stop()
        return True


def open_results(folder: Path, found: dict[str, Any], *, fresh: bool) -> Results:
    """The run to resume: the newest in ``folder`` with the same device, code and versions; or a new file."""
    earlier = []
    for path in [] if fresh else folder.glob("*.json"):
        with contextlib.suppress(ValueError):  # it is something else
            earlier.append(load(path))
    for results in sorted(earlier, key=lambda r: str(r.header["date"]), reverse=True):
        if all(results.header.get(key) == found[key] for key in SAME):
            return results
    path, number = folder / file_name(found), 2
    while path.exists():
        path, number = folder / f"{Path(file_name(found)).stem}-{number}.json", number + 1
    results = Results(path, found)
    results.save()
    return results


if __name__ == "__main__":
    sys.exit(main())
