"""End a call that would never end; for tests of what must not take quadratic time."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

HANG_SECONDS = 30.0  # of this process's own CPU time, so that a busy machine does not count


@contextlib.contextmanager
def ended_if_it_hangs() -> Iterator[None]:
    """Raise TimeoutError in a body that hangs, also inside of a regular expression: matching looks for signals."""

    def end(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"hangs: not done after {HANG_SECONDS} s of CPU time")

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, HANG_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
