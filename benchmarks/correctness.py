"""Whether every public loss of caop_fast is right on this device: loss, statistics and gradients against float64."""

from __future__ import annotations

import itertools
import time
import traceback
from collections import Counter
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from benchmarks.checks import bins, confidence, linear, logits, sparse, tokens
from benchmarks.checks.closeness import Wrong
from benchmarks.checks.trial import SIZES, Setting, Trial
from benchmarks.measure import alive

OUT_OF_TIME = "the time ran out"
DEAD = "the device is dead since"
UNREACHED = (OUT_OF_TIME, DEAD)  # how the reasons begin that say nothing of a check
LINES = 4  # of a traceback that are kept

# Most important first.
FAMILIES = (
    (logits.trials, linear.trials),
    (linear.rows_trials, sparse.trials, sparse.linear_trials, tokens.trials, tokens.linear_trials),
    (confidence.trials, confidence.logprob_trials, confidence.linear_trials, logits.state_trials, bins.trials),
)


@dataclass(frozen=True)
class Check:
    """What became of one check; ``detail`` says why it failed or was skipped."""

    name: str
    outcome: Literal["passed", "failed", "skipped"]
    detail: str = ""


Report = Callable[[Check], None]


def check_losses(
    device: torch.device,
    backend: str,
    *,
    sizes: Literal["small", "full"],
    deadline: float | None,
    decided: Container[str] = (),
    begin: Callable[[str], None] | None = None,
    report: Report | None = None,
) -> list[Check]:
    """Check every loss on ``device``.

    Args:
        device: where the tensors lie.
        backend: "torch" or "triton".
        sizes: "small" for Triton's interpreter and CPUs, "full" for a GPU.
        deadline: ``time.monotonic()`` from which nothing new is begun; None for none.
        decided: names of checks that are left out.
        begin: called with the name of each check before it is run.
        report: called with each check as soon as it is known.

    Returns:
        All checks in the order they are run; those that were not reached are skipped, with the reason.
    """
    setting = Setting(device, backend, SIZES[sizes])
    found: list[Check] = []
    over: str | None = None  # why nothing more is run
    for trial in trials(sizes):
        if trial.name in decided:
            continue
        if over is None and deadline is not None and time.monotonic() >= deadline:
            over = OUT_OF_TIME
        if over is not None:
            check = Check(trial.name, "skipped", over)
        else:
            if begin is not None:
                begin(trial.name)
            check, killed = _run(trial, setting)
            if killed:
                over = f"{DEAD} {trial.name}"
        found.append(check)
        if report is not None:
            report(check)
    return found


def trials(sizes: Literal["small", "full"]) -> list[Trial]:
    """The checks of a selection; within a group the families take turns, so that a deadline cuts all alike."""
    found: list[Trial] = []
    for group in FAMILIES:
        turns = itertools.zip_longest(*(list(family()) for family in group))
        found += [trial for turn in turns for trial in turn if trial is not None]
    return [trial for trial in found if sizes == "full" or not trial.rare]


def summary(checks: Iterable[Check]) -> dict[str, Any]:
    """{"passed", "failed", "skipped": counts, "failures": ["name: detail"], "skips": {reason: count}}."""
    checks = list(checks)
    outcomes = Counter(check.outcome for check in checks)
    return {
        **{outcome: outcomes[outcome] for outcome in ("passed", "failed", "skipped")},
        "failures": [f"{check.name}: {check.detail}" for check in checks if check.outcome == "failed"],
        "skips": dict(Counter(check.detail for check in checks if check.outcome == "skipped")),
    }


def _run(trial: Trial, setting: Setting) -> tuple[Check, bool]:
    """The check, and whether the device is dead."""
    try:
        trial.run(setting)
        if setting.device.type == "cuda":
            torch.cuda.synchronize(setting.device)  # or an error would surface in the next check
    except Wrong as error:
        return Check(trial.name, "failed", str(error)), False
    except Exception as error:
        return Check(trial.name, "failed", _tail(error)), not alive(setting.device)
    return Check(trial.name, "passed"), False


def _tail(error: BaseException) -> str:
    """The last lines of a traceback, in one line."""
    text = "".join(traceback.format_exception(error)).strip().splitlines()
    return " | ".join(line.strip() for line in text[-LINES:] if line.strip(" ~^"))[:1000]
