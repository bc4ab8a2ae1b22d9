"""Runs a script's cases on several ranks over gloo, and brings home what each rank found, case by case.

The script calls ``report`` with its cases; the test calls ``run``. A case returns what it found; what it raises ends
the run of its rank, since the others would wait for it. They then fail as well, and cases that did not run are missing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from helpers import subprocesses

DEADLINE = 120  # seconds for all ranks
PATIENCE = timedelta(seconds=20)  # of a collective that not all ranks take part in

Case = Callable[[], Any]
Found = list[dict[str, Any]]  # {case: what it found} of each rank


def run(script: str, n_ranks: int, folder: Path, environment: dict[str, str] | None = None) -> Found:
    """What the ranks of the module ``script`` found; fails rather than waits for ranks that wait for each other."""
    environment = subprocesses.environment() if environment is None else dict(environment)
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    log = folder / "log.txt"
    with open(log, "w") as output:
        command = [sys.executable, "-m", script, str(folder), str(n_ranks)]
        first = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=subprocesses.ROOT,
            start_new_session=True,
        )
        with suppress(subprocess.TimeoutExpired):
            first.wait(DEADLINE)
        with suppress(ProcessLookupError):  # the ranks are of its session
            os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    found = [_read(folder / f"{rank}.json") for rank in range(n_ranks)]
    if not all(found):
        pytest.fail(f"not every rank of {script} reported within {DEADLINE} s\n{log.read_text()[-6000:]}")
    return found


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def healthy(found: Found, name: str) -> list[dict[str, Any]]:
    """What the ranks found in a case, none of it amiss."""
    for rank, cases in enumerate(found):
        assert name in cases, f"rank {rank} stopped before {name}: {list(cases.values())[-1]}"
        assert not cases[name].get("trouble"), f"rank {rank}: {cases[name]['trouble']}"
    return [cases[name] for cases in found]


def report(cases: Callable[[int], Iterator[tuple[str, Case]]]) -> None:
    """Run the cases of all ranks, each in a process forked here: importing torch once a rank would take longest."""
    folder, n_ranks = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    ranks = []
    for rank in range(n_ranks):
        if child := os.fork():
            ranks.append(child)
            continue
        status = 1
        try:
            _run_rank(cases, folder, rank, n_ranks)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    for child in ranks:
        os.waitpid(child, 0)


def _run_rank(cases: Callable[[int], Iterator[tuple[str, Case]]], folder: Path, rank: int, n_ranks: int) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=n_ranks, timeout=PATIENCE
    )
    found: dict[str, Any] = {}
    name = "the first case"
    try:
        for name, case in cases(rank):
            found[name] = case()
    except Exception:
        found[name] = {"trouble": [traceback.format_exc()[-3000:]]}
        raise
    finally:
        (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()  # a rank that leaves early would break the others' last collective
