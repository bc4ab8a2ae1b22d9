"""Bootstrap intervals clustered by prompt, paired differences between two arms, and the noise floor of ECE.

Answers to one prompt are not independent, so prompts are drawn with replacement and each brings all its answers
(cluster bootstrap). Two arms are compared on the same draws of prompts, which cancels what the prompts have in common.
Intervals are the percentiles of the resampled metric.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from caop_fast.calibration.counts import (
    Answers,
    FloatArray,
    IntArray,
    as_sequence,
    bin_index,
    cluster_index,
)
from caop_fast.calibration.metrics import METRICS, check_level

Groups = Sequence[Hashable] | NDArray[Any] | None
Answered = tuple[ArrayLike, ArrayLike]

_CHUNK = 1 << 20  # numbers per temporary array: a few MB, which stays near the cache


class Difference(NamedTuple):
    """A metric in two arms: `difference` = b - a with its interval [low, high]; None where undefined."""

    a: float | None
    b: float | None
    difference: float | None
    low: float | None
    high: float | None


def bootstrap_intervals(
    correct: ArrayLike,
    confidence: ArrayLike,
    *,
    groups: Groups = None,
    metrics: Sequence[str] = tuple(METRICS),
    n_resamples: int = 1000,
    level: float = 0.95,
    seed: int | np.random.Generator = 0,
    n_bins: int = 10,
    edges: str = "official",
) -> dict[str, tuple[float, float] | None]:
    """Percentile intervals of calibration metrics, (low, high) for each name in `metrics`.

    Resampling adds noise to every bin, so the intervals of ece, mce and reliability lie somewhat high: read them beside
    `ece_floor`.

    Args:
        correct, confidence, n_bins, edges: as in `calibration_metrics`.
        groups: [n] prompt ids; None takes every answer as a prompt of its own.
        metrics: keys of `metrics.METRICS`.
        n_resamples: bootstrap draws, at least 1.
        level: coverage aimed at, in (0, 1).
        seed: of a numpy Generator, or a Generator; the same seed gives the same intervals.

    Returns:
        None for a metric that is undefined on most resamples, and where nothing is known of the spread: for all with
        fewer than two prompts, and for all but accuracy_all when only one prompt has an answer that was read.
    """
    names = _check(metrics, n_resamples, level)
    answers = Answers(correct, confidence, n_bins=n_bins, edges=edges)
    cluster, ids = cluster_index(groups, len(answers))
    drawn = resample_metrics([(answers, cluster)], len(ids), names, n_resamples, seed)
    known = _spread_known(names, answers, cluster)
    return {name: percentiles(drawn[0][name], level) if name in known else None for name in names}


def paired_bootstrap(
    a: Answered,
    b: Answered,
    *,
    groups: Groups = None,
    groups_b: Groups = None,
    metrics: Sequence[str] = tuple(METRICS),
    n_resamples: int = 1000,
    level: float = 0.95,
    seed: int | np.random.Generator = 0,
    n_bins: int = 10,
    edges: str = "official",
) -> dict[str, Difference]:
    """The difference b - a of each metric between two arms on the same prompts, with percentile intervals.

    Args:
        a, b: (correct, confidence) of each arm, e.g. before and after training.
        groups: prompt ids of the answers of `a`, and of `b` as well unless `groups_b` is given (then the arms may hold
            different numbers of answers per prompt, in any order). None pairs the answers by position.
        metrics, n_resamples, level, seed, n_bins, edges: as in `bootstrap_intervals`.

    Raises:
        ValueError: the arms do not hold the same prompts; the message says how many have no partner.
    """
    names = _check(metrics, n_resamples, level)
    if groups is None and groups_b is not None:
        raise ValueError("groups_b needs groups: without the prompt ids of the first arm there is nothing to pair")
    arms = [Answers(*_pair("a", a), n_bins=n_bins, edges=edges), Answers(*_pair("b", b), n_bins=n_bins, edges=edges)]
    if groups_b is None and len(arms[0]) != len(arms[1]):
        raise ValueError(
            f"arms of {len(arms[0])} and {len(arms[1])} answers need groups and groups_b: the prompt ids of each"
        )
    cluster_a, ids = cluster_index(groups, len(arms[0]))
    cluster_b, ids_b = cluster_index(groups if groups_b is None else groups_b, len(arms[1]), name="groups_b")
    unpaired = set(ids) ^ set(ids_b)
    if unpaired:
        raise ValueError(f"both arms must answer the same prompts, got {len(unpaired)} prompts that only one arm holds")
    number = {i: k for k, i in enumerate(ids)}
    to_common = np.asarray([number[i] for i in ids_b], dtype=np.int64)
    clusters = [cluster_a, to_common[cluster_b]]
    drawn = resample_metrics(list(zip(arms, clusters, strict=True)), len(ids), names, n_resamples, seed)
    points = [arm.counts() for arm in arms]
    known = set.intersection(*(_spread_known(names, *arm) for arm in zip(arms, clusters, strict=True)))
    result = {}
    for name in names:
        at = [float(METRICS[name](counts)[0]) for counts in points]
        values = [None if np.isnan(v) else v for v in at]
        difference = None if None in values else at[1] - at[0]
        defined = difference is not None and name in known
        interval = percentiles(drawn[1][name] - drawn[0][name], level) if defined else None
        result[name] = Difference(*values, difference, *(interval or (None, None)))
    return result


def ece_floor(
    confidence: ArrayLike,
    *,
    n_bins: int = 10,
    edges: str = "official",
    n_draws: int = 1000,
    level: float = 0.95,
    seed: int | np.random.Generator = 0,
) -> dict[str, float] | None:
    """The ECE that a perfectly calibrated forecaster with these confidences would measure, from sampling noise alone.

    Labels are drawn as independent Bernoulli(confidence) `n_draws` times; NaN confidences are left out.

    Returns:
        ``{"mean": expected ECE, "upper": its quantile at `level`}``: an ECE above ``upper`` is more than noise.
        None without any confidence.
    """
    check_level(level)
    _check_count("n_draws", n_draws)
    counts = Answers(np.zeros(np.shape(confidence)), confidence, n_bins=n_bins, edges=edges).counts()
    if not len(counts.values):
        return None
    rng = np.random.default_rng(seed)
    n = counts.n[0].astype(np.int64)
    _, starts = np.unique(bin_index(counts.values, n_bins, edges), return_index=True)
    eces = []
    for draws in _chunks(n_draws, len(n)):
        error = rng.binomial(n, counts.values, size=(draws, len(n))) - n * counts.values
        eces.append(np.abs(np.add.reduceat(error, starts, axis=1)).sum(axis=1) / n.sum())
    values = np.concatenate(eces)
    return {"mean": float(values.mean()), "upper": float(np.quantile(values, level))}


def resample_metrics(
    arms: Sequence[tuple[Answers, IntArray]],
    n_clusters: int,
    names: Sequence[str],
    n_resamples: int,
    seed: int | np.random.Generator,
) -> list[dict[str, FloatArray]]:
    """Bootstrap values of several arms on the same draws of clusters, for statistics that join arms.

    Args:
        arms: the answers of each arm, with the cluster number in [0, n_clusters) of each answer.
        n_clusters: clusters drawn, with replacement, in every resample.
        names: keys of `metrics.METRICS`.

    Returns:
        per arm ``{metric: [n_resamples] values}``, NaN where undefined on a resample.
    """
    rng = np.random.default_rng(seed)
    metrics: dict[str, Callable[..., FloatArray]] = {name: METRICS[name] for name in names}
    parts: list[dict[str, list[FloatArray]]] = [{name: [] for name in names} for _ in arms]
    for resamples in _chunks(n_resamples, max([n_clusters, *(len(answers) for answers, _ in arms)])):
        picks = rng.integers(0, max(n_clusters, 1), (resamples, n_clusters))
        picks += np.arange(resamples)[:, None] * n_clusters
        times = np.bincount(picks.ravel(), minlength=resamples * n_clusters).reshape(resamples, n_clusters)
        times = times.astype(np.float64)
        for part, (answers, cluster) in zip(parts, arms, strict=True):
            counts = answers.counts(times[:, cluster])
            for name, metric in metrics.items():
                part[name].append(metric(counts))
    return [{name: np.concatenate(values) for name, values in part.items()} for part in parts]


def _spread_known(names: Sequence[str], answers: Answers, cluster: IntArray) -> set[str]:
    """The metrics that resampling can vary: a single cluster, or a single one with a parsed answer, only repeats."""
    if len(np.unique(cluster)) < 2:
        return set()
    one_parsed = len(np.unique(cluster[~answers.unparsed])) == 1
    return {name for name in names if name == "accuracy_all" or not one_parsed}


def _chunks(total: int, width: int) -> Iterator[int]:
    """Split `total` rows of `width` numbers into chunks of about _CHUNK numbers."""
    size = max(1, _CHUNK // max(width, 1))
    for start in range(0, total, size):
        yield min(size, total - start)


def percentiles(values: FloatArray, level: float) -> tuple[float, float] | None:
    """(low, high) of resampled values at `level`; None where most of them are undefined (NaN)."""
    defined = values[~np.isnan(values)]
    if 2 * len(defined) < len(values):
        return None
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _check(metrics: Sequence[str], n_resamples: int, level: float) -> tuple[str, ...]:
    names = as_sequence(metrics)
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f"metrics must be among {', '.join(METRICS)}, got {', '.join(map(repr, unknown))}")
    _check_count("n_resamples", n_resamples)
    check_level(level)
    return names


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}")


def _pair(name: str, arm: Answered) -> Answered:
    if not isinstance(arm, (tuple, list)) or len(arm) != 2:
        raise TypeError(f"{name} must be a pair (correct, confidence), got {type(arm).__name__}")
    return arm[0], arm[1]
