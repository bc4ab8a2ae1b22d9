"""Plots of a calibration report, drawn with matplotlib (extra `audit`) without a display and without pyplot.

Every function returns a `matplotlib.figure.Figure`; `to_svg` and `to_png` turn it into bytes. A model has one colour in
every picture (`model_colors`), from the colour-blind-safe palette of Okabe and Ito.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from caop_fast.calibration.answers import ModelAnswers
from caop_fast.calibration.counts import Binning
from caop_fast.calibration.metrics import metrics_of, reliability_bins_of, risk_coverage_of
from caop_fast.calibration.table import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INSTALL = "pip install caop-fast[audit]"
KNOWN_COLORS = {
    "base": "#7f7f7f",
    "before": "#7f7f7f",
    "opd": "#d55e00",
    "caop": "#0072b2",
    "after": "#0072b2",
    "direct": "#009e73",
    "masked": "#e69f00",
}
OTHER_COLORS = ("#cc79a7", "#56b4e9", "#8c6d1f", "#6a51a3", "#a50f15", "#3f8f8f")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
THEMES = {
    "light": {"ink": "#1c2024", "soft": "#5b6570", "line": "#dde1e6", "back": "#ffffff", "gap": "#d62728"},
    "dark": {"ink": "#e6e8eb", "soft": "#a2abb5", "line": "#343a42", "back": "#15181c", "gap": "#ff5c5c"},
}
TITLE: dict[str, Any] = {"loc": "left", "fontsize": 9.5, "weight": "bold"}
RARE = 0.01  # bins with a smaller share of the answers are drawn pale


def plots_unavailable() -> str | None:
    """None when plots can be drawn here, else the reason in a sentence that says what to install."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return f"The plots need matplotlib: {INSTALL}"
    return None


def model_colors(names: Iterable[str]) -> dict[str, str]:
    """A colour (#rrggbb) per model: fixed for the known names, else the next free one in order of appearance."""
    names = list(dict.fromkeys(names))
    taken = {KNOWN_COLORS[name] for name in names if name in KNOWN_COLORS}
    # palette colours before the reserved ones, so that "caop" is blue in every plot
    free = [*OTHER_COLORS, *(c for c in dict.fromkeys(KNOWN_COLORS.values()) if c not in taken)]
    rest = [name for name in names if name not in KNOWN_COLORS]
    return {
        **{n: KNOWN_COLORS[n] for n in names if n in KNOWN_COLORS},
        **{n: free[i % len(free)] for i, n in enumerate(rest)},
    }


def to_svg(figure: Figure) -> bytes:
    """The figure as SVG with text as outlines (needs no fonts); the same figure gives the same bytes."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "caop-fast"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, facecolor=figure.get_facecolor())
    return buffer.getvalue()


def to_png(figure: Figure, *, dpi: float = 160) -> bytes:
    """The figure as PNG at `dpi` dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor=figure.get_facecolor())
    return buffer.getvalue()


def says_and_is_right(model: ModelAnswers) -> str:
    """The title of a model's panel: "says 90 %, right 43 % of the time", over the answers whose confidence was read."""
    metrics = metrics_of(model.answers)
    if metrics["mean_confidence"] is None:
        return "states no readable confidence"
    return f"says {100 * metrics['mean_confidence']:.0f} %, right {100 * metrics['accuracy']:.0f} % of the time"


@contextmanager
def _theme(name: str) -> Iterator[dict[str, str]]:
    import matplotlib

    if name not in THEMES:
        raise ValueError(f"theme must be 'light' or 'dark', got {name!r}")
    theme = THEMES[name]
    with matplotlib.rc_context(
        {
            "font.family": ["DejaVu Sans"],
            "font.size": 9,
            "text.color": theme["ink"],
            "text.parse_math": False,  # a model called "$x" is a name, not a formula
            "axes.labelcolor": theme["ink"],
            "axes.edgecolor": theme["soft"],
            "axes.facecolor": theme["back"],
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "xtick.color": theme["soft"],
            "ytick.color": theme["soft"],
            "grid.color": theme["line"],
            "figure.facecolor": theme["back"],
            "legend.frameon": False,
        }
    ):
        yield theme


def _percent_axis(axis: Any, *, step: float = 0.25) -> None:
    axis.set_ticks(np.arange(0, 1 + step / 2, step))
    axis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")


def reliability_diagram(
    models: Sequence[ModelAnswers],
    *,
    n_bins: int = 10,
    edges: str = "official",
    columns: int = 3,
    theme: str = "light",
    colors: Mapping[str, str] | None = None,
    names: bool = True,
) -> Figure:
    """Small multiples, a panel per model: accuracy against stated confidence, and under it how often each was stated.

    Points lie at (mean confidence, accuracy) of a bin, with 95 % Wilson intervals; the shaded distance to the diagonal,
    weighted by the bin's size and summed, is the ECE. `names=False` leaves the model's name out.

    Raises ValueError for no models or columns < 1, ImportError without matplotlib.
    """
    if not models or columns < 1:
        raise ValueError(f"needs at least one model and one column, got {len(models)} models and columns={columns}")
    reason = plots_unavailable()
    if reason:
        raise ImportError(reason)
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    colors = colors or model_colors(model.name for model in models)
    columns = min(columns, len(models))
    rows = math.ceil(len(models) / columns)
    with _theme(theme) as look:
        layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
        figure = Figure(figsize=(3.1 * columns, 3.9 * rows), layout=layout)
        cells = np.asarray(figure.subfigures(rows, columns, squeeze=False)).ravel()
        for model, cell in zip(models, cells, strict=False):
            upper, lower = cell.subplots(2, 1, sharex=True, height_ratios=(4, 1))
            _reliability_panel(upper, lower, model, colors[model.name], look, Binning(n_bins, edges))
            title = says_and_is_right(model)
            if names:
                title = f"{printable(model.name)}\n{title}"
            cell.suptitle(title, x=0.04, ha="left", fontsize=9.5, weight="bold")
        if len(cells) > len(models):
            _how_to_read(cells[len(models)], look)
    return figure


def _reliability_panel(
    upper: Axes, lower: Axes, model: ModelAnswers, color: str, look: Mapping[str, str], binning: Binning
) -> None:
    metrics = metrics_of(model.answers, binning)
    bins = [b for b in reliability_bins_of(model.answers, binning) if b.count]
    total = sum(b.count for b in bins)
    upper.plot([0, 1], [0, 1], color=look["soft"], lw=1, ls=(0, (4, 3)), zorder=1)
    for b in bins:
        if b.mean_confidence is None or b.accuracy is None:
            continue
        strength = 1.0 if b.count >= RARE * total else 0.3  # bins of a few answers must not stand out
        width = b.upper - b.lower
        upper.bar(b.lower, b.accuracy, width, align="edge", color=color, alpha=0.3 * strength, edgecolor=look["back"])
        at = [b.mean_confidence] * 2
        # the error of a bin is the height between its point and the diagonal
        upper.plot(
            at,
            [b.accuracy, b.mean_confidence],
            color=look["gap"],
            alpha=0.4 * strength,
            lw=5,
            solid_capstyle="butt",
        )
        if b.wilson_lower is not None and b.wilson_upper is not None:
            upper.plot(at, [b.wilson_lower, b.wilson_upper], color=color, alpha=strength, lw=1.4, zorder=4)
        upper.plot(
            b.mean_confidence, b.accuracy, "o", color=color, alpha=strength, ms=4.5, mec=look["back"], mew=0.6, zorder=5
        )
        lower.bar(b.lower, b.count / total, width, align="edge", color=color, alpha=0.75, edgecolor=look["back"])
    text = "no answer states a readable confidence"
    if bins:
        text = f"ECE {metrics['ece']:.3f}\ngap {metrics['overconfidence_gap']:+.3f}"
    if metrics["n_unparsed"] and bins:
        text += f"\n{metrics['n_unparsed']} of {metrics['n']} unread"
    behind = {"facecolor": look["back"], "edgecolor": "none", "alpha": 0.75, "pad": 1.5}
    upper.text(0.03, 0.97, text, transform=upper.transAxes, va="top", fontsize=8.5, bbox=behind, zorder=6)
    upper.set(xlim=(-0.02, 1.02), ylim=(0, 1.02), ylabel="right answers")
    upper.tick_params(labelbottom=False)
    _percent_axis(upper.yaxis)
    upper.grid(True)
    lower.set(ylim=(0, 1.05), xlabel="stated confidence", ylabel="share")
    _percent_axis(lower.xaxis)
    _percent_axis(lower.yaxis, step=0.5)
    lower.grid(True, axis="y")


def _how_to_read(cell: Any, look: Mapping[str, str]) -> None:
    axes = cell.subplots()
    axes.set_axis_off()
    axes.text(
        0.02,
        0.95,
        "How to read this\n\nEach dot: the answers given\nwith about that confidence.\nOn the dashed line: honest,\n"
        "what it calls 70 % is right\n70 % of the time.\n"
        "Below it: overconfident.\n\nRed: the distance to honest.\nPale: under 1 % of the answers.\n"
        "Thin bar: 95 % interval.\nBottom: how often each\nconfidence is stated.",
        va="top",
        fontsize=9,
        linespacing=1.35,
        color=look["soft"],
    )


def history_plot(
    history: Sequence[Mapping[str, Any]],
    *,
    panels: Sequence[str] = ("gap", "claim"),
    theme: str = "light",
    colors: Mapping[str, str] | None = None,
) -> Figure:
    """How calibration moves during training, one line per method.

    `history` holds records {"method", "step", "accuracy", "gap", ...}; gap = mean confidence - accuracy. Where a value
    is None the line has a hole. panels: "gap" (gap against step) and "claim" (accuracy, solid, and mean confidence,
    dashed).

    Raises ValueError for an empty history, an unknown panel or a record without method or step.
    """
    if not history:
        raise ValueError("history must hold at least one record, got none")
    if not panels or set(panels) - {"gap", "claim"}:
        raise ValueError(f"panels must be of 'gap' and 'claim', got {list(panels)}")
    for record in history:
        if "method" not in record or "step" not in record:
            raise ValueError(f"a history record needs 'method' and 'step', got {sorted(record)}")
    reason = plots_unavailable()
    if reason:
        raise ImportError(reason)
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    names = list(dict.fromkeys(record["method"] for record in history))
    colors = colors or model_colors(names)
    with _theme(theme) as look:
        figure = Figure(figsize=(4.9 * len(panels), 3.8), layout="constrained")
        for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
            for i, name in enumerate(names):
                step, accuracy, gap = _series(history, name)
                marker: dict[str, Any] = {"marker": MARKERS[i % len(MARKERS)], "ms": 4, "mec": look["back"], "mew": 0.5}
                if panel == "gap":
                    axes.plot(step, gap, color=colors[name], lw=1.8, **marker)
                else:
                    axes.plot(step, accuracy, color=colors[name], lw=1.8, **marker)
                    axes.plot(step, accuracy + gap, color=colors[name], lw=1.8, ls="--", **marker)
            axes.set_xlabel("training steps")
            axes.grid(True)
            handles = [
                Line2D([], [], color=colors[n], lw=2, marker=MARKERS[i % len(MARKERS)], ms=4)
                for i, n in enumerate(names)
            ]
            labels = [" " + printable(name) for name in names]  # matplotlib hides labels that begin with "_"
            if panel == "gap":
                axes.axhline(0, color=look["soft"], lw=1, ls=(0, (4, 3)))
                axes.set_title("overconfidence: mean confidence − accuracy", **TITLE)
                axes.set_ylabel("gap  (0 = honest on average)")
            else:
                axes.set(ylim=(0, 1.02))
                _percent_axis(axes.yaxis)
                axes.set_title(
                    "what it claims (dashed) and what is right (solid)", loc="left", fontsize=9.5, weight="bold"
                )
            axes.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=min(5, len(names)))
    return figure


def _series(history: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """step, accuracy and gap of one method in order of step, NaN where a record holds None."""
    records = sorted((r for r in history if r["method"] == name), key=lambda r: r["step"])

    def column(key: str) -> np.ndarray:
        return np.array([math.nan if r.get(key) is None else float(r[key]) for r in records])

    return column("step"), column("accuracy"), column("gap")


def risk_coverage_plot(
    models: Sequence[ModelAnswers], *, theme: str = "light", colors: Mapping[str, str] | None = None
) -> Figure:
    """Error rate among the most confident answers, against the share of answers that is kept, one line per model.

    A line that falls to the left shows a confidence that can be used to choose what to trust; a flat one shows that
    the confidence says nothing about which answers are right. Ties are kept or dropped together in expectation.
    """
    if not models:
        raise ValueError("needs at least one model, got none")
    reason = plots_unavailable()
    if reason:
        raise ImportError(reason)
    from matplotlib.figure import Figure

    colors = colors or model_colors(model.name for model in models)
    with _theme(theme) as look:
        figure = Figure(figsize=(4.9, 3.8), layout="constrained")
        axes = figure.subplots()
        handles, labels = [], []
        for i, model in enumerate(models):
            coverage, risk = risk_coverage_of(model.answers)
            if not len(coverage):
                continue
            first = len(coverage) // 100  # the error rate among a handful of answers is noise
            coverage, risk = coverage[first:], risk[first:]
            marker: dict[str, Any] = {"marker": MARKERS[i % len(MARKERS)], "ms": 4, "mec": look["back"], "mew": 0.5}
            (line,) = axes.plot(coverage, risk, color=colors[model.name], lw=1.8, markevery=0.2, **marker)
            handles.append(line)
            labels.append(" " + printable(model.name))
        axes.set(
            xlim=(0, 1.01),
            ylim=(0, 1.02),
            xlabel="share of answers kept, most confident first",
            ylabel="wrong among them",
        )
        _percent_axis(axes.xaxis)
        _percent_axis(axes.yaxis)
        axes.grid(True)
        axes.set_title("if you keep only the most confident answers", **TITLE)
        if handles:
            axes.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=min(5, len(handles)))
    return figure
