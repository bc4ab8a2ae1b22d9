"""The calibration audit of graded answers: metrics, intervals, noise floor, baselines and a verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence, Set
from typing import Any

import numpy as np

from caop_fast.calibration.answers import ModelAnswers
from caop_fast.calibration.counts import Answers, Binning
from caop_fast.calibration.intervals import Resampling, differences_of, ece_floor_of, intervals_of
from caop_fast.calibration.metrics import constant_baseline_of, metrics_of
from caop_fast.calibration.verdict import verdict

INTERVAL_METRICS = ("accuracy", "mean_confidence", "overconfidence_gap", "ece", "ece_upper", "brier", "spr", "auroc")
DIFFERENCE_METRICS = ("accuracy", "overconfidence_gap", "ece", "ece_upper", "brier", "brier_upper", "spr", "auroc")


def audit(
    models: Sequence[ModelAnswers],
    *,
    baseline: str | None = None,
    n_bins: int = 10,
    edges: str = "official",
    n_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Audit every model and compare each with the baseline (the first model, unless `baseline` names another).

    Returns a dictionary that `json.dumps` takes, with one entry per model under "models":
    "metrics" (the keys of `calibration_metrics`, and "auroc_lower": AUROC with every unread answer ranked as badly as
    it can be), "intervals" (percentile bootstrap at `level`, resampling prompts where there are prompt ids),
    "max_design_effect" (1 where no prompt has two read answers), "ece_floor" (what a perfectly calibrated model with
    these confidences and independent answers would measure: mean, and quantile at `level`),
    "constant_baseline" (the metrics of always stating the base rate), "difference" (paired by prompt against the
    baseline), "verdict".

    Raises ValueError for no models, two models of one name or an unknown baseline.
    """
    names = [model.name for model in models]
    if not names:
        raise ValueError("models must hold at least one model, got none")
    if len(set(names)) != len(names):
        raise ValueError(f"model names must be distinct, got {names}")
    if baseline is not None and baseline not in names:
        raise ValueError(f"baseline {baseline!r} is not one of the models: {', '.join(names)}")
    reference = models[names.index(baseline)] if baseline is not None else models[0]
    binning, resampling = Binning(n_bins, edges), Resampling(n_resamples, level, seed)
    entries = []
    for model in models:
        answers = model.answers
        metrics = metrics_of(answers, binning)
        metrics["auroc_lower"] = _auroc_lower(answers) if metrics["n_unparsed"] else metrics["auroc"]
        entry: dict[str, Any] = {
            "name": model.name,
            "metrics": metrics,
            "intervals": intervals_of(answers, model.groups, INTERVAL_METRICS, resampling, binning),
            "n_prompts": None if model.groups is None else len(set(model.groups)),
            "max_design_effect": _max_design_effect(model),
            "statuses": dict(model.statuses),
            "n_conflicting": model.n_conflicting,
            "n_guessed_scale": model.n_guessed,
            "n_bare_percent": model.n_bare_percent,
            "unread": [{"where": u.where, "status": u.status, "text": u.text} for u in model.unread],
            "ece_floor": ece_floor_of(answers, resampling, binning),
            "constant_baseline": constant_baseline_of(answers, binning),
            "difference": None if model is reference else _difference(model, reference, resampling, binning),
        }
        entry["verdict"] = verdict(entry, level=level)
        entries.append(entry)
    return {
        "baseline": reference.name if len(models) > 1 else None,
        **binning._asdict(),
        **resampling._asdict(),
        "models": entries,
    }


def _auroc_lower(answers: Answers) -> float | None:
    """AUROC when every unread answer is ranked as badly as it can be: below all others if right, above all if wrong."""
    ranks = np.unique(answers.confidence[~answers.unparsed], return_inverse=True)[1]
    confidence = np.where(answers.correct == 1, 0.0, 1.0)
    # ranks instead of values leave room at both ends, without rounding two values into one
    confidence[~answers.unparsed] = (ranks + 1) / (len(ranks) + 1)
    return metrics_of(Answers(answers.correct, confidence))["auroc"]


def _max_design_effect(model: ModelAnswers) -> float:
    """How many times the variance of a mean over the read answers is that of independent ones if the answers to a
    prompt agree completely: sum m^2 / sum m over prompts with m read answers (Kish 1965, at intraclass correlation 1).
    """
    read = ~model.answers.unparsed
    if model.groups is None or not read.any():
        return 1.0
    sizes = np.array(list(Counter(model.groups[read]).values()), dtype=np.float64)
    return float((sizes**2).sum() / sizes.sum())


def _difference(
    model: ModelAnswers, reference: ModelAnswers, resampling: Resampling, binning: Binning
) -> dict[str, Any]:
    """model - reference for each metric, paired by prompt: over the prompts that both answered."""
    nothing = {"n_prompts": 0, "n_prompts_left_out": 0, "metrics": None}
    if model.groups is None or reference.groups is None:
        return {**nothing, "reason": "the answers have no prompt ids to match them by"}
    shared = set(model.groups) & set(reference.groups)
    union = set(model.groups) | set(reference.groups)
    if not shared:
        return {**nothing, "reason": f"it shares no prompt with {reference.name}"}
    (a, groups_a), (b, groups_b) = (
        _to(shared, answers, groups)
        for answers, groups in ((reference.answers, reference.groups), (model.answers, model.groups))
    )
    differences = differences_of(a, b, groups_a, groups_b, DIFFERENCE_METRICS, resampling, binning)
    return {
        "n_prompts": len(shared),
        "n_prompts_left_out": len(union) - len(shared),
        "metrics": {name: value._asdict() for name, value in differences.items()},
        "reason": None,
    }


def _to(prompts: Set[Hashable], answers: Answers, groups: np.ndarray) -> tuple[Answers, np.ndarray]:
    """The answers to these prompts with their prompt ids."""
    keep = np.array([group in prompts for group in groups])
    if keep.all():
        return answers, groups
    return Answers(answers.correct[keep], answers.confidence[keep]), groups[keep]
