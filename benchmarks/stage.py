"""The correctness stage of a run, in the header of its results: what is decided stays so, whatever ends the process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import correctness, kernel_tests
from benchmarks.correctness import Check
from benchmarks.measure import alive
from benchmarks.peers.ours import backend
from benchmarks.records import Results
from benchmarks.run import Dead

LOSSES = 0.6  # of the time; the rest is for the kernels' own tests
CHECKS = "checks"  # in the header while some are open: {"decided": {name: [outcome, detail]}, "running", ...}


@dataclass
class Stage:
    """Checks every loss and every kernel, the latter where kernels run.

    Attributes:
        results: whose header takes the outcome.
        device: to check on.
        deadline: ``time.monotonic()`` from which nothing new is begun.
        seconds: for the whole stage; 0 for none of it.
        begin: called with a check's name, and how many seconds more than usual it may take.
        say: called with a line for each failure, and one at the end.
        ended: why the process before this one ended, where it is known that it did so by itself.
        only: kernel tests whose file name holds this; None for all.
    """

    results: Results
    device: torch.device
    deadline: float
    seconds: float
    begin: Callable[[str, float], None]
    say: Callable[[str], None]
    ended: str | None = None
    only: str | None = None

    def run(self) -> int:
        """How many checks failed, now or earlier in this file. ``Dead`` when one of them left the device so."""
        header = self.results.header
        if self.seconds > 0 and (CHECKS in header or "correctness" not in header):
            state = header.setdefault(CHECKS, {"decided": {}, "running": None, "interrupted": []})
            self._after_crash(state)
            open_ = self._check(state)
            decided = [Check(name, *rest) for name, rest in state["decided"].items()]
            header["correctness"] = correctness.summary([*decided, *open_])
            if not open_:
                del header[CHECKS]
            self.results.save()
        summary = header.get("correctness")
        if summary is None:
            self.say("correctness: not checked")
            return 0
        self.say(f"correctness: {summary['passed']} passed, {summary['failed']} failed, {summary['skipped']} skipped")
        if not alive(self.device):
            raise Dead("a correctness check left it so")
        return summary["failed"]

    def _after_crash(self, state: dict[str, Any]) -> None:
        """A check that was running fails; if all was stopped from outside for the first time, it runs again."""
        name, state["running"] = state["running"], None
        if name is None:
            return
        if self.ended is None and name not in state["interrupted"]:
            state["interrupted"].append(name)
        else:
            state["decided"][name] = ["failed", f"the process ended in it: {self.ended or 'for the second time'}"]

    def _check(self, state: dict[str, Any]) -> list[Check]:
        """Run what is not decided; what is still open then, with the reason."""
        open_: list[Check] = []

        def begin(name: str, more: float = 0.0) -> None:
            state["running"] = name
            self.results.save()
            self.begin(name, more)

        def report(found: Check) -> None:
            state["running"] = None
            if found.outcome == "skipped" and found.detail.startswith(correctness.UNREACHED):
                open_.append(found)
                return
            state["decided"][found.name] = [found.outcome, found.detail]
            self.results.save()
            if found.outcome == "failed":
                self.say(f"FAILED  {found.name}: {found.detail}")

        chosen = "triton" if self.device.type == "cuda" else backend()
        if self.ended is None or "begun" not in state:  # processes of one command share the time
            state["begun"] = time.time()
        start = time.monotonic() - (time.time() - state["begun"])
        share = LOSSES if chosen == "triton" else 1.0
        correctness.check_losses(
            self.device,
            chosen,
            sizes="full" if self.device.type == "cuda" else "small",
            deadline=min(self.deadline, start + share * self.seconds),
            decided=state["decided"],
            begin=begin,
            report=report,
        )
        if chosen == "triton":  # elsewhere no kernel runs
            until = min(self.deadline, start + self.seconds)
            self.begin("kernel tests", max(0.0, until - time.monotonic()))  # they are stopped when it is over
            tests = [name for name in state["decided"] if "::" in name]
            kernel_tests.check_kernels(self.device, only=self.only, deadline=until, decided=tests, report=report)
        return open_
