"""How time and memory grow: power laws and straight lines through records that differ in one size only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.groups import OURS, Group, dtype_order, groups, impl_order, impls, suite_order
from benchmarks.records import Record

Variable = Literal["n", "v", "h"]
Quantity = Literal["time", "memory"]
VARIABLES: tuple[Variable, ...] = ("n", "v", "h")
NAMES = {"n": "N", "v": "V", "h": "H"}
POINTS = 3  # different sizes a fit needs
NOISE = 1e-9  # share of a quantity below which its variation is rounding


@dataclass(frozen=True)
class Sweep:
    """Cases of a suite that differ in ``variable`` only.

    Attributes:
        variable: "n", "v" or "h".
        groups: the cases, by growing ``variable``. Where V or H vary they may have different models.
        n, v, h: the sizes that are held; None for the one that varies (and for H at logits level).
        The others are those of ``Record``.
    """

    suite: str
    variable: Variable
    dtype: str | None
    beta: float | None
    head_trained: bool | None
    masked: float
    n: int | None
    v: int | None
    h: int | None
    groups: tuple[Group, ...]

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(g.model for g in self.groups if g.model))

    def x(self, group: Group) -> int:
        return getattr(group, self.variable)

    def points(self, impl: str, quantity: Quantity) -> list[tuple[int, float]]:
        """Sizes, and milliseconds or bytes, where ``impl`` was measured."""
        return [(self.x(g), y) for g in self.groups if (y := value(g.ok(impl), quantity)) is not None]

    def reached(self, impl: str = OURS) -> int:
        """Different sizes ``impl`` was measured at."""
        return len({x for x, _ in self.points(impl, "time")})

    @property
    def impls(self) -> list[str]:
        return impls(self.groups)


@dataclass(frozen=True)
class Fit:
    """Growth of one quantity of one implementation along a sweep.

    Attributes:
        sweep: the cases.
        impl: the implementation.
        quantity: "time" (milliseconds) or "memory" (bytes beyond the inputs).
        points: how many were fitted.
        low, high: smallest and largest size among them.
        exponent: p of y = c x^p, by least squares between the logarithms; None where a value is not positive.
        intercept: a of y = a + b x, by least squares, in ms or bytes.
        slope: b, in ms or bytes per token (N), id (V) or feature (H).
        r2: share of the variance of y that the straight line explains; 1 where y does not vary.
    """

    sweep: Sweep
    impl: str
    quantity: Quantity
    points: int
    low: int
    high: int
    exponent: float | None
    intercept: float
    slope: float
    r2: float


def value(record: Record | None, quantity: Quantity) -> float | None:
    if record is None:
        return None
    return record.time_ms if quantity == "time" else record.peak_bytes


def sweeps(found: Iterable[Group], points: int = POINTS) -> list[Sweep]:
    """Every series of cases with at least ``points`` different sizes, whether or not all could be measured."""
    lines: dict[tuple, list[Group]] = {}
    for group in found:
        for variable in VARIABLES:
            if getattr(group, variable) is None or group.suite == "step":
                continue
            held = tuple(None if name == variable else getattr(group, name) for name in VARIABLES)
            model = group.model if variable == "n" else None  # V and H vary with the model
            setting = group.dtype, group.beta, group.head_trained, group.masked
            lines.setdefault((group.suite, variable, *setting, *held, model), []).append(group)
    made = []
    for (*fields, _model), same in lines.items():
        same = sorted(same, key=lambda g, name=fields[1]: (getattr(g, name), g.model or "", g.case))
        if len({getattr(g, fields[1]) for g in same}) >= points:
            made.append(Sweep(*fields, tuple(same)))
    return sorted(made, key=_order)


def _order(sweep: Sweep) -> tuple:
    beta = -1.0 if sweep.beta is None else sweep.beta
    held = sweep.n or 0, sweep.v or 0, sweep.h or 0
    setting = VARIABLES.index(sweep.variable), dtype_order(sweep.dtype), beta, sweep.head_trained is False, sweep.masked
    return suite_order(sweep.suite), setting, held, sweep.models


def fits(records: Iterable[Record]) -> list[Fit]:
    """The fits of time and memory of every implementation along every sweep that has the points."""
    return [fit for sweep in sweeps(groups(records)) for fit in of_sweep(sweep)]


def of_sweep(sweep: Sweep) -> list[Fit]:
    """Of every implementation with at least ``POINTS`` different sizes, time before memory."""
    made = [fit(sweep, impl, quantity) for impl in sweep.impls for quantity in ("time", "memory")]
    return sorted((f for f in made if f is not None), key=lambda f: (f.quantity != "time", impl_order(f.impl)))


def fit(sweep: Sweep, impl: str, quantity: Quantity) -> Fit | None:
    """None where ``impl`` was measured at fewer than ``POINTS`` different sizes."""
    found = sweep.points(impl, quantity)
    if len({x for x, _ in found}) < POINTS:
        return None
    x, y = [float(size) for size, _ in found], [float(v) for _, v in found]
    exponent = line([math.log(v) for v in x], [math.log(v) for v in y])[1] if min(y) > 0 else None
    return Fit(sweep, impl, quantity, len(found), int(min(x)), int(max(x)), exponent, *line(x, y))


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """a, b and R^2 of the least-squares line y = a + b x; R^2 is 1 where y does not vary.

    Sums are exact, so that every machine finds the same; what rounding leaves of an a of 0 is 0.
    """
    x_mean, y_mean = math.fsum(x) / len(x), math.fsum(y) / len(y)
    x_off, y_off = [v - x_mean for v in x], [v - y_mean for v in y]
    total, noise = math.fsum(v * v for v in y_off), NOISE * max(map(abs, y))
    if total <= noise**2 * len(y):
        return y_mean, 0.0, 1.0
    slope = math.fsum(u * v for u, v in zip(x_off, y_off, strict=True)) / math.fsum(v * v for v in x_off)
    left = math.fsum((v - slope * u) ** 2 for u, v in zip(x_off, y_off, strict=True))
    intercept = y_mean - slope * x_mean
    return intercept if abs(intercept) > noise else 0.0, slope, 1.0 - left / total


def chosen(found: Sequence[Sweep]) -> list[Sweep]:
    """For each suite, variable and dtype the sweep with caop_fast at the most sizes, of those the plainest."""

    def merit(sweep: Sweep) -> tuple:
        last = sweep.groups[-1]
        return sweep.reached(), last.plainness, (sweep.v or 1) * (sweep.h or 1) * (sweep.n or 1), sweep.models

    best: dict[tuple, Sweep] = {}
    for sweep in found:
        key = sweep.suite, sweep.variable, sweep.dtype
        if key not in best or merit(sweep) > merit(best[key]):
            best[key] = sweep
    return list(best.values())
