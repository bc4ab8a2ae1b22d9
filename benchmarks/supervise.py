"""Runs the benchmarks in a worker process: one that dies or hangs costs one record, not the run.

The worker reports on a pipe what it starts and how long that may take; if it dies or reports nothing for longer,
another worker continues with the results so far.
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

# Passed to a worker: file descriptor of the pipe, unix time of the end, results to resume, why the last one ended.
PIPE, DEADLINE, RESULT, ENDED = "CAOP_BENCH_PIPE", "CAOP_BENCH_DEADLINE", "CAOP_BENCH_RESULT", "CAOP_BENCH_ENDED"
MOST_WORKERS = 25
AGAIN, BROKEN = 75, 70  # exit codes of a worker whose device is dead, or that raised; others are 0, 1 or 2
POLL = 2.0  # seconds
LEAVE = 60.0  # seconds for a worker that was stopped to end
START = 300.0  # seconds for the imports of a worker
ROOT = Path(__file__).parents[1]


class Lifeline:
    """The worker's end of the pipe; without a supervisor it does nothing."""

    def __init__(self, descriptor: int | None = None) -> None:
        self._pipe = None if descriptor is None else os.fdopen(descriptor, "w", buffering=1)

    @classmethod
    def of_environment(cls) -> Lifeline:
        """Removes the pipe from the environment, which the worker's children inherit."""
        descriptor = os.environ.pop(PIPE, None)
        return cls(None if descriptor is None else int(descriptor))

    def results(self, path: Path) -> None:
        """The file that the next worker resumes."""
        self._tell(results=str(path))

    def begin(self, what: str, seconds: float) -> None:
        """``what`` starts and takes ``seconds`` at most. BrokenPipeError if the supervisor is gone."""
        self._tell(begin=what, seconds=seconds)

    def _tell(self, **event: Any) -> None:
        if self._pipe is not None:
            print(json.dumps(event), file=self._pipe, flush=True)


def supervise(module: str, arguments: Sequence[str], *, until: float, say: Callable[[str], None]) -> int:
    """Run ``python -m module`` with ``arguments`` to its end, in as many processes as needed.

    Args:
        module: its main is a worker if ``PIPE`` is in the environment.
        arguments: of the command line.
        until: unix time after which the workers start nothing new.
        say: called with a line for each worker that crashed.

    Returns:
        The exit code of the last worker; 2 if ``MOST_WORKERS`` died, 130 if the run was stopped.
    """
    variables = {DEADLINE: str(until)}
    signal.signal(signal.SIGTERM, _stop)
    for _ in range(MOST_WORKERS):
        try:
            code, ended = _work(module, arguments, variables)
        except KeyboardInterrupt:
            say("stopped; run it again to resume")
            return 130
        if ended is None:
            return code
        say(f"{ended}; continuing in a new process")
        variables[ENDED] = ended
    say(f"{MOST_WORKERS} processes died; the results contain what was measured")
    return 2


def _work(module: str, arguments: Sequence[str], variables: dict[str, str]) -> tuple[int, str | None]:
    """Run one worker: its exit code, and why it crashed or None. Its results file is added to ``variables``."""
    reader, writer = os.pipe()
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    worker = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, **variables, PIPE: str(writer), "PYTHONPATH": paths},
        pass_fds=[writer],
    )
    os.close(writer)
    try:
        late = _listen(reader, worker, variables)
        code = worker.wait(START) if late is None else None
    except KeyboardInterrupt as stopped:  # the worker stops its tests, which run in their own session
        if stopped.args:  # SIGTERM is sent to this process only
            worker.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(LEAVE)
        raise
    except subprocess.TimeoutExpired:
        late, code = "the process did not end after its last report", None
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


def _listen(reader: int, worker: subprocess.Popen, variables: dict[str, str]) -> str | None:
    """Read events until the worker is gone; returns why it should be killed if it reported nothing for too long."""
    held, doing, seconds = b"", "starting", START
    with selectors.DefaultSelector() as selector:
        selector.register(reader, selectors.EVENT_READ)
        limit = time.monotonic() + seconds
        while True:
            left = limit - time.monotonic()
            if left <= 0:
                return f"{doing}: nothing for {seconds:.0f} s"
            if not selector.select(min(left, POLL)):
                if worker.poll() is not None:  # a child of it may keep the pipe open
                    return None
                continue
            chunk = os.read(reader, 1 << 16)
            if not chunk:
                return None
            *lines, held = (held + chunk).split(b"\n")
            for line in lines:
                event = json.loads(line)
                if "results" in event:
                    variables[RESULT] = event["results"]
                else:
                    doing, seconds = event["begin"], event["seconds"]
                    limit = time.monotonic() + seconds
