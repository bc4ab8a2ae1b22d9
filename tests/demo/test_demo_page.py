"""The demo's verdict follows from its numbers, whichever way they fall; its page and table survive missing ones."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from caop_fast.calibration import calibration_metrics
from caop_fast.demo.page import CALIBRATION_KEYS, demo_page, demo_table, demo_verdict


def metrics(accuracy: float, confidence: float, ece: float, auroc: float = 0.6) -> dict:
    return {
        "accuracy": accuracy,
        "mean_confidence": confidence,
        "overconfidence_gap": confidence - accuracy,
        "ece": ece,
        "brier": 0.2,
        "spr": 0.5,
        "auroc": auroc,
    }


def summary(**changes: dict) -> dict:
    methods = {
        "base": metrics(0.39, 0.40, 0.13),
        "opd": metrics(0.51, 0.998, 0.49, 0.50),
        "caop": {**metrics(0.512, 0.52, 0.33), "expected": metrics(0.512, 0.52, 0.033, 0.73)},
        "direct": metrics(0.5, 0.48, 0.03),
        "masked": metrics(0.5, 0.4, 0.1),
    }
    methods.update(changes)
    return {
        "task": "pronounce",
        "seed": 7,
        "seconds": 200.0,
        "methods": [
            {"name": name, "answer_entropy": 0.5, "confidence_entropy": None, **method}
            for name, method in methods.items()
            if method
        ],
        "history": [
            {"method": "opd", "step": s, "accuracy": 0.4, "gap": g, "ece": g}
            for s, g in ((0, 0.0), (10, 0.6), (20, 0.5))
        ],
    }


def test_expected_effect_and_repair() -> None:
    text = demo_verdict(summary())
    assert text.startswith(
        "Plain on-policy distillation made the model more accurate (from 39.0 % to 51.0 %) and blindly certain"
    )
    assert "CaOP keeps that accuracy and takes the overconfidence away: 51.2 % right against 51.0 %" in text
    assert "0.33 by the confidence it writes, 0.03 by the expected value" in text
    assert text.count(". ") == 1


@pytest.mark.parametrize(
    ("changes", "first", "second"),
    [
        ({"opd": metrics(0.51, 0.52, 0.14)}, "The expected effect did not appear", "CaOP did not clearly lower"),
        (
            {"opd": metrics(0.38, 0.998, 0.61)},
            "left accuracy where it was (from 39.0 % to 38.0 %) but blindly",
            "CaOP beats",
        ),
        ({"opd": metrics(0.30, 0.998, 0.7)}, "made the model less accurate", "CaOP beats its accuracy"),
        ({"opd": metrics(0.51, 0.8, 0.3)}, "and overconfident:", "CaOP did not clearly lower"),
        ({"caop": metrics(0.45, 0.46, 0.1)}, "blindly certain", "overconfidence away but loses accuracy"),
        (
            {"caop": metrics(0.45, 0.99, 0.55)},
            "blindly certain",
            "did not clearly lower the calibration error in this run, and loses",
        ),
        ({"caop": metrics(0.51, 0.98, 0.47)}, "blindly certain", "though it keeps the accuracy"),
        # a base that is overconfident already, and no more so afterwards
        ({"base": metrics(0.39, 0.6, 0.21), "opd": metrics(0.51, 0.7, 0.3)}, "The expected effect did not appear", ""),
        # the gap shrinks although ECE rises: underconfidence is not overconfidence
        ({"opd": metrics(0.51, 0.2, 0.31)}, "The expected effect did not appear", ""),
        ({"base": None}, "cannot be judged, because base was not run", "CaOP keeps"),
        (
            {"opd": None},
            "cannot be judged, because opd was not run",
            "What CaOP changes cannot be judged, because opd was",
        ),
        ({"caop": None}, "blindly certain", "because caop was not run"),
        (
            {"opd": {**metrics(0.5, 0.9, 0.4), "ece": None}},
            "states no readable confidence",
            "states no readable confidence",
        ),
    ],
)
def test_verdict_follows_the_numbers(changes, first, second) -> None:
    text = demo_verdict(summary(**changes))
    assert first in text
    assert second in text


def test_table_has_the_readings_that_exist() -> None:
    text = demo_table(summary())
    assert "sampled: " in text
    assert "expected value: " in text
    assert "greedy" not in text
    block = text.split("\n\n")[1]
    assert [line.split()[0] for line in block.split("\n")[3:]] == ["base", "opd", "caop", "direct", "masked"]
    assert "0.033" in block
    assert "–" in block


def answers(n: int = 300) -> dict:
    rng = np.random.default_rng(0)
    out = {}
    for name in ("base", "opd", "caop", "direct", "masked"):
        p = rng.random(n)
        confidence = np.ones(n) if name == "opd" else np.round(p, 1)
        out[name] = ((rng.random(n) < p).astype(float), confidence, None if name == "base" else p)
    out["masked"][1][:5] = np.nan
    return out


def test_page_with_everything(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    evil = "<script>alert(1)</script>"
    examples = [
        {
            "prompt": evil,
            "reference": evil,
            "answers": {
                "opd": {"answer": evil, "correct": False, "confidence": 1.0},
                "caop": {"answer": "K AE T", "correct": True, "confidence": None},
            },
        }
    ]
    path = demo_page(summary(), answers(), tmp_path / "run", examples=examples, command="make demo <x>")
    text = path.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "make demo &lt;x&gt;" in text
    assert "Seed 7" in text
    assert text.count("<figure>") == 5 + 4 + 2 + 1
    assert "grows from 0.00 to +0.60 by step 10" in text.replace("+0.00", "0.00")
    assert "no confidence" in text
    names = sorted(os.listdir(tmp_path / "run"))
    kinds = [f"{n}.{e}" for n in ("history", "reliability", "reliability-expected") for e in ("png", "svg")]
    assert names == sorted(["demo.html", *kinds])


def test_page_with_as_little_as_there_can_be(tmp_path) -> None:
    bare = {
        "task": "other",
        "seed": 0,
        "seconds": None,
        "methods": [{"name": "base", **dict.fromkeys(CALIBRATION_KEYS)}],
    }
    text = demo_page(bare, {}, tmp_path).read_text()
    assert "cannot be judged" in text
    assert "caop-fast demo --task other --seed 0" in text


def test_page_without_matplotlib(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    text = demo_page(summary(), answers(), tmp_path).read_text()
    assert "pip install caop-fast[audit]" in text
    assert os.listdir(tmp_path) == ["demo.html"]


def test_page_takes_the_form_of_real_metrics_through_json(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)  # quick: the pictures are tested above
    data = answers()
    methods = [
        {
            "name": name,
            **calibration_metrics(y, c),
            "expected": None if e is None else calibration_metrics(y, e),
            "greedy": None,
        }
        for name, (y, c, e) in data.items()
    ]
    written = json.loads(json.dumps({**summary(), "methods": methods}))
    assert "The control “masked”" in demo_page(written, data, tmp_path).read_text(encoding="utf-8")


def test_the_masked_control_is_set_beside_caop_by_both_readings(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    given = summary(masked=metrics(0.5, 0.95, 0.45))
    entries = {method["name"]: method for method in given["methods"]}
    entries["masked"]["expected"], entries["caop"]["expected"] = metrics(0.5, 0.7, 0.222), metrics(0.5, 0.5, 0.033)
    text = demo_page(given, {}, tmp_path).read_text()
    assert f"sampled ECE is 0.450 against CaOP&#x27;s {entries['caop']['ece']:.3f}" in text
    assert "by the expected value 0.222 against 0.033" in text


def test_an_unread_answer_counts_as_an_error_in_verdict_and_table() -> None:
    strict = {"ece_upper": 0.777, "accuracy_all": 0.111, "brier_upper": 0.888, "n_unparsed": 9}
    given = summary()
    next(method for method in given["methods"] if method["name"] == "opd").update(strict)
    assert "to 0.78" in demo_verdict(given)
    row = next(line for line in demo_table(given).splitlines() if line.startswith("opd"))
    assert "0.777" in row
    assert "11.1 %" in row
    assert "0.888" in row
