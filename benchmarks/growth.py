"""The part of the report that shows how time and memory grow."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.fits import NAMES, POINTS, Fit, Sweep, of_sweep
from benchmarks.groups import OURS, setting
from benchmarks.tables import NOTHING, escape, listed, number, table

GROWTH = (OURS, "caop_fast-min", "official", "plain")  # whose growth is shown


def growth(sweeps: Sequence[Sweep], of: int) -> list[str]:
    """Fits along the sweeps that were chosen of ``of`` there are."""
    blocks = [(sweep, [f for f in of_sweep(sweep) if f.impl in GROWTH]) for sweep in sweeps]
    blocks = [(sweep, found) for sweep, found in blocks if found]
    if not blocks:
        return []
    lines = [
        "Time and memory along cases that differ in one size: the exponent p of c x^p, and the straight line a + b x "
        "with the share R^2 of the variance that it explains, both by least squares. Where a fixed cost weighs, p is "
        "smaller than the growth of the rest. One series is shown for each suite, size and dtype, of "
        f"{of} that have {POINTS} sizes or more.",
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
    held = [f"{NAMES[name]} {value}" for name in NAMES if (value := getattr(sweep, name)) is not None]
    words = [
        f"{sweep.suite} by {NAMES[sweep.variable]}",
        *map(escape, sweep.models),
        *held,
        *setting(sweep.dtype, sweep.beta, sweep.head_trained, sweep.masked),
    ]
    return listed(words)


def _fit(fit: Fit) -> list[str]:
    """a in ms or MB, b in µs or kB per token, id or feature: both a thousandth."""
    scale, whole, small = (1.0, "ms", "µs") if fit.quantity == "time" else (1e-6, "MB", "kB")
    per = {"n": "token", "v": "id", "h": "feature"}[fit.sweep.variable]
    name, exponent = NAMES[fit.sweep.variable], NOTHING if fit.exponent is None else f"{fit.exponent:.2f}"
    a, b = f"{number(scale * fit.intercept)} {whole}", f"{number(1e3 * scale * fit.slope)} {small}/{per}"
    return [escape(fit.impl), f"{name} {fit.low}–{fit.high}", str(fit.points), exponent, a, b, f"{fit.r2:.3f}"]
