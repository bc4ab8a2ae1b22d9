"""The history of a run: accuracy and calibration of its own rollouts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from caop_fast.calibration import calibration_metrics, parse_confidence
from caop_fast.training.step import Sampled, StepOutput


class RolloutWindow:
    """Collects the rollouts of consecutive steps and summarises them as one history record.

    The rollouts are answers to fresh prompts, sampled before the update they lead to, so within the first epoch they
    measure the student on unseen prompts at no extra cost.
    """

    def __init__(self) -> None:
        self._state: dict[str, list[float]] = {}
        self._clear()

    def _clear(self) -> None:
        lists = ("correct", "confidence", "expected", "confidence_entropy", "answer_entropy", "loss", "cut")
        self._state = {name: [] for name in lists}

    def add(self, sampled: Sampled, output: StepOutput) -> None:
        """One step's rollouts and what its forward passes showed."""
        self._state["cut"] += [float(not r.ended) for r in sampled.rollouts]
        parsed = [parse_confidence(r.text) for r in sampled.rollouts]
        # Where the model stated no confidence, the value that was read is the one that the splice appended.
        wrote = [p.span is not None for p in parsed]
        self._state["correct"] += [v.correct for v in sampled.verdicts]
        self._state["confidence"] += [math.nan if p.value is None else p.value for p in parsed]
        for name, values in (("expected", output.expected), ("confidence_entropy", output.confidence_entropy)):
            self._state[name] += [v if w else math.nan for v, w in zip(values.tolist(), wrote, strict=True)]
        self._state["answer_entropy"].append(output.answer_entropy.item())
        self._state["loss"].append(output.loss.item())

    def state(self) -> dict[str, list[float]]:
        """What has been collected so far, as plain values, for a checkpoint."""
        return self._state

    def load(self, state: dict[str, list[float]]) -> None:
        """Continue from `state`."""
        self._state = state

    def record(self, step: int) -> dict[str, Any]:
        """The window as one record; `step` is its last step's number, counted from 1. Empties the window."""
        state = self._state
        metrics = calibration_metrics(state["correct"], state["confidence"])
        expected = calibration_metrics(state["correct"], state["expected"])
        record = {
            "step": step,
            "accuracy": metrics["accuracy_all"],
            "mean_confidence": metrics["mean_confidence"],
            "gap": metrics["overconfidence_gap"],
            "ece": metrics["ece"],
            "expected_gap": expected["overconfidence_gap"],
            "expected_ece": expected["ece"],
            "answer_entropy": _mean(state["answer_entropy"]),
            "confidence_entropy": _mean(state["confidence_entropy"]),
            "loss": _mean(state["loss"]),
            "cut_share": _mean(state["cut"]),  # reached the length limit: no weight in the loss
            "n": len(state["correct"]),
        }
        self._clear()
        return record


def _mean(values: Sequence[float]) -> float | None:
    finite = [v for v in values if not math.isnan(v)]
    return sum(finite) / len(finite) if finite else None
