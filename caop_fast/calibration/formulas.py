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

from collections.abc import Callable

import numpy as np

from caop_fast.calibration.counts import Counts, FloatArray

NLL_CLIP = 1e-6


def _ratio(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    """Elementwise, NaN (undefined) where the denominator is 0."""
    out = np.full(np.broadcast_shapes(np.shape(numerator), np.shape(denominator)), np.nan)
    return np.divide(numerator, denominator, out=out, where=np.asarray(denominator) > 0)


def accuracy_per_value(c: Counts) -> FloatArray:
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
    return (c.n * (c.values - accuracy_per_value(c)) ** 2 + c.spread).sum(axis=1)


def _brier(c: Counts) -> FloatArray:
    return _ratio(_squared_error(c), c.total)


def _brier_upper(c: Counts) -> FloatArray:
    return _ratio(_squared_error(c) + c.n_unparsed, c.total + c.n_unparsed)


def _reliability(c: Counts) -> FloatArray:
    return _ratio((c.n * (c.values - accuracy_per_value(c)) ** 2).sum(axis=1), c.total)


def _resolution(c: Counts) -> FloatArray:
    # A resample without parsed answers has mean NaN, which the ratio turns into NaN as it should.
    return _ratio((c.n * (accuracy_per_value(c) - _accuracy(c)[:, None]) ** 2).sum(axis=1), c.total)


def _uncertainty(c: Counts) -> FloatArray:
    between = c.n * (accuracy_per_value(c) - _accuracy(c)[:, None]) ** 2
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
