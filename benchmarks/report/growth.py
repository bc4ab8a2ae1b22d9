"""The part of the report that shows how time and memory scale."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.records import OURS
from benchmarks.report.fits import NAMES, POINTS, Fit, Sweep, of_sweep
from benchmarks.report.groups import setting
from benchmarks.report.tables import NOTHING, escape, listed, number, table

GROWTH = (OURS, "caop_fast-min", "official", "plain")  # the implementations that are shown


def growth(sweeps: Sequence[Sweep], of: int) -> list[str]:
    """Fits along the sweeps that were chosen from ``of``."""
    blocks = [(sweep, [f for f in of_sweep(sweep) if f.impl in GROWTH]) for sweep in sweeps]
    blocks = [(sweep, found) for sweep, found in blocks if found]
    if not blocks:
        return []
    lines = [
        "Time and memory of cases that differ in one size: the exponent p of c x^p, and the straight line a + b x with "
        "its coefficient of determination R^2, both by least squares. A fixed cost makes p smaller than the exponent "
        f"of the rest. One series is shown for each suite, size and dtype, out of {of} with at least {POINTS} sizes.",
        "",
    ]
    headers = ["series", "quantity", "implementation", "range", "points", "p", "a", "b", "R^2"]
    rows = []
    for sweep, found in blocks:
        last = None
        for fit in found:
            series, quantity = _series(sweep) if last is None else "", fit.quantity if fit.quantity != last else ""
            rows.append([series, quantity, *_fit(fit)])
            last = fit.quantity
    return lines + table(headers, rows, left=3)


def _series(sweep: Sweep) -> str:
    held = [f"{NAMES[name]} {value}" for name in NAMES if (value := getattr(sweep.shape, name)) is not None]
    words = [
        f"{sweep.suite} by {NAMES[sweep.variable]}",
        *map(escape, sweep.models),
        *held,
        *setting(sweep.shape),
    ]
    return listed(words)


def _fit(fit: Fit) -> list[str]:
    """a in ms or MB, b in µs or kB per token, id or feature."""
    scale, whole, small = (1.0, "ms", "µs") if fit.quantity == "time" else (1e-6, "MB", "kB")
    per = {"n": "token", "v": "id", "h": "feature"}[fit.sweep.variable]
    name, exponent = NAMES[fit.sweep.variable], NOTHING if fit.exponent is None else f"{fit.exponent:.2f}"
    a, b = f"{number(scale * fit.intercept)} {whole}", f"{number(1e3 * scale * fit.slope)} {small}/{per}"
    return [escape(fit.impl), f"{name} {fit.low}–{fit.high}", str(fit.points), exponent, a, b, f"{fit.r2:.3f}"]
