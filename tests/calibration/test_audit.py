"""The audit report, its verdicts in every direction, the gate, and the files it writes."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import pytest

from caop_fast.calibration import calibration_metrics, paired_bootstrap
from caop_fast.calibration.answers import ModelAnswers, read_answers
from caop_fast.calibration.audit import audit
from caop_fast.calibration.counts import Answers
from caop_fast.calibration.files import write_atomic
from caop_fast.calibration.report import audit_table, write_report
from caop_fast.calibration.verdict import gate
from helpers.audits import answered

QUICK = {"n_resamples": 200}


def made(name: str, shift: float = 0.0, *, n: int = 2000, seed: int = 0, constant: bool = False) -> ModelAnswers:
    """Answers right with probability p; the confidence is p + shift, or the mean of that for every answer."""
    rng = np.random.default_rng(seed)
    p = rng.choice([0.3, 0.4, 0.5, 0.6, 0.7], n)
    confidence = np.full(n, 0.5 + shift) if constant else p + shift
    return answered(name, (rng.random(n) < p).astype(float), confidence, [f"q{i // 2}" for i in range(n)])


def hidden(a: ModelAnswers, mask: np.ndarray) -> ModelAnswers:
    return answered(a.name, a.correct, np.where(mask, np.nan, a.confidence), a.groups)


def only(*models: ModelAnswers, **options) -> dict:
    return audit(models, **QUICK, **options)["models"][0]


def test_metrics_are_those_of_calibration_metrics_with_the_options_passed_on() -> None:
    a = made("a", 0.1)
    for bins in ({"n_bins": 10, "edges": "official"}, {"n_bins": 7, "edges": "exact"}):
        report = audit([a], **QUICK, **bins)
        expected = calibration_metrics(a.correct, a.confidence, **bins)
        metrics = report["models"][0]["metrics"]
        assert {key: metrics[key] for key in expected} == expected
    assert report["models"][0]["n_prompts"] == 1000
    low, high = report["models"][0]["intervals"]["overconfidence_gap"]
    assert low < expected["overconfidence_gap"] < high


def test_verdict_overconfident() -> None:
    text = only(made("a", 0.2))["verdict"]
    assert text.startswith("Overconfident: it states 70.")
    assert "helps to tell right answers from wrong ones" in text
    assert len(re.findall(r"\. |\.$", text)) == 2


def test_verdict_underconfident() -> None:
    assert only(made("a", -0.2))["verdict"].startswith("Underconfident: it states 30.")


def test_verdict_slightly() -> None:
    assert only(made("a", 0.04, n=20_000))["verdict"].startswith("Slightly overconfident on average")


def test_a_small_gap_does_not_hide_levels_that_are_far_off() -> None:
    rng = np.random.default_rng(0)
    says = rng.random(4000) < 0.53  # certain one way or the other, and right half of the time whatever it says
    far = answered("a", (rng.random(4000) < 0.5).astype(float), says.astype(float))
    assert only(far)["verdict"].startswith("Slightly overconfident on average and far off level by level")
    assert "level by level" not in only(made("a", 0.2))["verdict"]


def test_unread_answers_are_not_called_levels_that_are_far_off() -> None:
    a = made("a", 0.2)
    text = only(hidden(a, np.arange(2000) % 3 == 0))["verdict"]
    assert "Overconfident: it states" in text
    assert "level by level" not in text


def test_verdict_needs_thirty_read_answers() -> None:
    a = made("a", 0.2, n=40)
    few = only(hidden(a, np.arange(40) >= 29))["verdict"]
    assert "Too few answers (29) to judge" in few
    assert few.startswith("11 of 40 answers state no confidence")
    assert "onfident" not in few
    assert "Too few" not in only(hidden(a, np.arange(40) >= 30))["verdict"]


def agreeing(seed: int, *, shift: float = 0.0) -> ModelAnswers:
    """100 prompts with 8 answers each that agree in everything; honest when shift is 0, else right on average only."""
    rng = np.random.default_rng(seed)
    p = np.repeat(np.arange(100) % 5 * 0.2 + 0.1, 8)
    correct = np.repeat(rng.random(100), 8) < p
    return answered("a", correct.astype(float), np.where(p > 0.5, p - shift, p + shift * 2 / 3), np.arange(800) // 8)


def test_noise_of_answers_that_share_a_prompt_is_not_called_miscalibration() -> None:
    honest = [only(agreeing(seed)) for seed in range(20)]
    assert sum(e["metrics"]["ece"] > e["ece_floor"]["upper"] for e in honest) >= 10
    assert sum("not level by level" in e["verdict"] for e in honest) <= 2
    assert sum("cannot be told" in e["verdict"] for e in honest) >= 8
    assert honest[0]["max_design_effect"] == pytest.approx(8)
    a = made("a")  # two a prompt
    assert "not level by level" in only(answered("a", a.correct, 1 - a.confidence, a.groups))["verdict"]
    assert "the noise floor takes answers as independent" in audit_table(audit([a], **QUICK))
    single = answered("a", a.correct, a.confidence, np.arange(2000))
    assert only(single)["max_design_effect"] == 1
    assert "noise floor takes" not in audit_table(audit([single], **QUICK))


def test_design_effect_is_over_the_read_answers() -> None:
    a = answered("a", np.zeros(6), np.array([0.5, 0.5, 0.5, 0.5, np.nan, np.nan]), ["p", "p", "p", "q", "q", "r"])
    assert only(a)["max_design_effect"] == pytest.approx((9 + 1) / 4)
    assert only(answered("a", a.correct, np.full(6, np.nan), a.groups))["max_design_effect"] == 1


def test_brier_its_constant_and_its_skill_are_over_the_same_answers() -> None:
    a = made("a", n=400)
    a = hidden(a, (a.correct == 0) & (np.arange(400) % 2 == 0))
    row = next(
        line.split()
        for line in audit_table(audit([a], **QUICK)).split("Brier skill")[1].splitlines()
        if line.startswith("a ")
    )
    brier, constant, skill = map(float, row[-3:])
    accuracy = a.correct[~np.isnan(a.confidence)].mean()
    assert constant == pytest.approx(accuracy * (1 - accuracy), abs=6e-4)
    assert skill == pytest.approx(1 - brier / constant, abs=6e-3)


def test_verdict_within_the_noise_floor() -> None:
    entry = only(made("a"))
    assert entry["metrics"]["ece"] <= entry["ece_floor"]["upper"]
    assert entry["verdict"].startswith("Calibrated as far as 2,000 answers can tell")


def test_verdict_right_on_average_but_not_level_by_level() -> None:
    a = made("a")
    swapped = answered("a", a.correct, 1 - a.confidence, a.groups)
    text = only(swapped)["verdict"]
    assert text.startswith("Right on average but not level by level")
    assert "points the wrong way" in text


def test_verdict_uninformative_ranking_and_better_constant() -> None:
    text = only(made("a", 0.3, constant=True))["verdict"]
    assert "does not tell right answers from wrong ones" in text
    assert "always stating the accuracy would score a better Brier" in text
    assert "better Brier" not in only(made("a"))["verdict"]


def test_verdict_uses_the_upper_ece_when_answers_are_unread() -> None:
    a = made("a")
    entry = only(hidden(a, np.arange(2000) % 4 == 0))
    metrics = entry["metrics"]
    assert metrics["ece"] <= entry["ece_floor"]["upper"]  # would be called calibrated by what could be read
    assert entry["verdict"].startswith("500 of 2,000 answers state no confidence that can be read (25 %); ")
    assert "Calibrated" not in entry["verdict"]
    assert f"ECE upper of {metrics['ece_upper']:.3f}" in entry["verdict"]
    few = only(hidden(a, np.arange(2000) % 10 == 0))["verdict"]  # a tenth exactly: at the end
    assert few.startswith("Right on average")
    assert re.search(r"\. 200 of 2,000 answers state no confidence that can be read; [^.]*\.", few)


def test_verdict_nothing_readable_all_right_and_fractions() -> None:
    n = 30
    assert "nothing to judge" in only(answered("a", np.ones(n), np.full(n, np.nan)))["verdict"]
    assert "All these answers are right" in only(answered("a", np.ones(n), np.linspace(0, 1, n)))["verdict"]
    assert "All these answers are wrong" in only(answered("a", np.zeros(n), np.linspace(0, 1, n)))["verdict"]
    assert "fractions" in only(answered("a", np.full(n, 0.5), np.linspace(0, 1, n)))["verdict"]


def test_a_single_answer() -> None:
    report = audit([answered("a", np.array([1.0]), np.array([0.5]))], **QUICK)
    json.dumps(report, allow_nan=False)
    assert "Too few answers (1) to judge" in audit_table(report)


def test_one_read_answer_gives_no_interval() -> None:
    n = 50
    confidence = np.full(n, np.nan)
    confidence[7] = 0.8
    report = audit([answered("a", np.arange(n) % 2 * 1.0, confidence)], **QUICK)
    assert set(report["models"][0]["intervals"].values()) == {None}
    confidence[8] = 0.6
    assert only(answered("a", np.arange(n) % 2 * 1.0, confidence))["intervals"]["ece"] is not None


def test_difference_is_arm_minus_baseline_over_shared_prompts() -> None:
    before, after = made("before", 0.3), made("after", 0.0, seed=1)
    # the models answer prompts in another order, and each has prompts of its own
    after = answered("after", after.correct[::-1][:1500], after.confidence[::-1][:1500], after.groups[::-1][:1500])
    report = audit([before, after], **QUICK)
    assert report["models"][0]["difference"] is None
    difference = report["models"][1]["difference"]
    assert (difference["n_prompts"], difference["n_prompts_left_out"]) == (750, 250)
    shared = np.isin(before.groups.astype(str), after.groups.astype(str))
    expected = paired_bootstrap(
        (before.correct[shared], before.confidence[shared]),
        (after.correct, after.confidence),
        groups=before.groups[shared],
        groups_b=after.groups,
        metrics=("overconfidence_gap",),
        **QUICK,
    )["overconfidence_gap"]
    assert difference["metrics"]["overconfidence_gap"]["difference"] == pytest.approx(expected.difference)
    assert difference["metrics"]["overconfidence_gap"]["difference"] < -0.25
    assert difference["metrics"]["overconfidence_gap"]["high"] < -0.2
    flipped = audit([before, after], baseline="after", **QUICK)
    assert flipped["models"][0]["difference"]["metrics"]["overconfidence_gap"]["difference"] > 0.25
    assert "250 that only one answered are left out" in audit_table(report)


def test_no_difference_without_ids_or_shared_prompts() -> None:
    a, b = made("a"), made("b")
    bare = answered("b", b.correct, b.confidence)
    other = answered("b", b.correct, b.confidence, [f"z{i}" for i in range(2000)])
    for second, reason in ((bare, "no prompt ids"), (other, "shares no prompt with a")):
        report = audit([a, second], **QUICK)
        assert report["models"][1]["difference"]["metrics"] is None
        assert reason in report["models"][1]["difference"]["reason"]
        assert f"not compared, {report['models'][1]['difference']['reason']}" in audit_table(report)


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        ([], {}, "at least one model"),
        ([made("a", n=4), made("a", n=4)], {}, "distinct"),
        ([made("a", n=4)], {"baseline": "b"}, "baseline 'b' is not one of the models: a"),
    ],
)
def test_audit_refuses(models, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        audit(models, **options)


def test_gate_each_limit_and_selection() -> None:
    report = audit([made("bad", 0.3, constant=True), made("good")], **QUICK)
    assert gate(report) == []
    assert [f.split(":")[0] for f in gate(report, max_ece=0.1)] == ["bad"]
    assert [f.split(":")[0] for f in gate(report, min_auroc=0.55)] == ["bad"]
    assert gate(report, max_ece=0.1, min_auroc=0.55, models=["good"]) == []
    assert len(gate(report, max_ece=0.0, min_auroc=1.0)) == 4
    with pytest.raises(ValueError, match="no model is called 'x'"):
        gate(report, max_ece=0.1, models=["x"])


def test_gate_holds_at_the_limit_itself() -> None:
    report = audit([made("a", 0.1)], **QUICK)
    metrics = report["models"][0]["metrics"]
    assert gate(report, max_ece=metrics["ece_upper"], min_auroc=metrics["auroc_lower"]) == []
    assert len(gate(report, max_ece=np.nextafter(metrics["ece_upper"], 0))) == 1


def test_hiding_answers_never_passes_the_gate() -> None:
    a = made("a", 0.2)
    full = audit([a], **QUICK)["models"][0]["metrics"]
    # leave out what looks bad: confident and wrong
    cheat = hidden(a, (a.correct == 0) & (a.confidence > 0.85))
    report = audit([cheat], **QUICK)
    seen = report["models"][0]["metrics"]
    assert seen["ece"] < full["ece"]
    assert seen["auroc"] > full["auroc"]
    assert seen["ece_upper"] >= full["ece"]
    assert seen["auroc_lower"] <= full["auroc"]
    assert len(gate(report, max_ece=full["ece"] - 1e-9, min_auroc=full["auroc"] + 1e-9)) == 2
    silent = audit([hidden(a, np.full(2000, True))], **QUICK)
    assert len(gate(silent, max_ece=0.99, min_auroc=0.01)) == 2


def test_auroc_lower_is_auroc_when_everything_was_read_and_never_above_any_completion() -> None:
    rng = np.random.default_rng(3)
    a = made("a", n=60)
    metrics = audit([a], **QUICK)["models"][0]["metrics"]
    assert metrics["auroc_lower"] == pytest.approx(metrics["auroc"], abs=1e-15)
    mask = rng.random(60) < 0.3
    lower = audit([hidden(a, mask)], **QUICK)["models"][0]["metrics"]["auroc_lower"]
    for _ in range(300):
        filled = np.where(mask, rng.choice([0.0, 0.01, 0.5, 0.99, 1.0], 60), a.confidence)
        assert lower <= calibration_metrics(a.correct, filled)["auroc"] + 1e-12


def test_write_report_is_whole_and_loads_again(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    models = [made("a", 0.2, n=200), hidden(made("b", n=200), np.arange(200) % 5 == 0)]
    report = audit(models, **QUICK)
    written = write_report(report, models, tmp_path / "deep" / "out")
    assert [p.name for p in written] == ["audit.json", "reliability.svg", "reliability.png", "audit.html"]
    assert sorted(os.listdir(tmp_path / "deep" / "out")) == sorted(p.name for p in written)
    assert json.loads(written[0].read_text()) == json.loads(json.dumps(report))
    assert written[2].read_bytes().startswith(b"\x89PNG")
    for entry in report["models"]:
        assert re.split(r":| \(", entry["verdict"])[0] in written[3].read_text()


def test_table_shows_upper_columns_only_when_something_is_unread() -> None:
    a = made("a", n=200)
    assert "ECE upper" not in audit_table(audit([a], **QUICK))
    table = audit_table(audit([hidden(a, np.arange(200) < 20)], **QUICK))
    assert "ECE upper" in table
    assert "accuracy all" in table


def test_write_atomic_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch) -> None:
    path = write_atomic(tmp_path / "x", "old")

    def fail(*_: object) -> None:
        raise OSError("disk")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_write_atomic_mode_follows_the_umask(tmp_path) -> None:
    old = os.umask(0o027)
    try:
        assert write_atomic(tmp_path / "x", b"1").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(old)


def test_the_answers_of_a_file_are_sorted_once(tmp_path, monkeypatch) -> None:
    lines = [json.dumps({"id": i, "confidence": i % 7 / 7, "correct": i % 3 == 0}) for i in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl").write_text("\n".join(lines[::-1]))
    distinct, plain = [], Answers.__init__

    def counted(self, correct, confidence):
        plain(self, correct, confidence)
        distinct.append(len(self.values))

    monkeypatch.setattr(Answers, "__init__", counted)
    models = read_answers([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    write_report(audit(models, **QUICK), models, tmp_path / "out")
    assert sorted(distinct) == [1, 1, 7, 7]  # with one distinct confidence: the constant that each is compared with
