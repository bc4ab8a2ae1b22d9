"""Progress on the terminal: a bar per phase with the time left; plain lines where the output is not a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

QUIET_SECONDS = 20.0  # between two lines of one phase where the output is not a terminal


class Bar:
    """One phase."""

    def __init__(self, label: str, total: int, bars: Bars | None) -> None:
        self._label, self._total, self._done, self._bars = label, total, 0, bars
        self._begin = self._spoke = time.monotonic()
        self._task = bars.add_task(label, total=total) if bars else None

    def advance_to(self, done: int) -> None:
        """Show that `done` of the total are done."""
        self._done = done
        now = time.monotonic()
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=done)
        elif done >= self._total:
            print(f"{self._label}: done in {now - self._begin:.0f} s", file=sys.stderr, flush=True)
        elif now - self._spoke > QUIET_SECONDS:
            self._spoke = now
            left = (now - self._begin) * (self._total - done) / max(done, 1)
            print(f"{self._label}: {done}/{self._total}, about {left:.0f} s left", file=sys.stderr, flush=True)


class Progress:
    """Hands out bars and shows them together while the block lasts."""

    def __init__(self) -> None:
        console = Console(stderr=True, highlight=False)
        columns = (TextColumn("{task.description:<28}"), BarColumn(), TaskProgressColumn(), MofNCompleteColumn())
        self._bars = Bars(*columns, TimeRemainingColumn(elapsed_when_finished=True), console=console)
        self._interactive = console.is_terminal

    def bar(self, label: str, total: int) -> Bar:
        """A new bar below the others; its clock starts now."""
        return Bar(label, total, self._bars if self._interactive else None)

    def say(self, text: str) -> None:
        """A line above the bars."""
        if self._interactive:
            self._bars.console.print(text, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        if self._interactive:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
