"""Calibration metrics of graded answers: each formula once, over `Counts`, for the estimate and its resamples alike.

With c the stated confidence, y whether the answer is right, n_k, y_k counts at the k-th distinct confidence, "bins"
equal-width bins, and sums over the parsed answers:

    gap          mean c - mean y                              ECE        sum_bins |sum (c - y)| / n
    Brier        mean (c - y)^2                               MCE        max_bins |mean c - mean y|
    reliability  sum_k n_k (c_k - y_k/n_k)^2 / n              skill      1 - Brier / uncertainty
    resolution   sum_k n_k (y_k/n_k - mean y)^2 / n           SPR        P(c+ > c-)   over (right, wrong) pairs
    uncertainty  mean (y - mean y)^2                          AUROC      P(c+ > c-) + P(c+ = c-) / 2

Brier = reliability - resolution + uncertainty (Murphy 1973), exactly, since the terms are over distinct values and not
over bins. AURC is the mean over k of the error rate among the k most confident answers (Geifman & El-Yaniv 2017);
equally confident answers come in random order, and the expectation over the orders is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from caop_fast.calibration.counts import Answers, Counts, FloatArray, bin_edges, cluster_index

NLL_CLIP = 1e-6


def _ratio(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    """Elementwise, NaN (undefined) where the denominator is 0."""
    out = np.full(np.broadcast_shapes(np.shape(numerator), np.shape(denominator)), np.nan)
    return np.divide(numerator, denominator, out=out, where=np.asarray(denominator) > 0)


def _per_value(c: Counts) -> FloatArray:
    """[R, K] accuracy at each distinct confidence, 0 where a resample has no answer there (its weight is 0)."""
    return np.divide(c.y, c.n, out=np.zeros_like(c.n), where=c.n > 0)


def _accuracy(c: Counts) -> FloatArray:
    return _ratio(c.y.sum(axis=1), c.total)


def _accuracy_all(c: Counts) -> FloatArray:
    return _ratio(c.y.sum(axis=1) + c.y_unparsed, c.total + c.n_unparsed)


def _mean_confidence(c: Counts) -> FloatArray:
    return _ratio(c.n @ c.values, c.total)


def _gap(c: Counts) -> FloatArray:
    return _ratio((c.n * c.values - c.y).sum(axis=1), c.total)


def _binned_error(c: Counts) -> FloatArray:
    _, _, confidence, correct = c.bins
    return np.abs(confidence - correct).sum(axis=1)


def _ece(c: Counts) -> FloatArray:
    return _ratio(_binned_error(c), c.total)


def _ece_upper(c: Counts) -> FloatArray:
    return _ratio(_binned_error(c) + c.n_unparsed, c.total + c.n_unparsed)


def _mce(c: Counts) -> FloatArray:
    _, n, confidence, correct = c.bins
    gaps = np.abs(np.divide(confidence - correct, n, out=np.zeros_like(n), where=n > 0))
    return np.where(c.total > 0, gaps.max(axis=1, initial=0.0), np.nan)


def _ece_equal_mass(c: Counts) -> FloatArray:
    """Bins of (nearly) equal count. Equal confidences share a bin, that of their middle rank, whatever their order."""
    end = np.cumsum(c.n, axis=1)
    middle = (2 * end - c.n) * c.n_bins  # twice the middle rank; whole numbers, so that the floor below is exact
    index = np.minimum(middle // np.maximum(2 * c.total[:, None], 1), c.n_bins - 1).astype(np.int64)
    flat = (index + np.arange(len(c.n))[:, None] * c.n_bins).ravel()
    error = np.bincount(flat, (c.n * c.values - c.y).ravel(), len(c.n) * c.n_bins)
    return _ratio(np.abs(error.reshape(len(c.n), c.n_bins)).sum(axis=1), c.total)


def _squared_error(c: Counts) -> FloatArray:
    return (c.n * (c.values - _per_value(c)) ** 2 + c.spread).sum(axis=1)


def _brier(c: Counts) -> FloatArray:
    return _ratio(_squared_error(c), c.total)


def _brier_upper(c: Counts) -> FloatArray:
    return _ratio(_squared_error(c) + c.n_unparsed, c.total + c.n_unparsed)


def _reliability(c: Counts) -> FloatArray:
    return _ratio((c.n * (c.values - _per_value(c)) ** 2).sum(axis=1), c.total)


def _resolution(c: Counts) -> FloatArray:
    # A resample without parsed answers has mean NaN, which the ratio turns into NaN as it should.
    return _ratio((c.n * (_per_value(c) - _accuracy(c)[:, None]) ** 2).sum(axis=1), c.total)


def _uncertainty(c: Counts) -> FloatArray:
    between = c.n * (_per_value(c) - _accuracy(c)[:, None]) ** 2
    return _ratio((between + c.spread).sum(axis=1), c.total)


def _brier_skill(c: Counts) -> FloatArray:
    uncertainty = _uncertainty(c)
    # One label only: the sums leave rounding errors of about 1e-17 where 0 is meant.
    return 1.0 - _ratio(_brier(c), np.where(uncertainty > 1e-12, uncertainty, 0.0))


def _nll(c: Counts) -> FloatArray:
    p = np.clip(c.values, NLL_CLIP, 1 - NLL_CLIP)
    return _ratio(-(c.y * np.log(p) + (c.n - c.y) * np.log1p(-p)).sum(axis=1), c.total)


def _pairs(c: Counts, pair_count: Callable[[FloatArray, FloatArray], FloatArray]) -> FloatArray:
    """The share of (right, wrong) pairs that `pair_count` counts; defined for labels of 0 and 1 with both present."""
    if not c.binary:
        return np.full(len(c.n), np.nan)
    right, wrong = c.y, c.n - c.y
    return _ratio(pair_count(right, wrong), right.sum(axis=1) * wrong.sum(axis=1))


def _spr(c: Counts) -> FloatArray:
    return _pairs(c, lambda right, wrong: (right * (np.cumsum(wrong, axis=1) - wrong)).sum(axis=1))


def _tie_rate(c: Counts) -> FloatArray:
    return _pairs(c, lambda right, wrong: (right * wrong).sum(axis=1))


def _auroc(c: Counts) -> FloatArray:
    return _spr(c) + _tie_rate(c) / 2


def _aurc(c: Counts) -> FloatArray:
    """Blocks of m ties with error rate e behind s answers with E errors add sum_{j=1..m} (E + j e)/(s + j)
    = m e + (E - s e)(H(s + m) - H(s)), H the harmonic numbers."""
    m = c.n[:, ::-1]
    errors = m - c.y[:, ::-1]
    end = np.cumsum(m, axis=1).astype(np.int64)
    start = end - m.astype(np.int64)
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, end.max(initial=0) + 1))])
    rate = np.divide(errors, m, out=np.zeros_like(m), where=m > 0)
    before = np.cumsum(errors, axis=1) - errors
    blocks = errors + (before - start * rate) * (harmonic[end] - harmonic[start])
    return _ratio(blocks.sum(axis=1), c.total)


METRICS: dict[str, Callable[[Counts], FloatArray]] = {
    "accuracy": _accuracy,
    "accuracy_all": _accuracy_all,
    "mean_confidence": _mean_confidence,
    "overconfidence_gap": _gap,
    "ece": _ece,
    "ece_upper": _ece_upper,
    "ece_equal_mass": _ece_equal_mass,
    "mce": _mce,
    "brier": _brier,
    "brier_upper": _brier_upper,
    "brier_skill": _brier_skill,
    "reliability": _reliability,
    "resolution": _resolution,
    "uncertainty": _uncertainty,
    "nll": _nll,
    "auroc": _auroc,
    "spr": _spr,
    "tie_rate": _tie_rate,
    "aurc": _aurc,
}


def calibration_metrics(
    correct: ArrayLike,
    confidence: ArrayLike,
    *,
    n_bins: int = 10,
    edges: str = "official",
    groups: Sequence[Hashable] | NDArray[Any] | None = None,
) -> dict[str, Any]:
    """Every metric of the module's docstring, for n graded answers. O(n log n).

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
    answers = Answers(correct, confidence, n_bins=n_bins, edges=edges)
    counts = answers.counts()
    c = answers.confidence
    result: dict[str, Any] = {"n": len(answers), "n_unparsed": int(answers.unparsed.sum())}
    for name, metric in METRICS.items():
        value = float(metric(counts)[0])
        result[name] = None if math.isnan(value) else value
    result["n_nll_clipped"] = int(((c < NLL_CLIP) | (c > 1 - NLL_CLIP)).sum())
    if groups is not None:
        from caop_fast.calibration.intervals import bootstrap_intervals  # it needs the formulas above

        result["n_groups"] = len(cluster_index(groups, len(answers))[1])
        result["intervals"] = bootstrap_intervals(correct, confidence, groups=groups, n_bins=n_bins, edges=edges)
    return result


class ReliabilityBin(NamedTuple):
    """One bin of a reliability diagram; the last four are None in an empty bin.

    `wilson_lower`, `wilson_upper` are the Wilson score interval of `accuracy`, answers taken as independent.
    """

    lower: float
    upper: float
    count: int
    mean_confidence: float | None
    accuracy: float | None
    wilson_lower: float | None
    wilson_upper: float | None


def reliability_bins(
    correct: ArrayLike, confidence: ArrayLike, n_bins: int = 10, edges: str = "official", *, level: float = 0.95
) -> list[ReliabilityBin]:
    """The n_bins bins of `ece`, parsed answers only, with intervals of the given level for the accuracy in each."""
    check_level(level)
    numbers, n, c, y = Answers(correct, confidence, n_bins=n_bins, edges=edges).counts().bins
    limits = bin_edges(n_bins, edges)
    bins = [ReliabilityBin(float(a), float(b), 0, None, None, None, None) for a, b in pairwise(limits)]
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


def wilson_interval(share: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927) of a proportion `share` seen in n > 0 independent trials."""
    check_level(level)
    if not n > 0 or not 0 <= share <= 1:
        raise ValueError(f"n must be positive and share in [0, 1], got n={n}, share={share}")
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # at shares of 0 and 1 one end is 0 or 1 exactly, which rounding may miss
    return (0.0 if share == 0 else float(centre - half)), (1.0 if share == 1 else float(centre + half))


def check_level(level: float) -> None:
    """Raise unless `level` is a number strictly between 0 and 1."""
    if not isinstance(level, (float, int, np.floating)) or not 0 < level < 1:
        raise ValueError(f"level must lie strictly between 0 and 1, got {level!r}")


def risk_coverage_curve(correct: ArrayLike, confidence: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Answering only the k most confident of the n parsed answers: (coverage [n] = k/n, risk [n] = error rate).

    The risk is expected over the order of equally confident answers; its mean is `aurc`.
    """
    counts = Answers(correct, confidence).counts()
    m = counts.n[0, ::-1].astype(np.int64)
    rate = 1.0 - _per_value(counts)[0, ::-1]
    k = np.arange(1, int(m.sum()) + 1)
    return k / max(len(k), 1), np.cumsum(np.repeat(rate, m)) / k


def constant_baseline(correct: ArrayLike, *, n_bins: int = 10, edges: str = "official") -> dict[str, Any]:
    """`calibration_metrics` of always stating the base rate, the mean of `correct`: what costs no model at all.

    Its ECE is 0 and its Brier score the uncertainty; only ranking (spr, auroc, resolution, aurc) beats it for sure.
    """
    y = Answers(correct, np.zeros(np.shape(correct)[:1])).correct
    base_rate = np.full(len(y), min(float(y.mean()), 1.0) if len(y) else 0.0)
    return calibration_metrics(y, base_rate, n_bins=n_bins, edges=edges)
