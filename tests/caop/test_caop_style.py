from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from caop_fast.calibration.parse import parse_confidence
from caop_fast.caop import ConfidenceStyle


def test_default_grid_is_written_and_read_back():
    style = ConfidenceStyle()
    assert len(style.values) == 21
    assert style.values[0] == 0.0
    assert style.values[-1] == 1.0
    assert [style.number(v) for v in style.values[:3]] == ["0.00", "0.05", "0.10"]
    assert style.statement(0.85) == "Confidence: 0.85"
    assert [parse_confidence(style.statement(v)).value for v in style.values] == list(style.values)


@given(st.integers(0, 10_000))
def test_nearest_matches_exact_arithmetic(k):
    style, exact = ConfidenceStyle(), Fraction(k, 10_000)
    # Fraction.__round__ is exact and sends ties to the even grid point.
    assert style.nearest(k / 10_000) == pytest.approx(float(Fraction(round(exact * 20), 20)), abs=1e-12)


def test_eighths_tie_to_even_without_bias():
    style = ConfidenceStyle(step=0.25)
    assert [style.nearest(k / 8) for k in range(9)] == [0, 0, 0.25, 0.5, 0.5, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf"), "0.5", None, True])
def test_nearest_refuses(value):
    with pytest.raises(ValueError, match="value must be"):
        ConfidenceStyle().nearest(value)


def test_numpy_scalars_are_values():
    assert ConfidenceStyle().number(np.float32(0.85)) == "0.85"


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"step": 0.3}, "step"),
        ({"step": 0}, "step"),
        ({"step": 0.05, "decimals": 1}, "decimals"),
        ({"label": "Certainty:"}, "label"),
        ({"label": "Overconfidence:"}, "label"),
        ({"label": "Confidence"}, "label"),
        ({"label": "Confidence: "}, "label"),
        ({"separator": ""}, "separator"),
        ({"separator": " - "}, "separator"),
    ],
)
def test_bad_styles_are_refused_at_once(kwargs, named):
    with pytest.raises(ValueError, match=named):
        ConfidenceStyle(**kwargs)
