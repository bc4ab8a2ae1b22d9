"""Plots of a results file: time and memory against N, and gradient error against time.

``plan`` lists them without matplotlib; ``draw`` needs it, but no display. An implementation has the same colour in
every plot.
"""

from __future__ import annotations

import io
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.records import OURS, Record, Results
from benchmarks.report.fits import Quantity, Sweep, chosen, sweeps
from benchmarks.report.groups import (
    Group,
    by,
    described,
    dtype_order,
    groups,
    impl_order,
    largest_common,
    setting,
    target_case,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INSTALL = "pip install matplotlib"
DPI = 120
PALETTE = 128
INK, SOFT, LINE = "#1c2024", "#5b6570", "#dde1e6"
COLOURS = {
    OURS: "#0072b2",
    "caop_fast-min": "#4da3d9",
    "caop_fast-inplace": "#1f4e79",
    "caop_fast-rows": "#7b9fd4",
    "caop_fast-bf16-logits": "#3c5fa8",
    "official": "#d55e00",
    "official-compiled": "#f0a060",
    "plain": "#6b6b6b",
    "plain-compiled": "#949494",
    "trl-chunked": "#009e73",
    "trl-chunked-logprob": "#5fbf9f",
    "trl-logprob-entropy": "#2f7f5f",
    "liger-fused-linear-jsd": "#cc79a7",
    "liger-chunked-jsd": "#8e3f7a",
    "liger-jsd": "#e39ac4",
    "liger-kl-div": "#6a51a3",
    "cut-cross-entropy": "#a50f15",
    "flash-attn-ce": "#8c6d1f",
}
OTHERS = ("#b8860b", "#3f8f8f", "#7f3f3f", "#5a7d2a", "#9467bd", "#e377c2")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
FEWEST = 4  # implementations a comparison of errors needs
SIZES = 2  # different N a line needs


@dataclass(frozen=True)
class Picture:
    """A plot: of a sweep of N, or of one case.

    Attributes:
        suite: the section that shows it.
        name: of the file.
        title: two lines: what is drawn, and the shape and dtype.
        of: the sweep or the case.
    """

    suite: str
    name: str
    title: str
    of: Sweep | Group

    @property
    def alt(self) -> str:
        return self.title.replace("\n", "; ")


def unavailable() -> str | None:
    """Why plots cannot be drawn here, or None."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return f"matplotlib is not installed ({INSTALL})"
    return None


def plan(results: Results) -> list[Picture]:
    """The plots of a results file, scaling before errors in each suite and dtype."""
    found = [g for g in groups(results.records) if g.suite != "step"]
    stem, device = results.path.stem, results.header.get("device") or "device not known"
    made = []
    for sweep in chosen([s for s in sweeps(found, SIZES) if s.variable == "n"]):
        if max((sweep.reached(impl) for impl in sweep.impls), default=0) >= SIZES:
            sizes = [f"{name} {value}" for name, value in (("V", sweep.shape.v), ("H", sweep.shape.h)) if value]
            where = ", ".join([*sweep.models, *sizes, *setting(sweep.shape)])
            title = f"{sweep.suite}: time and memory against N, {device}\n{where}"
            made.append(Picture(sweep.suite, f"{stem}-{sweep.suite}-{sweep.shape.dtype}-growth.png", title, sweep))
    for suite, same in by(found, lambda g: g.suite).items():
        group = target_case(same) or largest_common(same)
        if group is not None and len(_placed(group)) >= FEWEST:
            title = f"{suite}: gradient error against time, {device}\n{described(group)}"
            made.append(Picture(suite, f"{stem}-{suite}-error.png", title, group))
    return sorted(made, key=lambda p: (p.suite, dtype_order(p.of.shape.dtype), isinstance(p.of, Group)))


def draw(picture: Picture, path: Path) -> None:
    """Write ``picture`` as a PNG with a palette, a quarter of the size."""
    from PIL import Image  # matplotlib needs it

    if isinstance(picture.of, Sweep):
        figure = growth(picture.of, picture.title)
    else:
        figure = errors(picture.of, picture.title)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = io.BytesIO()
    figure.savefig(pixels, format="png", dpi=DPI, facecolor="white")
    Image.open(pixels).convert("RGB").quantize(PALETTE, dither=Image.Dither.NONE).save(path, "PNG", optimize=True)


def colour(impl: str) -> str:
    """Its own, or one that depends on the name only."""
    return COLOURS.get(impl) or OTHERS[zlib.crc32(impl.encode()) % len(OTHERS)]


def marker(impl: str) -> str:
    """By its position among the known ones; the first is that of caop_fast only."""
    if impl == OURS:
        return MARKERS[0]
    place = list(COLOURS).index(impl) - 1 if impl in COLOURS else zlib.crc32(impl.encode())
    return MARKERS[1 + place % (len(MARKERS) - 1)]


def growth(sweep: Sweep, title: str) -> Figure:
    """Time against N beside memory against N, a line for each implementation."""
    figure = _figure(12, 5.2, title)
    left, right = figure.subplots(1, 2)
    names = [impl for impl in sweep.impls if sweep.points(impl, "time")]
    most = max((y for impl in names for _, y in sweep.points(impl, "memory")), default=0)
    scale, unit = (1e-9, "GB") if most >= 2e9 else (1e-6, "MB")
    panels: tuple[tuple[Axes, Quantity, float, str], ...] = (
        (left, "time", 1.0, "time, ms"),
        (right, "memory", scale, f"peak memory beyond the inputs, {unit}"),
    )
    for axes, quantity, scale, label in panels:
        for impl in reversed(names):  # caop_fast on top
            if points := [(x, scale * y) for x, y in sweep.points(impl, quantity) if y > 0]:
                axes.plot(*zip(*points, strict=True), label=_label(sweep, impl), **_style(impl))
        _sizes(axes, sweep, label)
    floors = {sweep.x(g): (r.floor_ms, r.floor) for g in sweep.groups for r in g.measured if r.floor_ms}
    if floors:
        points = [(x, floors[x][0]) for x in sorted(floors)]
        kind = floors[points[0][0]][1] or ""
        name = {"gemms": "bare GEMMs", "copy": "read and written once"}.get(kind, "floor")
        left.plot(
            *zip(*points, strict=True), label=f"floor: {name}", color=INK, linestyle="--", linewidth=1.4, zorder=2
        )
    handles, labels = left.get_legend_handles_labels()
    order = [len(names) - 1 - i for i in range(len(names))] + list(range(len(names), len(handles)))
    figure.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="outside right center",
        frameon=False,
        fontsize=9.5,
        labelspacing=0.9,
    )
    return figure


def _label(sweep: Sweep, impl: str) -> str:
    """The name, and the smallest size at which it ran out of memory."""
    over = [sweep.x(g) for g in sweep.groups if (r := g.records.get(impl)) is not None and r.status == "oom"]
    return f"{impl}\n(out of memory at {min(over)})" if over else impl


def _style(impl: str) -> dict[str, Any]:
    ours, variant = impl == OURS, impl != OURS and impl.startswith(OURS)
    return {
        "color": colour(impl),
        "marker": marker(impl),
        "linewidth": 3.2 if ours else 1.5,
        "markersize": 7.5 if ours else 5.0,
        "linestyle": (0, (4, 1.5)) if variant else "-",
        "zorder": 5 if ours else 3,
    }


def _sizes(axes: Axes, sweep: Sweep, label: str) -> None:
    """Logarithmic axes with ticks at the measured sizes."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({sweep.x(g) for g in sweep.groups})
    axes.set_xticks(ticks, [str(x) for x in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    _decades(axes.yaxis)
    axes.set_xlabel("tokens N")
    _plain(axes, label)


def _plain(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.grid(True, which="major", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(SOFT)
    axes.tick_params(colors=SOFT, which="both")


def _figure(width: float, height: float, title: str) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title.replace("$", r"\$"), x=0.01, ha="left", fontsize=11, color=INK)
    return figure


def _placed(group: Group) -> list[Record]:
    """Those that can be shown on logarithmic axes."""
    return [r for r in group.measured if r.grad_error is not None and r.grad_error > 0]


def errors(group: Group, title: str) -> Figure:
    """Gradient error against time on one case, a point for each implementation."""
    figure = _figure(9, 5.6, title)
    axes = figure.subplots()
    for r in sorted(_placed(group), key=lambda r: impl_order(r.impl)):
        assert r.grad_error is not None
        size, name = 11 if r.impl == OURS else 8, r.impl.replace("$", r"\$")
        axes.plot(r.ms, r.grad_error, marker(r.impl), color=colour(r.impl), markersize=size, label=name, zorder=5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(_room(axes.get_xlim(), 3))
    axes.set_ylim(_room(axes.get_ylim(), 10))
    _decades(axes.xaxis)
    _decades(axes.yaxis)
    axes.set_xlabel("time, ms")
    _plain(axes, "relative gradient error against float64")
    axes.text(0.005, 0.01, "better: left and down", transform=axes.transAxes, color=SOFT, fontsize=9, style="italic")
    figure.legend(loc="outside right center", frameon=False, fontsize=9.5, labelspacing=0.9)
    return figure


def _decades(axis: Axis) -> None:
    """A logarithmic axis with plain numbers, more of them if its range is small."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if high / low < 300 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _room(limits: tuple[float, float], least: float) -> tuple[float, float]:
    """Limits so wide that noise does not look like a difference."""
    middle = math.sqrt(limits[0] * limits[1])
    half = max(1.5 * math.sqrt(limits[1] / limits[0]), math.sqrt(least))
    return middle / half, middle * half
