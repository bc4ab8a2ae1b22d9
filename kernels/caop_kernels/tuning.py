"""Autotuning, off unless asked for: `set_autotune(True)`, or CAOP_AUTOTUNE=1 in the environment.

The table in `launch.py` is the same on every machine of a kind, so equal inputs give equal bits. With autotuning, the
first call of a kernel with new dtypes, alignment, options or vocabulary on a device times a few configurations on the
caller's own tensors and keeps the fastest for the rest of the process: threads then own other columns, so the last bits
of a sum may differ from those of the table, and from run to run when two configurations are close.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable
from dataclasses import replace

import torch
import triton.testing

from caop_kernels.launch import RowLaunch

# Tiles per trip of the loop, and threads per program (as a multiple of the table's), that are tried.
UNROLLS = (1, 2, 4)
WIDTHS = (0.5, 1, 2)

_enabled = os.environ.get("CAOP_AUTOTUNE", "0") == "1"
_fastest: dict[Hashable, RowLaunch] = {}


def set_autotune(on: bool) -> None:
    """Switch autotuning on or off in this process. Off forgets what was found: the table counts again."""
    global _enabled
    if not isinstance(on, bool):
        raise TypeError(f"on must be True or False, got {on!r}")
    _enabled = on
    if not on:
        _fastest.clear()


def candidates(table: RowLaunch) -> list[RowLaunch]:
    """Configurations to try, the table's own first."""
    found = [table]
    for width in WIDTHS:
        threads, warps = int(table.threads * width), int(table.num_warps * width)
        if warps:
            found += [replace(table, threads=threads, num_warps=warps, unroll=unroll) for unroll in UNROLLS]
    return list(dict.fromkeys(found))


def chosen(key: Hashable, device: torch.device, table: RowLaunch, run: Callable[[RowLaunch], None]) -> RowLaunch:
    """The configuration to launch with: the table's, or with autotuning the fastest for `key` on this device.

    `run` launches the kernel with a configuration; it must be harmless to run it again and again.
    """
    if not _enabled:
        return table
    key = (key, device, table)
    if key not in _fastest:
        _fastest[key] = min(candidates(table), key=lambda config: _milliseconds(lambda: run(config), device))
    return _fastest[key]


def _milliseconds(run: Callable[[], None], device: torch.device) -> float:
    if device.type != "cpu":
        return triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")
    run()
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)
