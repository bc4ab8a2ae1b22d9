"""A benchmark run in a process of its own: one that dies or never returns costs one record, not the run.

The worker tells on a pipe what it begins and how long that may take; where it dies or says nothing for longer, another
worker goes on with the results that the first one left.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# What a worker is told: descriptor of the pipe, unix time of the end, results to go on with, why the last one ended.
PIPE, DEADLINE, RESULT, ENDED = "CAOP_BENCH_PIPE", "CAOP_BENCH_DEADLINE", "CAOP_BENCH_RESULT", "CAOP_BENCH_ENDED"
MOST_WORKERS = 25
AGAIN, BROKEN = 75, 70  # exit codes of a worker whose device is dead, or that raised; a run that ended has 0, 1 or 2
POLL = 2.0  # seconds
LEAVE = 10.0  # seconds for a worker that was stopped
START = 300.0  # seconds for the imports of a worker
ROOT = Path(__file__).parents[1]


class Lifeline:
    """The worker's end of the pipe; without a supervisor it tells nobody."""

    def __init__(self, descriptor: int | None = None) -> None:
        self._pipe = None if descriptor is None else os.fdopen(descriptor, "w", buffering=1)

    @classmethod
    def of_environment(cls) -> Lifeline:
        """Taken out of the environment: the worker's own children have another supervisor."""
        descriptor = os.environ.pop(PIPE, None)
        return cls(None if descriptor is None else int(descriptor))

    def results(self, path: Path) -> None:
        """Where a worker behind this one should go on."""
        self._tell(results=str(path))

    def begin(self, what: str, seconds: float) -> None:
        """``what`` is begun and takes ``seconds`` at most. BrokenPipeError where the supervisor is gone."""
        self._tell(begin=what, seconds=seconds)

    def _tell(self, **event: Any) -> None:
        if self._pipe is not None:
            print(json.dumps(event), file=self._pipe, flush=True)


def supervise(module: str, arguments: Sequence[str], *, until: float, say: Callable[[str], None]) -> int:
    """Run ``python -m module`` with ``arguments`` to its end, in as many processes as that takes.

    Args:
        module: its main is a worker where ``PIPE`` is in the environment.
        arguments: of the command line.
        until: unix time at which the workers begin nothing new.
        say: called with a line for each worker that did not end by itself.

    Returns:
        The exit code of the last worker; 2 where ``MOST_WORKERS`` died, 130 where the run was stopped.
    """
    told = {DEADLINE: str(until)}
    signal.signal(signal.SIGTERM, _stop)
    for _ in range(MOST_WORKERS):
        try:
            code, ended = _work(module, arguments, told)
        except KeyboardInterrupt:
            say("stopped; run it again and it goes on")
            return 130
        if ended is None:
            return code
        say(f"{ended}; going on in a new process")
        told[ENDED] = ended
    say(f"{MOST_WORKERS} processes died; the results hold what was measured")
    return 2


def _work(module: str, arguments: Sequence[str], told: dict[str, str]) -> tuple[int, str | None]:
    """One worker: its exit code, and what ended it when that was not itself. ``told`` learns of its results."""
    reader, writer = os.pipe()
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    worker = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, **told, PIPE: str(writer), "PYTHONPATH": paths},
        pass_fds=[writer],
    )
    os.close(writer)
    try:
        late = _listen(reader, worker, told)
        code = worker.wait(START) if late is None else None
    except KeyboardInterrupt as stopped:  # the worker ends the tests it runs in a session of their own
        if stopped.args:  # only this process was told
            worker.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(LEAVE)
        raise
    except subprocess.TimeoutExpired:
        late, code = "the process did not end after its last word", None
    finally:
        os.close(reader)
        if worker.poll() is None:
            worker.kill()
        worker.wait()
    if code is None:
        return -signal.SIGKILL, late
    if code == AGAIN:
        return code, "the device was dead"
    if code not in (0, 1, 2):
        return code, f"the process died: {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"
    return code, None


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)


def _listen(reader: int, worker: subprocess.Popen, told: dict[str, str]) -> str | None:
    """Events until the worker is gone; why nobody should wait for it, when it said nothing for too long."""
    held, doing, seconds = b"", "starting", START
    with selectors.DefaultSelector() as selector:
        selector.register(reader, selectors.EVENT_READ)
        limit = time.monotonic() + seconds
        while True:
            left = limit - time.monotonic()
            if left <= 0:
                return f"{doing}: nothing for {seconds:.0f} s"
            if not selector.select(min(left, POLL)):
                if worker.poll() is not None:  # a child of its own may hold the pipe
                    return None
                continue
            chunk = os.read(reader, 1 << 16)
            if not chunk:
                return None
            *lines, held = (held + chunk).split(b"\n")
            for line in lines:
                event = json.loads(line)
                if "results" in event:
                    told[RESULT] = event["results"]
                else:
                    doing, seconds = event["begin"], event["seconds"]
                    limit = time.monotonic() + seconds
