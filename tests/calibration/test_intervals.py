"""Bootstrap intervals: against a loop that resamples rows, for coverage, pairing and the noise floor."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from caop_fast.calibration import bootstrap_intervals, calibration_metrics, ece_floor, paired_bootstrap
from caop_fast.calibration.counts import Answers, Binning
from caop_fast.calibration.formulas import METRICS
from helpers import oracle_metrics as oracle


def data(n=60, seed=0, unparsed=0.1, step=20):
    rng = np.random.default_rng(seed)
    c = rng.integers(0, step + 1, n) / step
    y = (rng.random(n) < c).astype(float)
    return y, np.where(rng.random(n) < unparsed, math.nan, c), rng.integers(0, n // 4, n)


@pytest.mark.parametrize("step", [20, 10**6])
@pytest.mark.parametrize("edges", ["official", "exact"])
def test_every_metric_of_a_resample_is_that_of_the_repeated_rows(step, edges):
    y, c, _ = data(seed=1, step=step)
    rng = np.random.default_rng(2)
    weights = rng.multinomial(len(y), np.ones(len(y)) / len(y), size=20).astype(float)
    weights[0] = 0
    weights[0, np.flatnonzero(np.isnan(c))[0]] = 3  # a resample without a parsed answer
    counts = Answers(y, c).counts(weights, binning=Binning(7, edges))
    values = {name: metric(counts) for name, metric in METRICS.items()}
    for r, w in enumerate(weights.astype(int)):
        expected = oracle.metrics(np.repeat(y, w), np.repeat(c, w), 7, edges)
        for name, value in values.items():
            if expected[name] is None:
                assert math.isnan(value[r]), (name, r)
            else:
                assert value[r] == pytest.approx(expected[name], abs=1e-10), (name, r)


def test_intervals_are_percentiles_of_resampled_prompts():
    y, c, groups = data(n=200, seed=3)
    got = bootstrap_intervals(y, c, groups=groups, metrics=("ece", "auroc", "accuracy_all"), n_resamples=2000, seed=5)
    rng = np.random.default_rng(99)
    ids = np.unique(groups)
    rows = {g: np.flatnonzero(groups == g) for g in ids}
    samples = []
    for _ in range(300):
        pick = np.concatenate([rows[g] for g in rng.choice(ids, len(ids))])
        m = calibration_metrics(y[pick], c[pick])
        samples.append([m[name] for name in got])
    for interval, values in zip(got.values(), np.array(samples).T, strict=True):
        spread = values.std()
        assert interval == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=0.35 * spread)


def test_clusters_widen_the_interval():
    # 40 prompts whose 25 answers are all alike carry the information of 40 answers, not of 1000
    rng = np.random.default_rng(6)
    y = np.repeat(rng.integers(0, 2, 40), 25)
    c = np.full(1000, 0.5)
    groups = np.repeat(np.arange(40), 25)
    low, high = bootstrap_intervals(y, c, groups=groups, metrics=["accuracy"])["accuracy"]
    naive_low, naive_high = bootstrap_intervals(y, c, metrics=["accuracy"])["accuracy"]
    assert (high - low) == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 40), rel=0.15)
    assert (naive_high - naive_low) == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 1000), rel=0.15)


def test_coverage():
    rng = np.random.default_rng(7)
    hits = {"overconfidence_gap": 0, "brier": 0, "auroc": 0}
    truth = {"overconfidence_gap": 0.0, "brier": 1 / 6, "auroc": 5 / 6}  # uniform, perfectly calibrated
    for trial in range(200):
        c = rng.random(150)
        y = rng.random(150) < c
        for name, (low, high) in bootstrap_intervals(y, c, metrics=tuple(hits), n_resamples=300, seed=trial).items():
            hits[name] += low <= truth[name] <= high
    assert all(0.88 <= h / 200 <= 0.99 for h in hits.values()), hits


def test_level_and_resamples():
    y, c, _ = data(n=300)
    wide = bootstrap_intervals(y, c, metrics="brier", level=0.99)["brier"]
    narrow = bootstrap_intervals(y, c, metrics="brier", level=0.5)["brier"]
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    low, high = bootstrap_intervals(y, c, metrics=["brier"], n_resamples=1)["brier"]
    assert low == high


def test_seeds_and_ids_and_order():
    y, c, groups = data(n=100)
    first = bootstrap_intervals(y, c, groups=groups, seed=1)
    assert first == bootstrap_intervals(y, c, groups=[f"prompt {g}" for g in groups], seed=1)
    assert first == bootstrap_intervals(y, c, groups=groups, seed=np.random.default_rng(1))
    assert first != bootstrap_intervals(y, c, groups=groups, seed=2)
    assert set(first) == set(METRICS)
    json.dumps(first, allow_nan=False)


def test_chunks_do_not_show(monkeypatch):
    y, c, groups = data(n=100)
    whole = bootstrap_intervals(y, c, groups=groups)
    monkeypatch.setattr("caop_fast.calibration.intervals._CHUNK", 700)
    parts = bootstrap_intervals(y, c, groups=groups)
    assert all(parts[k] == pytest.approx(whole[k], abs=1e-9) for k in whole)


def test_undefined():
    assert set(bootstrap_intervals([], []).values()) == {None}
    assert set(bootstrap_intervals([1, 0], [0.4, 0.5], groups=["a", "a"]).values()) == {None}
    only_right = bootstrap_intervals([1, 1, 1], [0.1, 0.2, 0.3])
    assert only_right["auroc"] is None
    assert only_right["accuracy"] == (1.0, 1.0)
    hidden = bootstrap_intervals([1, 0, 1], [None, None, None])
    assert hidden["ece"] is None
    assert hidden["ece_upper"] == (1.0, 1.0)
    # one wrong answer among 30 is in most resamples, one of 2 prompts in half of them
    assert bootstrap_intervals([0] + [1] * 29, np.linspace(0, 1, 30))["auroc"] is not None


def test_pairing_cancels_what_the_prompts_share():
    rng = np.random.default_rng(8)
    hard = rng.random(400) < 0.5
    a = hard.astype(float), np.full(400, 0.9)
    b = hard.astype(float), np.full(400, 0.6)
    got = paired_bootstrap(a, b, metrics=["overconfidence_gap", "accuracy", "ece"])
    assert got["overconfidence_gap"].difference == pytest.approx(-0.3)
    assert got["overconfidence_gap"][3:] == pytest.approx((-0.3, -0.3))
    assert got["accuracy"][2:] == (0.0, 0.0, 0.0)
    assert got["ece"].a == calibration_metrics(*a)["ece"]
    assert got["ece"].b == calibration_metrics(*b)["ece"]
    assert got["ece"].difference == got["ece"].b - got["ece"].a
    unpaired = bootstrap_intervals(*b, metrics=["overconfidence_gap"])["overconfidence_gap"]
    assert unpaired[1] - unpaired[0] > 0.05


def test_paired_by_id_in_any_order_and_number():
    rng = np.random.default_rng(9)
    ids = np.arange(50)
    y_a, c_a = rng.integers(0, 2, 50).astype(float), rng.random(50)
    groups_b = np.repeat(ids, 3)
    y_b = np.repeat(y_a, 3)
    c_b = np.repeat(c_a, 3) * 0.5
    straight = paired_bootstrap((y_a, c_a), (y_b, c_b), groups=ids, groups_b=groups_b)
    order = rng.permutation(150)
    mixed = paired_bootstrap((y_a, c_a), (y_b[order], c_b[order]), groups=ids, groups_b=groups_b[order])
    for name in straight:
        assert mixed[name] == pytest.approx(straight[name], abs=1e-9)
    assert straight["accuracy"].low == pytest.approx(0, abs=1e-12)  # the same prompts in both models, three times in b
    assert straight["accuracy"].high == pytest.approx(0, abs=1e-12)
    json.dumps(straight, allow_nan=False)


def test_paired_undefined():
    got = paired_bootstrap(([1, 1, 1], [0.1, 0.2, 0.3]), ([1, 0, 1], [0.1, 0.2, 0.3]), metrics=["auroc", "ece"])
    assert got["auroc"].a is None
    assert got["auroc"][2:] == (None, None, None)
    assert got["auroc"].b == 0.5
    assert got["ece"].low is not None
    one = paired_bootstrap(([1], [0.5]), ([1], [0.75]), metrics=["ece"])["ece"]
    assert one == (0.5, 0.25, -0.25, None, None)


def test_ece_floor():
    rng = np.random.default_rng(10)
    c = np.concatenate([rng.random(50), np.repeat([0.25, 0.5, 0.3], 20), [math.nan] * 30])
    got = ece_floor(c, n_draws=4000)
    draws = []
    parsed = c[~np.isnan(c)]
    for _ in range(1000):
        draws.append(calibration_metrics(rng.random(len(parsed)) < parsed, parsed)["ece"])
    assert got["mean"] == pytest.approx(np.mean(draws), abs=0.003)
    assert got["upper"] == pytest.approx(np.quantile(draws, 0.95), abs=0.008)
    assert ece_floor(c, level=0.5)["upper"] < got["upper"]
    assert ece_floor([0.0, 1.0, 1.0]) == {"mean": 0.0, "upper": 0.0}
    assert ece_floor([]) is None
    assert ece_floor([math.nan]) is None
    assert ece_floor(c, seed=1) == ece_floor(c, seed=1) != ece_floor(c, seed=2)
    assert ece_floor([None, 0.5])["mean"] == 0.5


def test_ece_floor_of_97_answers_on_a_grid_of_ninths():
    # a perfectly calibrated model that says k/8 is still measured at 0.08 with 97 answers
    assert ece_floor(np.arange(97) % 9 / 8, n_draws=2000)["mean"] == pytest.approx(0.08, abs=0.005)


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"metrics": ["ece", "rmse"]}, ValueError, "metrics must be among .*got 'rmse'"),
        ({"n_resamples": 0}, ValueError, "n_resamples"),
        ({"n_resamples": 10.5}, ValueError, "n_resamples"),
        ({"level": 95}, ValueError, "level"),
        ({"level": "0.9"}, ValueError, "level"),
        ({"groups": [1]}, ValueError, "groups"),
        ({"n_bins": 0}, ValueError, "n_bins"),
        ({"edges": ""}, ValueError, "edges"),
    ],
)
def test_bad_input(kwargs, error, words):
    with pytest.raises(error, match=words):
        bootstrap_intervals([1, 0], [0.5, 0.1], **kwargs)
    with pytest.raises(error, match=words):
        paired_bootstrap(([1, 0], [0.5, 0.1]), ([1, 0], [0.5, 0.1]), **kwargs)


def test_bad_pairs():
    a, b = ([1, 0], [0.5, 0.1]), ([1, 0, 1], [0.5, 0.1, 0.2])
    with pytest.raises(ValueError, match="2 and 3 answers need groups and groups_b"):
        paired_bootstrap(a, b)
    with pytest.raises(ValueError, match="3 prompts that only one of them answered"):
        paired_bootstrap(a, b, groups=["p", "q"], groups_b=["p", "r", "s"])
    with pytest.raises(ValueError, match="groups_b needs groups"):
        paired_bootstrap(a, b, groups_b=[1, 2, 3])
    with pytest.raises(TypeError, match="a must be a pair"):
        paired_bootstrap([1, 0, 1], b)
    with pytest.raises(ValueError, match="n_draws"):
        ece_floor([0.5], n_draws=0)
    with pytest.raises(ValueError, match="confidence"):
        ece_floor([1.5])
    with pytest.raises(TypeError, match="confidence"):
        ece_floor(["0.5"])
    with pytest.raises(ValueError, match="n_bins"):
        ece_floor([0.5], n_bins=0)


def test_resamples_are_counted_many_at_a_time(monkeypatch):
    """What a bootstrap costs is its passes over the answers: each serves hundreds of resamples and all metrics."""
    passes, counts = [], Answers.counts

    def counted(self, weights=None, **options):
        passes.append(1 if weights is None else len(weights))
        return counts(self, weights, **options)

    monkeypatch.setattr(Answers, "counts", counted)
    rng = np.random.default_rng(11)
    c = rng.random(5000)
    bootstrap_intervals(rng.random(5000) < c, c, groups=np.arange(5000) // 8)
    assert sum(passes) == 1000
    assert len(passes) <= 5
