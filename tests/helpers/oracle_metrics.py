"""Calibration metrics by plain loops over answers and pairs, written from their definitions; slow on purpose."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np


def parsed(correct, confidence):
    return [
        (float(y), float(c)) for y, c in zip(correct, confidence, strict=True) if c is not None and not math.isnan(c)
    ]


def bin_of(c, n_bins, edges):
    if edges == "exact":
        return min(int(Fraction(repr(float(c))) * n_bins), n_bins - 1)
    limits = np.linspace(0, 1, n_bins + 1)
    for k, (low, high) in enumerate(pairwise(limits)):
        if low <= c < high:
            return k
    return n_bins - 1


def bins(rows, n_bins, edges):
    found = {}
    for y, c in rows:
        found.setdefault(bin_of(c, n_bins, edges), []).append((y, c))
    return found


def binned_error(rows, n_bins, edges):
    return sum(abs(math.fsum(c - y for y, c in members)) for members in bins(rows, n_bins, edges).values())


def mce(rows, n_bins, edges):
    return max(
        abs(math.fsum(c for _, c in m) / len(m) - math.fsum(y for y, _ in m) / len(m))
        for m in bins(rows, n_bins, edges).values()
    )


def ece_equal_mass(rows, n_bins):
    found = {}
    for y, c in rows:
        below, ties = sum(d < c for _, d in rows), sum(d == c for _, d in rows)
        middle = Fraction(2 * below + ties, 2 * len(rows))
        found.setdefault(min(math.floor(middle * n_bins), n_bins - 1), []).append(c - y)
    return sum(abs(math.fsum(m)) for m in found.values()) / len(rows)


def murphy(rows):
    n, mean = len(rows), math.fsum(y for y, _ in rows) / len(rows)
    reliability = resolution = 0.0
    for value in {c for _, c in rows}:
        ys = [y for y, c in rows if c == value]
        rate = math.fsum(ys) / len(ys)
        reliability += len(ys) * (value - rate) ** 2 / n
        resolution += len(ys) * (rate - mean) ** 2 / n
    return reliability, resolution, math.fsum((y - mean) ** 2 for y, _ in rows) / n


def pairs(rows):
    right, wrong = [c for y, c in rows if y == 1], [c for y, c in rows if y == 0]
    if not right or not wrong:
        return None, None
    n = len(right) * len(wrong)
    return sum(a > b for a in right for b in wrong) / n, sum(a == b for a in right for b in wrong) / n


def risks(rows):
    """Expected error rate among the k most confident, k = 1..n, by linearity of expectation over random tie orders."""
    out = []
    for k in range(1, len(rows) + 1):
        errors = 0.0
        for y, c in rows:
            above, ties = sum(d > c for _, d in rows), sum(d == c for _, d in rows)
            errors += (1 - y) * min(max(k - above, 0), ties) / ties
        out.append(errors / k)
    return out


def metrics(correct, confidence, n_bins=10, edges="official"):
    rows = parsed(correct, confidence)
    n, n_unparsed = len(correct), len(correct) - len(rows)
    names = [
        "accuracy",
        "mean_confidence",
        "overconfidence_gap",
        "ece",
        "ece_equal_mass",
        "mce",
        "brier",
        "brier_skill",
        "reliability",
        "resolution",
        "uncertainty",
        "nll",
        "auroc",
        "spr",
        "tie_rate",
        "aurc",
        "ece_upper",
        "brier_upper",
        "accuracy_all",
    ]
    out = dict.fromkeys(names)
    out.update(n=n, n_unparsed=n_unparsed, n_nll_clipped=sum(not 1e-6 <= c <= 1 - 1e-6 for _, c in rows))
    if n:
        out["accuracy_all"] = math.fsum(correct) / n
        out["ece_upper"] = (binned_error(rows, n_bins, edges) + n_unparsed) / n
        out["brier_upper"] = (math.fsum((c - y) ** 2 for y, c in rows) + n_unparsed) / n
    if not rows:
        return out
    m = len(rows)
    out["accuracy"] = math.fsum(y for y, _ in rows) / m
    out["mean_confidence"] = math.fsum(c for _, c in rows) / m
    out["overconfidence_gap"] = out["mean_confidence"] - out["accuracy"]
    out["ece"] = binned_error(rows, n_bins, edges) / m
    out["ece_equal_mass"] = ece_equal_mass(rows, n_bins)
    out["mce"] = mce(rows, n_bins, edges)
    out["brier"] = math.fsum((c - y) ** 2 for y, c in rows) / m
    out["reliability"], out["resolution"], out["uncertainty"] = murphy(rows)
    if len({y for y, _ in rows}) > 1:
        out["brier_skill"] = 1 - out["brier"] / out["uncertainty"]
    clipped = [(y, min(max(c, 1e-6), 1 - 1e-6)) for y, c in rows]
    out["nll"] = -math.fsum(y * math.log(c) + (1 - y) * math.log(1 - c) for y, c in clipped) / m
    if all(y in (0, 1) for y in correct):
        out["spr"], out["tie_rate"] = pairs(rows)
        if out["spr"] is not None:
            out["auroc"] = out["spr"] + out["tie_rate"] / 2
    out["aurc"] = math.fsum(risks(rows)) / m
    return out
