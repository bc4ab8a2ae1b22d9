"""Bootstrap intervals clustered by prompt, paired differences between two models, and the noise floor of ECE.

Answers to one prompt are not independent, so prompts are drawn with replacement and each brings all its answers
(cluster bootstrap). Two models are compared on the same draws of prompts, which cancels what the prompts have in
common. Intervals are the percentiles of the resampled metric.

Each public function takes arrays; its ``_of`` form takes `Answers`, which are sorted once for a whole report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from caop_fast.calibration.counts import (
    DEFAULT_BINNING,
    Answers,
    Binning,
    FloatArray,
    IntArray,
    as_sequence,
    bin_index,
    check_level,
    cluster_index,
)
from caop_fast.calibration.formulas import METRICS

Groups = Sequence[Hashable] | NDArray[Any] | None
Answered = tuple[ArrayLike, ArrayLike]

_CHUNK = 1 << 20  # numbers per temporary array: a few MB, which stays near the cache


class Resampling(NamedTuple):
    """How a bootstrap is drawn: how many resamples, the coverage its intervals aim at, the seed."""

    n_resamples: int = 1000
    level: float = 0.95
    seed: int | np.random.Generator = 0


class Difference(NamedTuple):
    """A metric in two models: `difference` = b - a with its interval [low, high]; None where undefined."""

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
        metrics: keys of `formulas.METRICS`.
        n_resamples: bootstrap draws, at least 1.
        level: coverage aimed at, in (0, 1).
        seed: of a numpy Generator, or a Generator; the same seed gives the same intervals.

    Returns:
        None for a metric that is undefined on most resamples, and where nothing is known of the spread: for all with
        fewer than two prompts, and for all but accuracy_all when only one prompt has an answer that was read.
    """
    resampling = Resampling(n_resamples, level, seed)
    return intervals_of(Answers(correct, confidence), groups, metrics, resampling, Binning(n_bins, edges))


def intervals_of(
    answers: Answers,
    groups: Groups,
    metrics: Sequence[str],
    resampling: Resampling,
    binning: Binning = DEFAULT_BINNING,
) -> dict[str, tuple[float, float] | None]:
    """`bootstrap_intervals` of answers that are sorted already."""
    names = _check(metrics, resampling)
    cluster, ids = cluster_index(groups, len(answers))
    (drawn,) = resample_metrics([(answers, cluster)], len(ids), names, resampling, binning)
    known = _spread_known(names, answers, cluster)
    return {name: percentiles(drawn[name], resampling.level) if name in known else None for name in names}


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
    """The difference b - a of each metric between two models on the same prompts, with percentile intervals.

    Args:
        a, b: (correct, confidence) of each model, e.g. before and after training.
        groups: prompt ids of the answers of `a`, and of `b` as well unless `groups_b` is given (then the models may
            have different numbers of answers per prompt, in any order). None pairs the answers by position.
        metrics, n_resamples, level, seed, n_bins, edges: as in `bootstrap_intervals`.

    Raises:
        ValueError: the models did not answer the same prompts; the message says how many have no partner.
    """
    answers_a, answers_b = Answers(*_pair("a", a)), Answers(*_pair("b", b))
    resampling, binning = Resampling(n_resamples, level, seed), Binning(n_bins, edges)
    return differences_of(answers_a, answers_b, groups, groups_b, metrics, resampling, binning)


def differences_of(
    a: Answers,
    b: Answers,
    groups: Groups,
    groups_b: Groups,
    metrics: Sequence[str],
    resampling: Resampling,
    binning: Binning = DEFAULT_BINNING,
) -> dict[str, Difference]:
    """`paired_bootstrap` of answers that are sorted already."""
    names = _check(metrics, resampling)
    if groups is None and groups_b is not None:
        raise ValueError("groups_b needs groups: without the prompt ids of the first model there is nothing to pair")
    if groups_b is None and len(a) != len(b):
        raise ValueError(f"models of {len(a)} and {len(b)} answers need groups and groups_b: the prompt ids of each")
    cluster_a, ids = cluster_index(groups, len(a))
    cluster_b, ids_b = cluster_index(groups if groups_b is None else groups_b, len(b), name="groups_b")
    unpaired = set(ids) ^ set(ids_b)
    if unpaired:
        raise ValueError(
            f"both models must answer the same prompts, got {len(unpaired)} prompts that only one of them answered"
        )
    number = {i: k for k, i in enumerate(ids)}
    to_common = np.asarray([number[i] for i in ids_b], dtype=np.int64)
    pair = [(a, cluster_a), (b, to_common[cluster_b])]
    drawn_a, drawn_b = resample_metrics(pair, len(ids), names, resampling, binning)
    known = set.intersection(*(_spread_known(names, *one) for one in pair))
    counts_a, counts_b = a.counts(binning=binning), b.counts(binning=binning)
    result = {}
    for name in names:
        at_a, at_b = (float(METRICS[name](counts)[0]) for counts in (counts_a, counts_b))
        difference, interval = at_b - at_a, None
        if name in known and not math.isnan(difference):
            interval = percentiles(drawn_b[name] - drawn_a[name], resampling.level)
        low, high = interval or (None, None)
        result[name] = Difference(_defined(at_a), _defined(at_b), _defined(difference), low, high)
    return result


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value


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
    answers = Answers(np.zeros(np.shape(confidence)), confidence)
    return ece_floor_of(answers, Resampling(n_draws, level, seed), Binning(n_bins, edges))


def ece_floor_of(
    answers: Answers, resampling: Resampling, binning: Binning = DEFAULT_BINNING
) -> dict[str, float] | None:
    """`ece_floor` of the confidences of answers that are sorted already; their labels are not used."""
    n_draws, level, seed = resampling
    check_level(level)
    _check_count("n_draws", n_draws)
    counts = answers.counts(binning=binning)
    if not len(counts.values):
        return None
    rng = np.random.default_rng(seed)
    n = counts.n[0].astype(np.int64)
    _, starts = np.unique(bin_index(counts.values, *binning), return_index=True)
    eces = []
    for draws in _chunks(n_draws, len(n)):
        error = rng.binomial(n, counts.values, size=(draws, len(n))) - n * counts.values
        eces.append(np.abs(np.add.reduceat(error, starts, axis=1)).sum(axis=1) / n.sum())
    values = np.concatenate(eces)
    return {"mean": float(values.mean()), "upper": float(np.quantile(values, level))}


def resample_metrics(
    models: Sequence[tuple[Answers, IntArray]],
    n_clusters: int,
    names: Sequence[str],
    resampling: Resampling,
    binning: Binning = DEFAULT_BINNING,
) -> list[dict[str, FloatArray]]:
    """Bootstrap values of several models on the same draws of clusters, for statistics that join models.

    Args:
        models: the answers of each model, with the cluster number in [0, n_clusters) of each answer.
        n_clusters: clusters drawn, with replacement, in every resample.
        names: keys of `formulas.METRICS`.
        resampling: number of resamples and seed; its level is not used.

    Returns:
        per model ``{metric: [n_resamples] values}``, NaN where undefined on a resample.
    """
    rng = np.random.default_rng(resampling.seed)
    metrics: dict[str, Callable[..., FloatArray]] = {name: METRICS[name] for name in names}
    parts: list[dict[str, list[FloatArray]]] = [{name: [] for name in names} for _ in models]
    width = max([n_clusters, *(len(answers) for answers, _ in models)])
    for resamples in _chunks(resampling.n_resamples, width):
        picks = rng.integers(0, max(n_clusters, 1), (resamples, n_clusters))
        picks += np.arange(resamples)[:, None] * n_clusters
        times = np.bincount(picks.ravel(), minlength=resamples * n_clusters).astype(np.float64)
        times = times.reshape(resamples, n_clusters)
        for part, (answers, cluster) in zip(parts, models, strict=True):
            counts = answers.counts(times[:, cluster], binning=binning)
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


def _check(metrics: Sequence[str], resampling: Resampling) -> tuple[str, ...]:
    names = as_sequence(metrics)
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f"metrics must be among {', '.join(METRICS)}, got {', '.join(map(repr, unknown))}")
    _check_count("n_resamples", resampling.n_resamples)
    check_level(resampling.level)
    return names


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}")


def _pair(name: str, answered: Answered) -> Answered:
    if not isinstance(answered, (tuple, list)) or len(answered) != 2:
        raise TypeError(f"{name} must be a pair (correct, confidence), got {type(answered).__name__}")
    return answered[0], answered[1]
