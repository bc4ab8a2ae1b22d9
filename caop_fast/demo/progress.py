"""Progress on the terminal: a bar a phase with the time left; plain lines where output is not a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

BAR = "{desc:<28} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
QUIET_SECONDS = 20.0  # between two lines of one phase in a log file


class Bar:
    """One phase."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total, self._done, self._open = label, total, 0, True
        self._begin = self._spoke = time.monotonic()
        interactive = sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=label, bar_format=BAR, dynamic_ncols=True) if interactive else None

    def advance_to(self, done: int) -> None:
        """Show that `done` of the total are done."""
        self._done = done
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        elif now - self._spoke > QUIET_SECONDS:
            self._spoke = now
            left = (now - self._begin) * (self._total - done) / max(done, 1)
            print(f"{self._label}: {done}/{self._total}, about {left:.0f} s left", file=sys.stderr, flush=True)

    def close(self) -> None:
        """The phase is over; closing twice does nothing."""
        if not self._open:
            return
        self._open = False
        if self._bar is not None:
            self._bar.close()
        elif self._done >= self._total:
            print(f"{self._label}: done in {time.monotonic() - self._begin:.0f} s", file=sys.stderr, flush=True)

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Progress:
    """Hands out bars, and closes those still open at the end, however it comes."""

    def __init__(self) -> None:
        self._bars: list[Bar] = []

    def bar(self, label: str, total: int) -> Bar:
        """A new bar below the others."""
        self._bars.append(Bar(label, total))
        return self._bars[-1]

    def say(self, text: str) -> None:
        """A line above the bars."""
        tqdm.write(text, file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for bar in self._bars:
            bar.close()
