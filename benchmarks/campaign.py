"""A list of cases within a time budget: resumable, nothing measured is lost, no failure is hidden."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from benchmarks.failures import Dead, classify, dead, last_line, out_of_memory, release
from benchmarks.floors import Floors
from benchmarks.jobs import Effort, Job
from benchmarks.records import OURS, Record, Results

B = TypeVar("B")


@dataclass
class Campaign:
    """Measures jobs into ``results``.

    Attributes:
        results: every record is saved there at once.
        device: to measure on.
        deadline: ``time.monotonic()`` after which nothing new is started.
        effort: for each implementation.
        impls: names of the implementations to measure; None for all.
        say: called with a line for each record.
        begin: called with a description of what starts; it should end soon after.
        ended: why the previous process ended in the middle of a record, where that is known.
    """

    results: Results
    device: torch.device
    deadline: float
    effort: Effort = field(default_factory=Effort)
    impls: Sequence[str] | None = None
    say: Callable[[str], None] = print
    begin: Callable[[str], None] = lambda what: None
    ended: str | None = None

    def __post_init__(self) -> None:
        known = self.results.header.get("ceilings", {})  # one bandwidth for all records of a run
        self.floors = Floors(self.device, self.effort.seconds / 2, known.get("copy_gbps"))
        self._after_crash()

    def run(self, jobs: Iterable[Job[Any]]) -> bool:
        """All ``jobs`` in order; False if the deadline came first. ``Dead`` if the device stopped working."""
        return all(self._job(job) for job in jobs)

    def ceilings(self, dtypes: Iterable[str]) -> None:
        """Record the bandwidth of a large copy and the throughput of large matrix products."""
        if "ceilings" in self.results.header:
            return
        found = self.results.header["ceilings"] = {}  # if this process dies here, the next one does not try again
        self.results.save()
        try:
            self.begin("a large copy")
            found["copy_gbps"] = self.floors.copy_gbps
            for dtype in dtypes:
                self.begin(f"a large product in {dtype}")
                found.setdefault("gemm_tflops", {})[dtype] = self.floors.gemm_tflops(dtype)
        except RuntimeError as error:
            if not out_of_memory(error) and dead(error):
                raise Dead(last_line(error)) from error
            self.say(f"ceilings: {last_line(error)}")
        self.results.save()

    def _job(self, job: Job[B]) -> bool:
        able = []
        for name in job.implementations():
            record = job.record(name)
            if (self.impls is not None and name not in self.impls) or record.key in self.results.done():
                continue
            refusal = job.refusal(name, self.device)
            if refusal is None:
                able.append(record)
            else:
                self._add(record.failed("skipped", refusal))
        if not able:
            return True
        if self._late():
            return False
        bench = self._prepare(job, able)
        if bench is None:
            return True
        for record in able:
            if self._late():
                return False
            self._mark([record])
            try:
                found = job.measure(bench, record.impl, self.effort)
            except Dead as error:
                self._add(record.failed("crashed", str(error)))
                raise
            self._add(found)
        self._first_again(job, bench, able[0])
        return True

    def _late(self) -> bool:
        return time.monotonic() > self.deadline

    def _prepare(self, job: Job[B], records: Sequence[Record]) -> B | None:
        """Inputs, reference and floor; None if that failed, which every implementation's record then says."""
        self._mark(records)  # if the process dies here, it would die for each of them
        try:
            bench = job.prepare(self.device, self.floors)
        except Exception as error:
            reason = "making the inputs, their float64 reference and the floor: " + last_line(error)
            try:
                status, _ = classify(error)
            except Dead:
                self._add_all(record.failed("crashed", reason) for record in records)
                raise
            self._add_all(record.failed(status, reason) for record in records)
        else:
            self.results.header.pop("running", None)  # the deadline may come now, which is not a crash
            return bench
        release(self.device)
        return None

    def _first_again(self, job: Job[B], bench: B, first: Record) -> None:
        """Time caop_fast again after all others: its record shows the effect of the order."""
        found = next(r for r in self.results.records if r.key == first.key)
        if found.status == "ok" and found.impl == OURS and not self._late():
            self.begin(f"{' '.join(found.key)} again")
            self.results.add(job.again(bench, found, self.effort))

    def _add(self, found: Record) -> None:
        self.results.header.pop("running", None)
        self.results.add(found)
        self.say(str(found))

    def _add_all(self, found: Iterable[Record]) -> None:
        for record in found:
            self._add(record)

    def _mark(self, records: Sequence[Record]) -> None:
        """Save what runs (suite, case, implementations), so that it is known if this process dies."""
        first = records[0]
        key = [first.suite, first.case, *(record.impl for record in records)]
        self.results.header["running"] = key
        self.results.save()
        self.begin(" ".join(key))

    def _after_crash(self) -> None:
        """What was running has crashed; but if the whole run was killed from outside, it gets a second try."""
        header = self.results.header
        key = header.pop("running", None)
        if key is None:
            return
        stopped = header.setdefault("interrupted", [])
        if self.ended is None and key not in stopped:
            stopped.append(key)
            self.results.save()
            return
        suite, case, *impls = key
        reason = "the process died while it ran" + (f": {self.ended}" if self.ended else "")
        for impl in impls:
            record = Record(suite, case, impl)
            if record.key not in self.results.done():
                self.results.add(record.failed("crashed", reason))
