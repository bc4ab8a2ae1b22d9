"""Metrics against loops over answers and pairs, and the properties that hold whatever the data."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from caop_fast.calibration import (
    calibration_metrics,
    constant_baseline,
    reliability_bins,
    risk_coverage_curve,
    wilson_interval,
)
from helpers import oracle_metrics as oracle

KEYS = [
    "n",
    "n_unparsed",
    "accuracy",
    "mean_confidence",
    "overconfidence_gap",
    "ece",
    "ece_upper",
    "ece_equal_mass",
    "mce",
    "brier",
    "brier_upper",
    "brier_skill",
    "reliability",
    "resolution",
    "uncertainty",
    "nll",
    "auroc",
    "spr",
    "tie_rate",
    "aurc",
]

GRID = st.integers(0, 20).map(lambda k: k / 20)
CONFIDENCE = st.one_of(GRID, GRID, st.floats(0, 1), st.just(math.nan), st.sampled_from([0.3, 0.6, 0.7, 1e-7, 1.0]))
BINARY = st.lists(st.tuples(st.integers(0, 1), CONFIDENCE), max_size=40)
PARTIAL = st.lists(st.tuples(st.one_of(st.integers(0, 1), GRID), CONFIDENCE), max_size=40)


def split(rows):
    return [y for y, _ in rows], [c for _, c in rows]


def assert_same(got, expected):
    for key, value in expected.items():
        if value is None:
            assert got[key] is None, key
        else:
            assert got[key] is not None, key
            assert got[key] == pytest.approx(value, abs=1e-9, rel=1e-9), key


@settings(max_examples=200, deadline=None)
@given(BINARY | PARTIAL, st.integers(1, 15), st.sampled_from(["official", "exact"]))
def test_against_the_loops(rows, n_bins, edges):
    correct, confidence = split(rows)
    got = calibration_metrics(correct, confidence, n_bins=n_bins, edges=edges)
    # k/n_bins typed as a float is on the edge, though its shortest decimal may lie a hair beside it
    assume(
        edges == "official"
        or all(math.isnan(c) or c != k / n_bins for c in confidence for k in range(1, n_bins))
        or n_bins in (1, 2, 4, 5, 8, 10)
    )
    assert_same(got, oracle.metrics(correct, confidence, n_bins, edges))


@settings(deadline=None)
@given(BINARY | PARTIAL)
def test_identities_and_order(rows):
    correct, confidence = split(rows)
    m = calibration_metrics(correct, confidence)
    assert set(KEYS) <= set(m)
    assert not any(isinstance(v, float) and not math.isfinite(v) for v in m.values())
    json.dumps(m, allow_nan=False)
    if m["brier"] is None:
        return
    assert m["reliability"] - m["resolution"] + m["uncertainty"] == pytest.approx(m["brier"], abs=1e-12)
    assert abs(m["overconfidence_gap"]) - 1e-12 <= m["ece"] <= m["mce"] + 1e-12
    assert m["ece"] <= m["ece_upper"] + 1e-12
    assert m["brier"] <= m["brier_upper"] + 1e-12
    if m["auroc"] is not None:
        assert m["auroc"] == pytest.approx(m["spr"] + m["tie_rate"] / 2, abs=1e-12)
        assert 0 <= m["spr"] <= 1 - m["tie_rate"] + 1e-12


@settings(deadline=None)
@given(BINARY | PARTIAL, st.randoms(use_true_random=False))
def test_order_of_answers_is_irrelevant(rows, random):
    shuffled = rows[:]
    random.shuffle(shuffled)
    assert_same(calibration_metrics(*split(shuffled)), calibration_metrics(*split(rows)))


@settings(deadline=None)
@given(
    st.lists(st.tuples(GRID | st.integers(0, 1), st.floats(0, 1)), min_size=1, max_size=30), st.sets(st.integers(0, 29))
)
def test_hiding_answers_never_improves_the_upper_figures(rows, hidden):
    correct, confidence = split(rows)
    covered = [math.nan if i in hidden else c for i, c in enumerate(confidence)]
    shown, hid = calibration_metrics(correct, confidence), calibration_metrics(correct, covered)
    assert hid["ece_upper"] >= shown["ece_upper"] - 1e-12
    assert hid["brier_upper"] >= shown["brier_upper"] - 1e-12
    assert hid["accuracy_all"] == pytest.approx(shown["accuracy_all"])


def test_a_worked_example():
    m = calibration_metrics([1, 1, 0, 0, 1], [0.9, 0.9, 0.9, 0.2, None])
    assert (m["n"], m["n_unparsed"], m["accuracy"], m["accuracy_all"]) == (5, 1, 0.5, 0.6)
    assert m["mean_confidence"] == pytest.approx(0.725)
    assert m["overconfidence_gap"] == pytest.approx(0.225)
    assert m["ece"] == pytest.approx((0.7 + 0.2) / 4)
    assert m["ece_upper"] == pytest.approx((0.7 + 0.2 + 1) / 5)
    assert m["mce"] == pytest.approx(0.7 / 3)
    assert m["brier"] == pytest.approx((0.01 + 0.01 + 0.81 + 0.04) / 4)
    assert m["brier_upper"] == pytest.approx(1.87 / 5)
    assert m["brier_skill"] == pytest.approx(1 - (0.87 / 4) / 0.25)
    assert (m["spr"], m["tie_rate"], m["auroc"]) == (0.5, 0.5, 0.75)
    assert m["aurc"] == pytest.approx((1 / 3 + 1 / 3 + 1 / 3 + 1 / 2) / 4)


def test_edges():
    # floats on the grid fall one bin low at 0.3, 0.6 and 0.7 with the published edges, and nowhere with exact ones
    for value in np.arange(11) / 10:
        tenth = round(value * 10)
        official = [b.count for b in reliability_bins([1], [value])].index(1)
        exact = [b.count for b in reliability_bins([1], [value], 10, "exact")].index(1)
        assert official == min(tenth - (tenth in (3, 6, 7)), 9)
        assert exact == min(tenth, 9)
    for n_bins in (3, 7, 10, 15, 49):
        for k in range(n_bins + 1):
            counts = [b.count for b in reliability_bins([1], [k / n_bins], n_bins, "exact")]
            assert counts.index(1) == min(k, n_bins - 1)
    # 0.3 and 0.35 share a bin with exact edges only, where their errors cancel
    y, c = [1, 0], [0.3, 0.35]
    assert calibration_metrics(y, c)["ece"] == pytest.approx((0.7 + 0.35) / 2)
    assert calibration_metrics(y, c, edges="exact")["ece"] == pytest.approx(0.35 / 2)


def test_undefined_is_none():
    empty = calibration_metrics([], [])
    assert (empty["n"], empty["n_unparsed"]) == (0, 0)
    assert all(v is None for k, v in empty.items() if not k.startswith("n"))
    hidden = calibration_metrics([1, 0], [math.nan, None])
    assert (hidden["n"], hidden["n_unparsed"], hidden["ece_upper"], hidden["brier_upper"]) == (2, 2, 1.0, 1.0)
    assert hidden["accuracy_all"] == 0.5
    assert all(hidden[k] is None for k in KEYS if k not in ("n", "n_unparsed", "ece_upper", "brier_upper"))
    only_right = calibration_metrics([1, 1, 1], [0.1, 0.2, 0.7])
    assert all(only_right[k] is None for k in ("auroc", "spr", "tie_rate", "brier_skill"))
    assert only_right["aurc"] == 0.0
    assert calibration_metrics([0.5, 0.1, 1], [0.1, 0.2, 0.7])["auroc"] is None
    # a constant partial credit that float64 cannot hold has no variance to explain either
    assert calibration_metrics([0.3] * 8, [0.75, 0.5, 0.5, 0.5, 0.5, 0.75, 0.25, 0.75])["brier_skill"] is None


def test_nll_clip():
    m = calibration_metrics([0, 1, 1], [1.0, 0.0, 1e-6])
    assert m["n_nll_clipped"] == 2
    assert m["nll"] == pytest.approx(-math.log(1e-6))


def test_ties_all_equal():
    m = calibration_metrics([1, 0, 1, 0], [0.5] * 4)
    assert (m["spr"], m["tie_rate"], m["auroc"], m["ece"], m["ece_equal_mass"], m["resolution"]) == (0, 1, 0.5, 0, 0, 0)
    assert m["aurc"] == pytest.approx(0.5)


def test_equal_mass_bins_are_equal():
    rng = np.random.default_rng(0)
    c = rng.random(1000)
    y = (rng.random(1000) < 0.5).astype(float)
    order = np.argsort(c)
    expected = sum(abs((c - y)[part].sum()) for part in np.array_split(order, 10)) / 1000
    assert calibration_metrics(y, c)["ece_equal_mass"] == pytest.approx(expected)


def test_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    c = rng.integers(0, 21, 500) / 20
    y = rng.random(500) < c
    u = stats.mannwhitneyu(c[y], c[~y]).statistic
    assert calibration_metrics(y, c)["auroc"] == pytest.approx(u / (y.sum() * (~y).sum()))
    low, high = stats.binomtest(7, 20).proportion_ci(0.9, "wilson")
    assert wilson_interval(0.35, 20, 0.9) == pytest.approx((low, high))


def test_reliability_bins():
    bins = reliability_bins([1, 0, 1, 1], [0.95, 0.91, 0.15, None])
    assert len(bins) == 10
    assert [b.count for b in bins] == [0, 1, 0, 0, 0, 0, 0, 0, 0, 2]
    assert bins[9].mean_confidence == pytest.approx(0.93)
    assert bins[9].accuracy == 0.5
    assert (bins[9].lower, bins[9].upper) == (0.9, 1.0)
    assert bins[9].wilson_lower < 0.5 < bins[9].wilson_upper
    assert bins[1].wilson_upper == 1.0
    assert bins[0][3:] == (None,) * 4
    assert wilson_interval(0.0, 5)[0] == 0.0
    narrow = reliability_bins([1, 0], [0.95, 0.91], level=0.5)[9]
    assert narrow.wilson_lower > bins[9].wilson_lower
    rng = np.random.default_rng(2)
    c, y = rng.random(300), rng.integers(0, 2, 300)
    ece = sum(b.count * abs(b.mean_confidence - b.accuracy) for b in reliability_bins(y, c, 7) if b.count) / 300
    assert calibration_metrics(y, c, n_bins=7)["ece"] == pytest.approx(ece)
    assert all(b.count == 0 for b in reliability_bins([], []))


@settings(deadline=None)
@given(BINARY | PARTIAL)
def test_risk_coverage(rows):
    correct, confidence = split(rows)
    coverage, risk = risk_coverage_curve(correct, confidence)
    expected = oracle.risks(oracle.parsed(correct, confidence))
    assert risk == pytest.approx(expected, abs=1e-12)
    assert coverage == pytest.approx([(k + 1) / len(expected) for k in range(len(expected))])
    if expected:
        assert calibration_metrics(correct, confidence)["aurc"] == pytest.approx(risk.mean())


def test_constant_baseline():
    m = constant_baseline([1, 0, 0, 1, 1])
    assert m["ece"] == pytest.approx(0, abs=1e-15)
    assert (m["auroc"], m["spr"]) == (0.5, 0.0)
    assert m["brier"] == pytest.approx(0.24)
    assert m["brier_skill"] == pytest.approx(0, abs=1e-12)
    assert constant_baseline([])["n"] == 0
    assert constant_baseline([0.1] * 3)["n"] == 3
    with pytest.raises(ValueError, match="correct"):
        constant_baseline([2, 0])


def test_groups_add_intervals():
    rng = np.random.default_rng(3)
    c = rng.random(80)
    y = rng.random(80) < c
    m = calibration_metrics(y, c, groups=[f"p{i // 4}" for i in range(80)])
    assert m["n_groups"] == 20
    low, high = m["intervals"]["accuracy"]
    assert low < m["accuracy"] < high
    json.dumps(m, allow_nan=False)
    assert "intervals" not in calibration_metrics(y, c)


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"correct": [1, 0, 1]}, ValueError, "one length, got 3 and 2"),
        ({"correct": [1, 2]}, ValueError, "correct must lie in .*got 2.0 at position 1"),
        ({"correct": [1, math.nan]}, ValueError, "correct"),
        ({"correct": [1, None]}, ValueError, "correct"),
        ({"correct": ["1", "0"]}, TypeError, "correct must be a vector of numbers"),
        ({"correct": [[1], [0]]}, ValueError, "one dimension"),
        ({"correct": [[1], [0, 1]]}, TypeError, "correct"),
        ({"confidence": [0.5, 85]}, ValueError, "confidence must lie in .*got 85.0 at position 1"),
        ({"confidence": [0.5, -0.1]}, ValueError, "confidence"),
        ({"confidence": [0.5, math.inf]}, ValueError, "confidence"),
        ({"confidence": ["0.5", 0.1]}, TypeError, "confidence"),
        ({"confidence": 0.5}, ValueError, "one dimension"),
        ({"confidence": [0.5 + 1j, 0]}, TypeError, "confidence"),
        ({"n_bins": 0}, ValueError, "n_bins"),
        ({"n_bins": 10.0}, TypeError, "n_bins"),
        ({"n_bins": True}, TypeError, "n_bins"),
        ({"edges": "equal"}, ValueError, "edges must be one of official, exact, got 'equal'"),
        ({"groups": ["a"]}, ValueError, "groups must hold one id per answer: 2, got 1"),
        ({"groups": ["a", None]}, ValueError, "groups"),
        ({"groups": [["a"], ["b"]]}, TypeError, "groups"),
    ],
)
def test_bad_input(kwargs, error, words):
    with pytest.raises(error, match=words):
        calibration_metrics(**{"correct": [1, 0], "confidence": [0.5, 0.1], **kwargs})


def test_inputs_are_not_changed():
    y, c = np.array([1.0, 0.0]), np.array([0.9, 0.1])
    calibration_metrics(y, c, groups=np.array([1, 2]))
    assert y.tolist() == [1.0, 0.0]
    assert c.tolist() == [0.9, 0.1]
    assert calibration_metrics(np.array([True, False]), np.array([0.5, 0.25], dtype=np.float32))["ece"] == 0.375


def test_a_million_answers():
    rng = np.random.default_rng(4)
    c = rng.random(1_000_000)
    y = rng.random(1_000_000) < c
    m = calibration_metrics(y, c)
    assert m["auroc"] == pytest.approx(5 / 6, abs=2e-3)  # uniform and perfectly calibrated: SPR = 5/6
    assert m["ece"] < 0.005


def test_imports_without_torch_and_matplotlib():
    program = """
import builtins, sys
blocked = {"torch", "triton", "transformers", "matplotlib", "scipy", "tokenizers", "safetensors"}
real = builtins.__import__
def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    if level == 0 and name.split(".")[0] in blocked:
        raise ImportError(name)
    return real(name, globals, locals, fromlist, level)
builtins.__import__ = guarded
import caop_fast.calibration as cal
assert not blocked & {m.split(".")[0] for m in sys.modules}, "imported before the block"
m = cal.calibration_metrics([1, 0, 1, 0], [0.9, 0.8, 0.7, cal.parse_confidence("Confidence: 60%").value], groups="aabb")
assert m["n_groups"] == 2 and m["intervals"]["ece"], m
assert cal.ece_floor([0.5, 0.5]) and cal.reliability_bins([1], [0.5])
assert all(hasattr(cal, name) for name in cal.__all__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
