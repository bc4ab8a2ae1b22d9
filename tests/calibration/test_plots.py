"""What is drawn: the right numbers at the right place, one colour per model, and nothing that a name could break."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from caop_fast.calibration import calibration_metrics, plots, reliability_bins
from caop_fast.calibration.answers import ModelAnswers
from helpers.audits import answered

pytest.importorskip("matplotlib")
from matplotlib.colors import to_hex
from matplotlib.figure import Figure


def made(name: str = "a", n: int = 400, seed: int = 0) -> ModelAnswers:
    rng = np.random.default_rng(seed)
    p = rng.random(n)
    return answered(name, (rng.random(n) < p).astype(float), np.round(p**0.5, 2))


def texts(figure: Figure) -> str:
    from matplotlib.text import Text

    return "\n".join(t.get_text() for t in figure.findobj(Text))


def points(axes) -> np.ndarray:
    return np.array([line.get_xydata()[0] for line in axes.lines if line.get_marker() == "o"])


@pytest.mark.parametrize("edges", ["official", "exact"])
def test_reliability_points_bars_and_histogram_are_the_bins(edges: str) -> None:
    a = made()
    upper, lower = plots.reliability_diagram([a], n_bins=8, edges=edges).subfigs[0].axes
    bins = [b for b in reliability_bins(a.correct, a.confidence, 8, edges) if b.count]
    np.testing.assert_allclose(points(upper), [(b.mean_confidence, b.accuracy) for b in bins])
    np.testing.assert_allclose([p.get_height() for p in upper.patches], [b.accuracy for b in bins])
    np.testing.assert_allclose([p.get_x() for p in upper.patches], [b.lower for b in bins])
    np.testing.assert_allclose([p.get_height() for p in lower.patches], [b.count / 400 for b in bins])
    # the drawn segments: the interval of each bin, and the distance of its dot to the diagonal
    segments = {tuple(np.round(line.get_ydata(), 9)) for line in upper.lines if len(line.get_xdata()) == 2}
    for b in bins:
        assert (round(b.wilson_lower, 9), round(b.wilson_upper, 9)) in segments
        assert (round(b.accuracy, 9), round(b.mean_confidence, 9)) in segments


def test_reliability_panel_writes_its_numbers() -> None:
    a = made()
    a = answered("a", a.correct, np.where(np.arange(400) < 7, np.nan, a.confidence))
    metrics = calibration_metrics(a.correct, a.confidence)
    text = texts(plots.reliability_diagram([a]))
    assert f"ECE {metrics['ece']:.3f}" in text
    assert f"gap {metrics['overconfidence_gap']:+.3f}" in text
    assert "7 of 400 unread" in text
    assert f"says {100 * metrics['mean_confidence']:.0f} %, right {100 * metrics['accuracy']:.0f} % of the time" in text


def test_says_and_is_right() -> None:
    a = answered("a", np.array([1, 0, 0, 0]), np.array([0.9, 0.9, 0.9, np.nan]))
    assert plots.says_and_is_right(a) == "says 90 %, right 33 % of the time"


def test_an_arm_without_any_readable_confidence_and_a_single_answer() -> None:
    silent = answered("a", np.ones(3), np.full(3, np.nan))
    figure = plots.reliability_diagram([silent, answered("b", np.ones(1), np.ones(1))])
    assert "states no readable confidence" in texts(figure)
    plots.to_png(figure, dpi=40)
    plots.to_png(plots.risk_coverage_plot([silent]), dpi=40)


def test_every_arm_has_its_panel_and_the_spare_cell_explains() -> None:
    figure = plots.reliability_diagram([made(n) for n in "abcde"])
    assert [len(cell.axes) for cell in figure.subfigs] == [2, 2, 2, 2, 2, 1]
    assert "How to read this" in texts(figure)
    assert "How to read this" not in texts(plots.reliability_diagram([made("a"), made("b")]))


def test_colors_are_fixed_by_name_and_distinct() -> None:
    names = ["base", "opd", "caop", "direct", "masked"]
    colors = plots.model_colors(names)
    assert len(set(colors.values())) == 5
    assert (
        plots.model_colors(["caop", "zebra"])["caop"]
        == plots.model_colors(["zebra", "opd", "caop"])["caop"]
        == "#0072b2"
    )
    many = plots.model_colors([*names, *"uvwxyz"])
    assert len(set(many.values())) == 11
    assert {n: many[n] for n in names} == colors


HISTORY = [
    {"method": "opd", "step": 20, "accuracy": 0.5, "gap": 0.4},
    {"method": "opd", "step": 0, "accuracy": 0.4, "gap": 0.1},
    {"method": "opd", "step": 10, "accuracy": None, "gap": None},
    {"method": "base", "step": 0, "accuracy": 0.4, "gap": 0.1},
]


def test_history_lines_in_order_of_step_with_holes() -> None:
    gap, claim = plots.history_plot(HISTORY).axes
    opd = gap.lines[0]
    assert to_hex(opd.get_color()) == "#d55e00"
    np.testing.assert_array_equal(opd.get_xdata(), [0, 10, 20])
    np.testing.assert_array_equal(opd.get_ydata(), [0.1, np.nan, 0.4])
    np.testing.assert_array_equal(claim.lines[0].get_ydata(), [0.4, np.nan, 0.5])
    np.testing.assert_allclose(claim.lines[1].get_ydata(), [0.5, np.nan, 0.9])
    assert claim.lines[1].get_linestyle() == "--"
    assert [t.get_text().strip() for t in gap.get_legend().get_texts()] == ["opd", "base"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.history_plot([]), "at least one record"),
        (lambda: plots.history_plot([{"method": "a", "gap": 1}]), "'method' and 'step'"),
        (lambda: plots.history_plot(HISTORY, panels=("loss",)), "panels"),
        (lambda: plots.reliability_diagram([]), "at least one model"),
        (lambda: plots.reliability_diagram([made()], theme="blue"), "theme"),
        (lambda: plots.risk_coverage_plot([]), "at least one model"),
    ],
)
def test_bad_input(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_risk_coverage_ends_at_the_error_rate_and_averages_to_aurc() -> None:
    a = made(n=60)
    (line,) = plots.risk_coverage_plot([a]).axes[0].lines
    metrics = calibration_metrics(a.correct, a.confidence)
    assert line.get_xdata()[-1] == 1
    assert line.get_ydata()[-1] == pytest.approx(1 - metrics["accuracy"])
    assert np.mean(line.get_ydata()) == pytest.approx(metrics["aurc"])


def test_names_that_could_break_a_picture() -> None:
    names = ["$\\frac{a}$", "_hidden", "a\x1b[31m\ud800", "<b>&"]
    for figure in (
        plots.reliability_diagram([made(n) for n in names]),
        plots.history_plot([{"method": n, "step": 0, "accuracy": 0.5, "gap": 0.1} for n in names]),
        plots.risk_coverage_plot([made(n) for n in names]),
    ):
        ET.fromstring(plots.to_svg(figure))
        assert "_hidden" in texts(figure)
        assert "\x1b" not in texts(figure)


def test_svg_is_reproducible_and_needs_nothing_outside() -> None:
    first, second = (plots.to_svg(plots.reliability_diagram([made()])) for _ in range(2))
    assert first == second
    assert b"<text" not in first  # outlines, no fonts
    root = ET.fromstring(first)
    links = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
    assert all(link.startswith(("#", "data:")) for link in links)


def test_drawing_leaves_no_trace_in_matplotlib_and_needs_no_pyplot() -> None:
    code = (
        "import sys, matplotlib, numpy as np\n"
        "from caop_fast.calibration import plots\n"
        "from caop_fast.calibration.answers import ModelAnswers\n"
        "from caop_fast.calibration.counts import Answers\n"
        "def settings():\n"
        "    return {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != 'backend'}\n"
        "before = settings()\n"
        "plots.to_svg(plots.reliability_diagram([ModelAnswers('a', Answers(np.ones(3), np.ones(3)))], theme='dark'))\n"
        "assert settings() == before\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
