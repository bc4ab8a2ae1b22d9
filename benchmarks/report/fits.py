"""How time and memory scale: power laws and straight lines fitted to records that differ in one size only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.records import OURS, Record, Shape
from benchmarks.report.groups import Group, groups, impl_order, impls, setting_order, suite_order

Variable = Literal["n", "v", "h"]
Quantity = Literal["time", "memory"]
VARIABLES: tuple[Variable, ...] = ("n", "v", "h")
NAMES = {"n": "N", "v": "V", "h": "H"}
POINTS = 3  # different sizes a fit needs
NOISE = 1e-9  # share of a quantity below which its variation is rounding


@dataclass(frozen=True)
class Sweep:
    """Cases of a suite that differ in one size only.

    Attributes:
        suite: of the cases.
        variable: the size that varies, "n", "v" or "h".
        shape: what is equal in all cases. Where V or H vary they may have different models.
        groups: the cases, by increasing size.
    """

    suite: str
    variable: Variable
    shape: Shape
    groups: tuple[Group, ...]

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(g.shape.model for g in self.groups if g.shape.model))

    def x(self, group: Group) -> int:
        return int(getattr(group.shape, self.variable))

    def points(self, impl: str, quantity: Quantity) -> list[tuple[int, float]]:
        """Sizes, and milliseconds or bytes, where ``impl`` was measured."""
        return [(self.x(g), y) for g in self.groups if (y := value(g.ok(impl), quantity)) is not None]

    def reached(self, impl: str = OURS) -> int:
        """Number of different sizes that ``impl`` was measured at."""
        return len({x for x, _ in self.points(impl, "time")})

    @property
    def impls(self) -> list[str]:
        return impls(self.groups)


@dataclass(frozen=True)
class Fit:
    """Scaling of one quantity of one implementation along a sweep.

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
    lines: dict[tuple[str, Variable, Shape, str | None], list[Group]] = {}
    for group in found:
        for variable in VARIABLES:
            if getattr(group.shape, variable) is None or group.suite == "step":
                continue
            model = group.shape.model if variable == "n" else None  # V and H vary with the model
            held = group.shape.without("model").without(variable)
            lines.setdefault((group.suite, variable, held, model), []).append(group)
    made = [
        Sweep(suite, variable, held, tuple(sorted(same, key=_size_order(variable))))
        for (suite, variable, held, _), same in lines.items()
        if len({getattr(g.shape, variable) for g in same}) >= points
    ]
    return sorted(made, key=_order)


def _size_order(variable: Variable) -> Callable[[Group], tuple[int, str, str]]:
    return lambda group: (getattr(group.shape, variable), group.shape.model or "", group.case)


def _order(sweep: Sweep) -> tuple[Any, ...]:
    s = sweep.shape
    held = s.n or 0, s.v or 0, s.h or 0
    return suite_order(sweep.suite), VARIABLES.index(sweep.variable), setting_order(s), held, sweep.models


def fits(records: Iterable[Record]) -> list[Fit]:
    """The fits of time and memory of every implementation along every sweep that has the points."""
    return [fit for sweep in sweeps(groups(records)) for fit in of_sweep(sweep)]


def of_sweep(sweep: Sweep) -> list[Fit]:
    """The fits of every implementation with at least ``POINTS`` different sizes, time before memory."""
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

    Sums are exact, so that all machines get the same result; an a within rounding error of 0 is 0.
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
    """For each suite, variable and dtype the sweep with caop_fast at the most sizes; of those the plainest."""

    def merit(sweep: Sweep) -> tuple[Any, ...]:
        last, s = sweep.groups[-1], sweep.shape
        return sweep.reached(), last.plainness, (s.v or 1) * (s.h or 1) * (s.n or 1), sweep.models

    best: dict[tuple[str, str, str | None], Sweep] = {}
    for sweep in found:
        key = sweep.suite, sweep.variable, sweep.shape.dtype
        if key not in best or merit(sweep) > merit(best[key]):
            best[key] = sweep
    return list(best.values())
