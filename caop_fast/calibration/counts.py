"""Graded answers as counts per distinct confidence, on which alone every calibration metric depends.

A bootstrap resample of the answers changes the counts and nothing else, so a metric written over counts serves the
point estimate (one row of counts) and a thousand resamples (a thousand rows) alike.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
EDGES = ("official", "exact")


def check_answers(correct: ArrayLike, confidence: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Both as float64 [n]: `correct` within [0, 1], `confidence` within [0, 1] or NaN (also given as None)."""
    y, c = _vector("correct", correct), _vector("confidence", confidence)
    if len(y) != len(c):
        raise ValueError(f"correct and confidence must be of one length, got {len(y)} and {len(c)}")
    bad = np.flatnonzero(~((y >= 0) & (y <= 1)))
    if len(bad):
        raise ValueError(f"correct must lie in [0, 1], got {y[bad[0]]} at position {bad[0]}")
    bad = np.flatnonzero(~(((c >= 0) & (c <= 1)) | np.isnan(c)))
    if len(bad):
        raise ValueError(
            f"confidence must lie in [0, 1], or be NaN where unparsed, got {c[bad[0]]} at position {bad[0]}"
        )
    return y, c


def _vector(name: str, values: ArrayLike) -> FloatArray:
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "biuf" and not (array.dtype.kind == "O" and all(_is_number(v) for v in array.flat)):
            raise TypeError
        array = array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a vector of numbers, got {type(values).__name__}: {values!r:.80}") from error
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {array.shape}")
    return array


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, np.bool_, np.number))


class Binning(NamedTuple):
    """The equal-width bins of a metric: how many, and where their edges lie (see `bin_edges`)."""

    n_bins: int = 10
    edges: str = "official"


DEFAULT_BINNING = Binning()


def check_level(level: float) -> None:
    """Raise unless `level` is a number strictly between 0 and 1."""
    if not isinstance(level, (float, int, np.floating)) or not 0 < level < 1:
        raise ValueError(f"level must lie strictly between 0 and 1, got {level!r}")


def check_bins(n_bins: int, edges: str) -> None:
    """Raise TypeError or ValueError for arguments that `bin_edges` does not take."""
    if isinstance(n_bins, bool) or not isinstance(n_bins, (int, np.integer)):
        raise TypeError(f"n_bins must be an int, got {n_bins!r}")
    if n_bins < 1:
        raise ValueError(f"n_bins must be at least 1, got {n_bins}")
    if edges not in EDGES:
        raise ValueError(f"edges must be one of {', '.join(EDGES)}, got {edges!r}")


def bin_edges(n_bins: int, edges: str) -> FloatArray:
    """The n_bins + 1 edges of equal-width bins on [0, 1].

    ``"official"``: `np.linspace`, as the published evaluations do. Some edges are then a little above the decimal they
    stand for (0.30000000000000004), so that 0.3, 0.6 and 0.7 fall one bin low at n_bins = 10. ``"exact"``: the float64
    nearest to k/n_bins, so that a decimal on an edge belongs to the bin above it.
    """
    check_bins(n_bins, edges)
    return np.linspace(0.0, 1.0, n_bins + 1) if edges == "official" else np.arange(n_bins + 1) / n_bins


def bin_index(confidence: FloatArray, n_bins: int, edges: str) -> IntArray:
    """The left-closed bin of each confidence; 1.0 belongs to the last."""
    index = np.searchsorted(bin_edges(n_bins, edges), confidence, side="right") - 1
    return np.minimum(index, n_bins - 1).astype(np.int64)


def cluster_index(
    groups: Iterable[Hashable] | None, n: int, *, name: str = "groups"
) -> tuple[IntArray, list[Hashable]]:
    """The cluster number of each of the n rows, and the ids in order of appearance. None: each row is its own."""
    if groups is None:
        return np.arange(n), list(range(n))
    ids = groups.tolist() if isinstance(groups, np.ndarray) else list(groups)
    if len(ids) != n:
        raise ValueError(f"{name} must hold one id per answer: {n}, got {len(ids)}")
    numbers: dict[Hashable, int] = {}
    try:
        index = [numbers.setdefault(i, len(numbers)) for i in ids]
    except TypeError as error:
        raise TypeError(f"{name} must hold hashable ids: {error}") from error
    if any(i is None or i != i for i in numbers):
        raise ValueError(f"{name} must hold an id for every answer, got None or NaN")
    return np.asarray(index, dtype=np.int64), list(numbers)


@dataclass(frozen=True)
class Counts:
    """R sets of answers over the same K distinct confidences; with R = 1 simply the answers.

    Attributes:
        values: [K] the distinct confidences, ascending.
        n: [R, K] parsed answers at each confidence; whole numbers, some may be 0 in a resample.
        y: [R, K] their sum of `correct`.
        spread: [R, K] their sum of squared deviations of `correct` from its mean there; >= 0.
        n_unparsed: [R] answers without a confidence.
        y_unparsed: [R] their sum of `correct`.
        binary: whether every `correct` is 0 or 1.
        n_bins, edges: see `bin_edges`.
    """

    values: FloatArray
    n: FloatArray
    y: FloatArray
    spread: FloatArray
    n_unparsed: FloatArray
    y_unparsed: FloatArray
    binary: bool
    n_bins: int
    edges: str

    @cached_property
    def total(self) -> FloatArray:
        """[R] parsed answers."""
        return self.n.sum(axis=1)

    @cached_property
    def bins(self) -> tuple[IntArray, FloatArray, FloatArray, FloatArray]:
        """The non-empty bins: their numbers [B]; per bin [R, B] count, sum of confidence, sum of correct."""
        numbers, starts = np.unique(bin_index(self.values, self.n_bins, self.edges), return_index=True)
        if not len(numbers):
            empty = np.zeros((len(self.n), 0))
            return numbers, empty, empty, empty
        sums = [np.add.reduceat(x, starts, axis=1) for x in (self.n, self.n * self.values, self.y)]
        return numbers, sums[0], sums[1], sums[2]


class Answers:
    """Answers sorted by confidence once, from which `Counts` of the whole and of any resample are made.

    Args:
        correct: [n] in [0, 1].
        confidence: [n] in [0, 1], NaN where unparsed.
    """

    def __init__(self, correct: ArrayLike, confidence: ArrayLike) -> None:
        self.correct, self.confidence = check_answers(correct, confidence)
        self.unparsed = np.isnan(self.confidence)
        parsed = np.flatnonzero(~self.unparsed)
        self._order = parsed[np.argsort(self.confidence[parsed], kind="stable")]
        self.values, self._starts = np.unique(self.confidence[self._order], return_index=True)
        self.binary = bool(np.isin(self.correct, (0.0, 1.0)).all())

    def __len__(self) -> int:
        return len(self.correct)

    def counts(self, weights: FloatArray | None = None, *, binning: Binning = DEFAULT_BINNING) -> Counts:
        """Counts with `weights` [R, n], the times each answer occurs in each resample; None: every answer once."""
        check_bins(*binning)
        if weights is None:
            weights = np.ones((1, len(self)))
        w = weights[:, self._order]
        y = self.correct[self._order]
        n, sum_y = self._sum(w), self._sum(w * y)
        # sum (y - mean)^2 = sum y - (sum y)^2 / n for labels of 0 and 1
        squares = sum_y if self.binary else self._sum(w * y * y)
        spread = squares - sum_y * np.divide(sum_y, n, out=np.zeros_like(n), where=n > 0)
        return Counts(
            values=self.values,
            n=n,
            y=sum_y,
            spread=np.maximum(spread, 0.0),
            n_unparsed=weights[:, self.unparsed].sum(axis=1),
            y_unparsed=weights[:, self.unparsed] @ self.correct[self.unparsed],
            binary=self.binary,
            n_bins=int(binning.n_bins),
            edges=binning.edges,
        )

    def _sum(self, x: FloatArray) -> FloatArray:
        return np.add.reduceat(x, self._starts, axis=1) if len(self._starts) else x[:, :0]


def as_sequence(names: Sequence[str] | str) -> tuple[str, ...]:
    """One name or several, as a tuple."""
    return (names,) if isinstance(names, str) else tuple(names)
