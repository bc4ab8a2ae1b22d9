"""The verdict of an audit in two or three sentences, and limits that CI can check."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from caop_fast.calibration.table import format_value

SLIGHT_GAP = 0.05
MIN_ANSWERS = 30  # read answers below which nothing is judged
MANY_UNREAD = 0.1  # share of unread answers above which they are what a reader must hear first


def verdict(entry: Mapping[str, Any], *, level: float = 0.95) -> str:
    """The verdict on one model. `entry` is an element of `audit(...)["models"]`; the keys used are "metrics",
    "intervals", "ece_floor", "max_design_effect" and "constant_baseline".

    First the level: over- or underconfident when the interval of the gap excludes 0, and also off level by level when
    ECE is far above what the gap explains; else calibrated when ECE stays within what sampling noise gives a perfectly
    calibrated model, or wrong at some levels when it does not. Where answers share prompts, that takes an ECE above
    the noise that fully dependent answers could give. Then the ranking, by the interval of AUROC. When answers are
    unread, how many and what they cost, before all else when they are more than a tenth; the ECE and Brier score that
    are judged then are the upper ones. With fewer than 30 read answers nothing is judged.
    """
    metrics = entry["metrics"]
    n, unread = metrics["n"], metrics["n_unparsed"]
    if unread == n:
        return f"None of the {n:,} answers states a confidence that can be read, so there is nothing to judge."
    if n - unread < MIN_ANSWERS:
        sentences = [
            f"Too few answers ({n - unread}) to judge: it takes {MIN_ANSWERS} that state a readable confidence."
        ]
    else:
        sentences = [_level_sentence(entry, level), _ranking_sentence(entry, level)]
    if unread:
        many = unread > MANY_UNREAD * n
        sentences.insert(
            0 if many else len(sentences),
            f"{unread:,} of {n:,} answers state no confidence that can be read"
            f"{f' ({100 * unread / n:.0f} %)' if many else ''}; each counts as an error of 1, which puts "
            f"ECE at {metrics['ece_upper']:.3f} (it is {metrics['ece']:.3f} over the others).",
        )
    return " ".join(sentences)


def _judged(metrics: Mapping[str, Any], key: str) -> tuple[float | None, str]:
    """The value of ECE or Brier a judgement uses, and its name: the upper one wherever an answer is unread."""
    if metrics["n_unparsed"]:
        return metrics[f"{key}_upper"], f"{key.upper() if key == 'ece' else key.title()} upper"
    return metrics[key], "ECE" if key == "ece" else "Brier"


def _between(interval: Sequence[float] | None, form: str, level: float) -> str:
    if interval is None:
        return ""
    low, high = (format_value(bound, form) for bound in interval)
    return f", {100 * level:g} % interval {low} to {high}"


def _degree(gap: float, side: str) -> str:
    return f"Slightly {side}confident on average" if abs(gap) < SLIGHT_GAP else f"{side.capitalize()}confident"


def _level_sentence(entry: Mapping[str, Any], level: float) -> str:
    metrics, floor = entry["metrics"], entry["ece_floor"]
    gap, interval = metrics["overconfidence_gap"], entry["intervals"]["overconfidence_gap"]
    ece, name = _judged(metrics, "ece")
    says = (
        f"it states {format_value(metrics['mean_confidence'], 'percent')} on average and is right "
        f"{format_value(metrics['accuracy'], 'percent')} of the time"
    )
    gap_text = f"gap {format_value(gap, 'signed')}{_between(interval, 'signed', level)}"
    noise = f"{name} {ece:.3f}, where sampling noise alone gives about {floor['mean']:.3f}"
    # the most that noise can give where the answers to a prompt agree completely: its size grows as a standard error
    dependent = floor["upper"] * entry["max_design_effect"] ** 0.5
    # A mean that is nearly right says little when the levels are not: ECE is at least |gap|, and here far more. Over
    # the read answers, like the gap: an unread answer has no level to be off at.
    levels = " and far off level by level" if metrics["ece"] > abs(gap) + dependent + SLIGHT_GAP else ""
    if interval is not None and interval[0] > 0:
        return f"{_degree(gap, 'over')}{levels}: {says} ({gap_text}; {noise})."
    if interval is not None and interval[1] < 0:
        return f"{_degree(gap, 'under')}{levels}: {says} ({gap_text}; {noise})."
    if ece <= floor["upper"]:
        return (
            f"Calibrated as far as {metrics['n']:,} answers can tell: {says} ({gap_text}), and its {name} of "
            f"{ece:.3f} is within what sampling noise gives a perfectly calibrated model (up to {floor['upper']:.3f})."
        )
    if ece <= dependent:
        return (
            f"Right on average: {says} ({gap_text}). Whether it is so level by level cannot be told: its {name} of "
            f"{ece:.3f} is more than noise gives independent answers (up to {floor['upper']:.3f}), but several answers "
            f"share a prompt, and where those agree noise can give up to about {dependent:.3f}."
        )
    return (
        f"Right on average but not level by level: {says} ({gap_text}), yet its {name} of {ece:.3f} is more than "
        f"sampling noise gives a perfectly calibrated model (up to {floor['upper']:.3f})."
    )


def _ranking_sentence(entry: Mapping[str, Any], level: float) -> str:
    metrics = entry["metrics"]
    auroc, interval = metrics["auroc"], entry["intervals"]["auroc"]
    if auroc is None:
        if metrics["accuracy"] in (0, 1):
            same = "right" if metrics["accuracy"] == 1 else "wrong"
            return f"All these answers are {same}, so whether the confidence tells right from wrong cannot be judged."
        return "Answers are scored in fractions, so ranking right above wrong cannot be judged."
    brier, name = _judged(metrics, "brier")
    constant = entry["constant_baseline"]["brier"]
    text = f"AUROC {auroc:.3f}{_between(interval, 'share', level)}"
    if interval is not None and interval[0] > 0.5:
        sentence = f"The confidence helps to tell right answers from wrong ones ({text})"
    elif interval is not None and interval[1] < 0.5:
        sentence = f"The confidence points the wrong way: wrong answers state more of it than right ones ({text})"
    else:
        sentence = f"The confidence does not tell right answers from wrong ones ({text}; a coin toss has 0.5)"
    if constant is not None and brier > constant:
        sentence += (
            f"; always stating the accuracy would score a better Brier ({constant:.3f} against {name} {brier:.3f})"
        )
    return sentence + "."


def gate(
    report: Mapping[str, Any],
    *,
    max_ece: float | None = None,
    min_auroc: float | None = None,
    models: Collection[str] = (),
) -> list[str]:
    """The reasons why models fail the limits, one sentence each; an empty list means they pass.

    max_ece is held against "ece_upper" and min_auroc against "auroc_lower", which are ECE and AUROC themselves where
    every answer was read, so an unread answer can never help. A value that is undefined fails. `models` names those to
    hold to the limits, all when empty; ValueError for a name that is not in the report.
    """
    unknown = set(models) - {entry["name"] for entry in report["models"]}
    if unknown:
        raise ValueError(f"no model is called {', '.join(map(repr, sorted(unknown)))}")
    failures = []
    for entry in report["models"]:
        if models and entry["name"] not in models:
            continue
        metrics, name = entry["metrics"], entry["name"]
        upper, lower = metrics["ece_upper"], metrics["auroc_lower"]
        counted = " with unread answers counted against it" if metrics["n_unparsed"] else ""
        if max_ece is not None and (upper is None or not upper <= max_ece):
            shown = "undefined" if upper is None else f"{upper:.4f}"
            failures.append(f"{name}: ECE{counted} is {shown}, above --max-ece {max_ece:g}")
        if min_auroc is not None and (lower is None or not lower >= min_auroc):
            shown = "undefined" if lower is None else f"{lower:.4f}"
            failures.append(f"{name}: AUROC{counted} is {shown}, below --min-auroc {min_auroc:g}")
    return failures
