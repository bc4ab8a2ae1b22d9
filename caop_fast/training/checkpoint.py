"""A training state in one file that is replaced atomically, and Ctrl-C deferred to the end of a step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from caop_fast.calibration.files import replacing


def save_atomically(state: dict[str, Any], path: str | Path) -> None:
    """Write `state` (tensors, plain values) to `path`; a crash leaves the old file or the new one, not half of one."""
    with replacing(path) as file:
        torch.save(state, file)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read what `save_atomically` wrote. Only tensors and plain values are unpickled (``weights_only``)."""
    return torch.load(path, map_location="cpu", weights_only=True)


class InterruptGuard:
    """Defers Ctrl-C until `check`, so that no checkpoint holds half a step; a second one raises immediately."""

    def __init__(self) -> None:
        self.pending = False

    def check(self) -> None:
        """Raise the KeyboardInterrupt that was held back, if there is one."""
        if self.pending:
            raise KeyboardInterrupt

    def _handle(self, signum: int, frame: Any) -> None:
        if self.pending:
            raise KeyboardInterrupt
        self.pending = True


@contextlib.contextmanager
def guard_interrupt() -> Iterator[InterruptGuard]:
    """An active `InterruptGuard`; outside the main thread, where no signal handler can be set, it does nothing."""
    guard = InterruptGuard()
    if threading.current_thread() is not threading.main_thread():
        yield guard
        return
    previous = signal.signal(signal.SIGINT, guard._handle)
    try:
        yield guard
    finally:
        signal.signal(signal.SIGINT, previous)
