"""The calibration audit: arms of answers in; metrics, intervals, noise floor, baselines and a verdict in words out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from caop_fast.calibration.answers import Arm
from caop_fast.calibration.intervals import bootstrap_intervals, ece_floor, paired_bootstrap
from caop_fast.calibration.metrics import calibration_metrics, constant_baseline
from caop_fast.calibration.verdict import verdict

INTERVAL_METRICS = ("accuracy", "mean_confidence", "overconfidence_gap", "ece", "ece_upper", "brier", "spr", "auroc")
DIFFERENCE_METRICS = ("accuracy", "overconfidence_gap", "ece", "ece_upper", "brier", "brier_upper", "spr", "auroc")


def audit(
    arms: Sequence[Arm],
    *,
    baseline: str | None = None,
    n_bins: int = 10,
    edges: str = "official",
    n_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Judge every arm and compare each with the baseline (the first arm, unless `baseline` names another).

    Returns a dictionary that `json.dumps` takes, with one entry per arm under "arms":
    "metrics" (the keys of `calibration_metrics`, and "auroc_lower": AUROC with every unread answer ranked as badly as
    it can be), "intervals" (percentile bootstrap at `level`, resampling prompts where there are prompt ids),
    "max_design_effect" (1 where no prompt has two read answers), "ece_floor" (what a perfectly calibrated model with
    these confidences and independent answers would measure: mean, and quantile at `level`),
    "constant_baseline" (the metrics of always stating the base rate), "difference" (paired by prompt against the
    baseline), "verdict".

    Raises ValueError for no arms, two arms of one name or an unknown baseline.
    """
    names = [arm.name for arm in arms]
    if not names:
        raise ValueError("arms must hold at least one arm, got none")
    if len(set(names)) != len(names):
        raise ValueError(f"arm names must be distinct, got {names}")
    if baseline is not None and baseline not in names:
        raise ValueError(f"baseline {baseline!r} is not one of the arms: {', '.join(names)}")
    reference = arms[names.index(baseline)] if baseline is not None else arms[0]
    bins = {"n_bins": n_bins, "edges": edges}
    resampling = {"n_resamples": n_resamples, "level": level, "seed": seed}
    entries = []
    for arm in arms:
        metrics = calibration_metrics(arm.correct, arm.confidence, **bins)
        metrics["auroc_lower"] = _auroc_lower(arm)
        entry: dict[str, Any] = {
            "name": arm.name,
            "metrics": metrics,
            "intervals": bootstrap_intervals(
                arm.correct, arm.confidence, groups=arm.groups, metrics=INTERVAL_METRICS, **bins, **resampling
            ),
            "n_prompts": None if arm.groups is None else len(set(arm.groups)),
            "max_design_effect": _max_design_effect(arm),
            "statuses": dict(arm.statuses),
            "n_conflicting": arm.n_conflicting,
            "n_guessed_scale": arm.n_guessed,
            "n_bare_percent": arm.n_bare_percent,
            "unread": [{"where": u.where, "status": u.status, "text": u.text} for u in arm.unread],
            "ece_floor": ece_floor(arm.confidence, n_draws=n_resamples, level=level, seed=seed, **bins),
            "constant_baseline": constant_baseline(arm.correct, **bins),
            "difference": None if arm is reference else _difference(arm, reference, bins, resampling),
        }
        entry["verdict"] = verdict(entry, level=level)
        entries.append(entry)
    return {
        "baseline": reference.name if len(arms) > 1 else None,
        **bins,
        **resampling,
        "arms": entries,
    }


def _auroc_lower(arm: Arm) -> float | None:
    """AUROC when every unread answer is ranked as badly as it can be: below all others if right, above all if wrong."""
    ranks = np.unique(arm.confidence[~np.isnan(arm.confidence)], return_inverse=True)[1]
    confidence = np.where(arm.correct == 1, 0.0, 1.0)
    # ranks instead of values leave room at both ends, without rounding two values into one
    confidence[~np.isnan(arm.confidence)] = (ranks + 1) / (len(ranks) + 1)
    return calibration_metrics(arm.correct, confidence)["auroc"]


def _max_design_effect(arm: Arm) -> float:
    """How many times the variance of a mean over the read answers is that of independent ones if the answers to a
    prompt agree completely: sum m^2 / sum m over prompts with m read answers (Kish 1965, at intraclass correlation 1).
    """
    read = ~np.isnan(arm.confidence)
    if arm.groups is None or not read.any():
        return 1.0
    sizes = np.array(list(Counter(arm.groups[read]).values()), dtype=np.float64)
    return float((sizes**2).sum() / sizes.sum())


def _difference(arm: Arm, reference: Arm, bins: dict[str, Any], resampling: dict[str, Any]) -> dict[str, Any]:
    """arm - reference for each metric, paired by prompt: over the prompts that both answered."""
    nothing = {"n_prompts": 0, "n_prompts_left_out": 0, "metrics": None}
    if arm.groups is None or reference.groups is None:
        return {**nothing, "reason": "the answers have no prompt ids to match them by"}
    shared = set(arm.groups) & set(reference.groups)
    union = set(arm.groups) | set(reference.groups)
    if not shared:
        return {**nothing, "reason": f"it shares no prompt with {reference.name}"}
    a, b = (np.array([group in shared for group in side.groups]) for side in (arm, reference))
    differences = paired_bootstrap(
        (reference.correct[b], reference.confidence[b]),
        (arm.correct[a], arm.confidence[a]),
        groups=reference.groups[b],
        groups_b=arm.groups[a],
        metrics=DIFFERENCE_METRICS,
        **bins,
        **resampling,
    )
    return {
        "n_prompts": len(shared),
        "n_prompts_left_out": len(union) - len(shared),
        "metrics": {name: value._asdict() for name, value in differences.items()},
        "reason": None,
    }
