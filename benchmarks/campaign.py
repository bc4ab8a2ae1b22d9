"""A list of cases within a budget of time: resumable, nothing measured is lost, nothing that failed is hidden."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from benchmarks import peers, step
from benchmarks.bench import Bench
from benchmarks.cases import Case
from benchmarks.floors import Floors
from benchmarks.groups import OURS
from benchmarks.peers.peer import Peer
from benchmarks.records import Record, Results
from benchmarks.run import Dead, again, blank, dead, last_line, out_of_memory, record, release
from caop_fast.losses.linear.lm_head import accumulating_gemms

Job = Case | step.StepCase


@dataclass
class Campaign:
    """Measures jobs into ``results``.

    Attributes:
        results: where each record goes as soon as it is known.
        device: to measure on.
        deadline: ``time.monotonic()`` after which nothing new is begun.
        seconds: of timed rounds for each contender.
        rounds: most of them.
        impls: names of the contenders to take; None for all.
        say: called with a line for each record.
        begin: called with what is about to run; it is to return soon after.
        ended: why the process before this one ended in the middle of a record, where that is known.
    """

    results: Results
    device: torch.device
    deadline: float
    seconds: float = 2.0
    rounds: int = 50
    impls: Sequence[str] | None = None
    say: Callable[[str], None] = print
    begin: Callable[[str], None] = lambda what: None
    ended: str | None = None

    def __post_init__(self) -> None:
        known = self.results.header.get("ceilings", {})  # one rate for all records of a run
        self.floors = Floors(self.device, self.seconds / 2, known.get("copy_gbps"))
        self._after_crash()

    def run(self, jobs: Iterable[Job]) -> bool:
        """All of ``jobs``, in their order; False where the deadline came first. ``Dead`` when the device is."""
        return all(self._step(job) if isinstance(job, step.StepCase) else self._case(job) for job in jobs)

    def ceilings(self, dtypes: Iterable[str]) -> None:
        """Record what a large copy and large products reach on this device."""
        if "ceilings" not in self.results.header:
            self.results.header["ceilings"] = {}  # a process that ends here leaves that: no other begins it again
            self.results.save()
            found = self.results.header["ceilings"]
            try:
                self.begin("a large copy")
                found["copy_gbps"] = self.floors.copy_gbps
                for dtype in dtypes:
                    self.begin(f"a large product in {dtype}")
                    found.setdefault("gemm_tflops", {})[dtype] = self.floors.gemm_tflops(dtype)
                if self.device.type == "cuda":
                    found["gemm_to_float32"] = accumulating_gemms(self.device, torch.bfloat16)
            except RuntimeError as error:
                if not out_of_memory(error) and dead(error):
                    raise Dead(last_line(error)) from error
                self.say(f"ceilings: {last_line(error)}")
            self.results.save()

    def _case(self, case: Case) -> bool:
        wanted = [p for p in peers.for_case(case) if self.impls is None or p.name in self.impls]
        open_ = [p for p in wanted if (case.suite, case.name, p.name) not in self.results.done()]
        able = []
        for peer in open_:  # what is skipped needs no inputs
            refusal = peer.refusal(case, self.device)
            if refusal is None:
                able.append(peer)
            else:
                self._add(blank(case, peer.name, "skipped", refusal))
        if not able:
            return True
        if time.monotonic() > self.deadline:
            return False
        self._mark((case.suite, case.name, *(p.name for p in able)))  # what ends the process here is met by all
        bench = self._bench(case, able)
        self.results.header.pop("running", None)  # or a deadline that comes now would look like a crash
        if bench is None:
            return True
        for peer in able:
            if time.monotonic() > self.deadline:
                return False
            self._mark((case.suite, case.name, peer.name))
            try:
                found = record(bench, peer, seconds=self.seconds, rounds=self.rounds)
            except Dead as error:
                self._add(blank(case, peer.name, "crashed", str(error)))
                raise
            self._add(found)
        self._first_again(bench, able[0])
        return True

    def _first_again(self, bench: Bench, peer: Peer) -> None:
        """Time the first contender behind the last: what the order did to them is in its record."""
        found = next(r for r in self.results.records if r.key == (bench.case.suite, bench.case.name, peer.name))
        if found.status == "ok" and peer.name == OURS and time.monotonic() <= self.deadline:
            self.begin(f"{found.suite} {found.case} {peer.name} once more")
            self.results.add(again(bench, peer, found, seconds=self.seconds, rounds=self.rounds))

    def _bench(self, case: Case, wanted: Sequence[Peer]) -> Bench | None:
        """Inputs, truth and floor of ``case``; None, with records that say so, where they do not fit."""
        try:
            return Bench(case, self.device, self.floors)
        except Exception as error:
            full = out_of_memory(error)
            gone = Dead(last_line(error)) if not full and dead(error) else None
            status = "oom" if full else "crashed" if gone else "error"
            reason = f"making the inputs, their float64 check and the floor: {last_line(error)}"
        for peer in wanted:  # or the next process would begin here again
            self._add(blank(case, peer.name, status, reason))
        if gone:
            raise gone
        release(self.device)
        return None

    def _step(self, case: step.StepCase) -> bool:
        names = [n for n in step.CONTENDERS if self.impls is None or n in self.impls]
        names = [n for n in names if ("step", case.name, n) not in self.results.done()]
        if not names:
            return True
        if time.monotonic() > self.deadline:
            return False
        found = step.records(case, self.device, impls=names)
        for name in names:  # in the order in which the records come
            self._mark(("step", case.name, name))
            self._add(taken := next(found))
            if taken.status == "crashed":
                raise Dead(taken.reason)
        found.close()
        release(self.device)
        return True

    def _add(self, found: Record) -> None:
        self.results.header.pop("running", None)
        self.results.add(found)
        self.say(str(found))

    def _mark(self, key: tuple[str, ...]) -> None:
        """Leave a note of what runs (suite, case, contenders): a process that dies leaves it behind."""
        self.results.header["running"] = list(key)
        self.results.save()
        self.begin(" ".join(key))

    def _after_crash(self) -> None:
        """What was running has crashed; if all was stopped from outside for the first time, it runs again."""
        header = self.results.header
        key = header.pop("running", None)
        if key is None:
            return
        stopped = header.setdefault("interrupted", [])
        if self.ended is None and key not in stopped:
            stopped.append(key)
            self.results.save()
        else:
            suite, case, *impls = key
            reason = "the process ended while it ran" + (f": {self.ended}" if self.ended else "")
            for impl in impls:
                if (suite, case, impl) not in self.results.done():
                    self.results.add(Record(suite, case, impl, status="crashed", reason=reason))
