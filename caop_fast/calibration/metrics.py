"""Calibration metrics of graded answers, the reliability diagram's bins, the risk-coverage curve and the baseline.

The formulas are in `formulas`. Each public function takes arrays; its ``_of`` form takes `Answers`, which are sorted
once for a whole report.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from caop_fast.calibration.counts import (
    DEFAULT_BINNING,
    Answers,
    Binning,
    FloatArray,
    bin_edges,
    check_level,
    cluster_index,
)
from caop_fast.calibration.formulas import METRICS, NLL_CLIP, accuracy_per_value
from caop_fast.calibration.intervals import Resampling, intervals_of, wilson_interval


def calibration_metrics(
    correct: ArrayLike,
    confidence: ArrayLike,
    *,
    n_bins: int = 10,
    edges: str = "official",
    groups: Sequence[Hashable] | NDArray[Any] | None = None,
) -> dict[str, Any]:
    """Every metric of `formulas`, for n graded answers. O(n log n).

    Args:
        correct: [n], bool, int or float in [0, 1]. Partial credit is taken by every metric except auroc, spr and
            tie_rate, which are None unless all labels are 0 or 1.
        confidence: [n] floats in [0, 1]; NaN (or None) is an answer whose confidence could not be read.
        n_bins, edges: the equal-width bins of ece, ece_upper and mce; see `counts.bin_edges`. `ece_equal_mass` takes
            n_bins too.
        groups: [n] prompt ids. Adds ``n_groups`` and ``intervals``: 95 % percentile intervals from 1000 resamples of
            prompts, by `bootstrap_intervals`, which has the options.

    Returns:
        Plain ints and floats; None where a metric is undefined (no parsed answer, no wrong one, ...), never NaN.
        ``n`` counts all answers, ``n_unparsed`` those with NaN, and all else is over the n - n_unparsed parsed ones,
        except ``accuracy_all`` and the upper figures, which count an unparsed answer as an error of 1:
        ``ece_upper = (sum_bins |sum (c - y)| + n_unparsed) / n`` and ``brier_upper`` alike, so that leaving an answer
        unread can never improve them. ``n_nll_clipped`` says how many confidences `nll` clipped to [1e-6, 1 - 1e-6].

    Raises:
        TypeError, ValueError: naming the argument, for anything else.
    """
    answers, binning = Answers(correct, confidence), Binning(n_bins, edges)
    result = metrics_of(answers, binning)
    if groups is not None:
        result["n_groups"] = len(cluster_index(groups, len(answers))[1])
        result["intervals"] = intervals_of(answers, groups, tuple(METRICS), Resampling(), binning)
    return result


def metrics_of(answers: Answers, binning: Binning = DEFAULT_BINNING) -> dict[str, Any]:
    """`calibration_metrics` of answers that are sorted already."""
    counts, c = answers.counts(binning=binning), answers.confidence
    result: dict[str, Any] = {"n": len(answers), "n_unparsed": int(answers.unparsed.sum())}
    for name, metric in METRICS.items():
        value = float(metric(counts)[0])
        result[name] = None if math.isnan(value) else value
    result["n_nll_clipped"] = int(((c < NLL_CLIP) | (c > 1 - NLL_CLIP)).sum())
    return result


class ReliabilityBin(NamedTuple):
    """One bin of a reliability diagram; the last four are None in an empty bin.

    `wilson_lower`, `wilson_upper` are the Wilson score interval of `accuracy`, answers taken as independent.
    """

    lower: float
    upper: float
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls on a bin
    mean_confidence: float | None
    accuracy: float | None
    wilson_lower: float | None
    wilson_upper: float | None


def reliability_bins(
    correct: ArrayLike, confidence: ArrayLike, n_bins: int = 10, edges: str = "official", *, level: float = 0.95
) -> list[ReliabilityBin]:
    """The n_bins bins of `ece`, parsed answers only, with intervals of the given level for the accuracy in each."""
    return reliability_bins_of(Answers(correct, confidence), Binning(n_bins, edges), level=level)


def reliability_bins_of(
    answers: Answers, binning: Binning = DEFAULT_BINNING, *, level: float = 0.95
) -> list[ReliabilityBin]:
    """`reliability_bins` of answers that are sorted already."""
    check_level(level)
    numbers, n, c, y = answers.counts(binning=binning).bins
    bins = [ReliabilityBin(float(a), float(b), 0, None, None, None, None) for a, b in pairwise(bin_edges(*binning))]
    for i, count, sum_c, sum_y in zip(numbers, n[0], c[0], y[0], strict=True):
        low, high = wilson_interval(sum_y / count, count, level)
        bins[i] = bins[i]._replace(
            count=int(count),
            mean_confidence=float(sum_c / count),
            accuracy=float(sum_y / count),
            wilson_lower=low,
            wilson_upper=high,
        )
    return bins


def risk_coverage_curve(correct: ArrayLike, confidence: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Answering only the k most confident of the n parsed answers: (coverage [n] = k/n, risk [n] = error rate).

    The risk is expected over the order of equally confident answers; its mean is `aurc`.
    """
    return risk_coverage_of(Answers(correct, confidence))


def risk_coverage_of(answers: Answers) -> tuple[FloatArray, FloatArray]:
    """`risk_coverage_curve` of answers that are sorted already."""
    counts = answers.counts()
    m = counts.n[0, ::-1].astype(np.int64)
    rate = 1.0 - accuracy_per_value(counts)[0, ::-1]
    k = np.arange(1, int(m.sum()) + 1)
    return k / max(len(k), 1), np.cumsum(np.repeat(rate, m)) / k


def constant_baseline(correct: ArrayLike, *, n_bins: int = 10, edges: str = "official") -> dict[str, Any]:
    """`calibration_metrics` of always stating the base rate, the mean of `correct`: the baseline that needs no model.

    Its ECE is 0 and its Brier score the uncertainty; only ranking (spr, auroc, resolution, aurc) beats it for sure.
    """
    return constant_baseline_of(Answers(correct, np.zeros(np.shape(correct)[:1])), Binning(n_bins, edges))


def constant_baseline_of(answers: Answers, binning: Binning = DEFAULT_BINNING) -> dict[str, Any]:
    """`constant_baseline` of the labels of these answers, unparsed ones included."""
    y = answers.correct
    base_rate = np.full(len(y), min(float(y.mean()), 1.0) if len(y) else 0.0)
    return metrics_of(Answers(y, base_rate), binning)
