from __future__ import annotations

import json

import numpy as np
import pytest

from caop_fast.calibration import calibration_metrics
from caop_fast.demo.run import ALL_METHODS
from caop_fast.demo.study import COMPARED, differences, report, summarise


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two seeds of invented answers: opd is right more often and always sure, all share what a prompt is worth."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(2):
        folder = tmp_path_factory.mktemp("run")
        (folder / "answers").mkdir()
        easy = rng.random(400)
        for name in ALL_METHODS:
            correct = easy < (0.6 if name == "opd" else 0.5)
            stated = np.ones(400) if name == "opd" else np.round(rng.random(400), 2)
            records = [
                {"prompt_id": f"p{i}", "correct": float(c), "confidence": float(s), "expected": float(s) / 2}
                for i, (c, s) in enumerate(zip(correct, stated, strict=True))
            ]
            rng.shuffle(records)
            for suffix in ("", "-greedy"):
                (folder / "answers" / f"{name}{suffix}.jsonl").write_text("\n".join(map(json.dumps, records)))
        made.append(folder)
    return made


def test_differences_pair_the_prompts(folders):
    found = {(d["reading"], d["metric"], d["method"], d["against"]): d for d in differences(folders)}
    assert {key[2:] for key in found} == set(COMPARED)
    accuracy = found["sampled", "accuracy_all", "opd", "base"]
    # The methods' marks differ on a tenth of the prompts and agree on the rest, so pairing gives a narrow interval:
    # its width is that of a mean of 400 draws with probability 0.1, not of two independent accuracies.
    assert accuracy["mean"] == pytest.approx(0.1, abs=0.04)
    assert accuracy["low"] < accuracy["mean"] < accuracy["high"]
    assert accuracy["high"] - accuracy["low"] < 4.5 * np.sqrt(0.09 / 400)
    ece = found["sampled", "ece_upper", "opd", "base"]
    for folder, value in zip(folders, ece["seeds"], strict=True):
        one = {}
        for name in ("opd", "base"):
            records = [json.loads(line) for line in (folder / "answers" / f"{name}.jsonl").read_text().splitlines()]
            one[name] = calibration_metrics([r["correct"] for r in records], [r["confidence"] for r in records])["ece"]
        assert value == pytest.approx(one["opd"] - one["base"])


def test_the_report_shows_every_seed():
    entry = {"accuracy_all": 0.5, "ece_upper": 0.25, "mean_confidence": 0.75, "n_unparsed": 3}
    summaries = [
        {
            "methods": [
                {"name": "opd", **entry, "ece_upper": e, "expected": entry, "greedy": {**entry, "expected": entry}}
            ]
        }
        for e in (0.25, 0.35)
    ]
    readings = summarise(summaries)
    assert readings["sampled"]["opd"]["ece_upper"] == [0.25, 0.35]
    text = report(
        {
            "task": "pronounce",
            "seeds": [0, 1],
            "command": "c",
            "date": "d",
            "commit": "x",
            "machine": "m",
            "n_heldout": 5,
            "seconds": [1.0, 2.0],
            "readings": readings,
            "differences": [],
        }
    )
    assert "**0.300** (0.250, 0.350)" in text
    assert "**3.0** (3, 3)" in text


def test_prompts_that_differ_between_seeds_are_drawn_as_what_they_are(folders, tmp_path):
    """One draw must weigh a prompt alike wherever it stands, and prompts of one seed only must be drawn as well."""
    shifted = tmp_path / "run"
    (shifted / "answers").mkdir(parents=True)
    for path in (folders[0] / "answers").iterdir():
        (shifted / "answers" / path.name).write_text(path.read_text().replace(': "p', ': "other'))
    key = ("sampled", "accuracy_all", "opd", "base")

    def width(chosen):
        found = {(d["reading"], d["metric"], d["method"], d["against"]): d for d in differences(chosen)}[key]
        return found["high"] - found["low"]

    # The same answers under the same prompts add nothing; under other prompts they are as many answers again.
    same, other = width([folders[0], folders[0]]), width([folders[0], shifted])
    assert other < 0.85 * same


def test_an_undefined_difference_is_none_not_a_crash(folders, tmp_path):
    run = tmp_path / "run"
    (run / "answers").mkdir(parents=True)
    for path in (folders[0] / "answers").iterdir():  # every answer right: SPR has no wrong one to compare with
        (run / "answers" / path.name).write_text(path.read_text().replace('"correct": 0.0', '"correct": 1.0'))
    found = differences([run])
    json.dumps(found, allow_nan=False)
    spr = next(d for d in found if d["metric"] == "spr")
    assert spr["mean"] is spr["low"] is spr["high"] is None
