"""The recorded experiment: the demo over several seeds, means, every seed, paired bootstrap intervals.

    python -m caop_fast.demo.study --task pronounce --seeds 0 1 2 --runs runs/study --out docs

Seeds already finished in ``--runs`` with the same recipe are reused. Writes ``demo_TASK.json`` and ``demo_TASK.md``.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..calibration.counts import Answers
from ..calibration.files import write_atomic
from ..calibration.intervals import resample_metrics
from ..calibration.metrics import METRICS
from .arms import read_answers
from .run import ALL_ARMS, DemoConfig, run_demo
from .task import TASK_NAMES

COMPARED = (("opd", "base"), ("caop", "opd"), ("direct", "opd"), ("masked", "opd"), ("caop", "masked"))
SHOWN = ("accuracy", "mean_confidence", "overconfidence_gap", "ece", "brier", "spr", "auroc")
READINGS = ("sampled", "expected", "greedy", "greedy expected")
DIFFERENCES = {
    "sampled": ("accuracy", "ece", "brier", "spr"),
    "expected": ("ece", "brier"),
    "greedy": ("accuracy", "ece"),
}
N_RESAMPLES = 2000


def read_arm(folder: Path, name: str, reading: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """``(prompt ids, correct, confidence)`` of a finished run's arm by one of `READINGS`."""
    records = read_answers(folder, name, greedy=reading.startswith("greedy"))
    key = "expected" if reading.endswith("expected") else "confidence"
    return (
        [r["prompt_id"] for r in records],
        np.array([r["correct"] for r in records], dtype=np.float64),
        np.array([np.nan if r[key] is None else r[key] for r in records], dtype=np.float64),
    )


def finished_run(config: DemoConfig) -> dict[str, Any]:
    """The run's summary; it is made first where it is not there, or not with this recipe."""
    summary = config.out / "summary.json"
    if summary.exists():
        found = json.loads(summary.read_text(encoding="utf-8"))
        if found["recipe"] == json.loads(json.dumps(config.recipe())) and {a["name"] for a in found["arms"]} == set(
            ALL_ARMS
        ):
            return found
    return run_demo(config)


def differences(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Mean over the seeds of each compared pair's difference, with a 95 % interval.

    The same prompts are held out in every seed; they are drawn with replacement, and one draw serves both arms and all
    seeds, so what a prompt contributes everywhere cancels. Seeds are not resampled: they are listed instead.
    """
    result = []
    for reading, metrics in DIFFERENCES.items():
        arms = {}
        for name in ALL_ARMS:
            for folder in folders:
                ids, correct, confidence = read_arm(folder, name, reading)
                order = np.argsort(ids)
                arms[name, folder] = Answers(correct[order], confidence[order])
        names = list(arms)
        n = len(next(iter(arms.values())))
        draws = resample_metrics([(arms[k], np.arange(n)) for k in names], n, metrics, N_RESAMPLES, seed=0)
        by_name = dict(zip(names, draws, strict=True))
        for a, b in COMPARED:
            for metric in metrics:
                point = [
                    float(METRICS[metric](arms[a, f].counts())[0] - METRICS[metric](arms[b, f].counts())[0])
                    for f in folders
                ]
                drawn = np.mean([by_name[a, f][metric] - by_name[b, f][metric] for f in folders], axis=0)
                low, high = np.quantile(drawn, [0.025, 0.975])
                result.append(
                    {
                        "reading": reading,
                        "metric": metric,
                        "arm": a,
                        "against": b,
                        "mean": float(np.mean(point)),
                        "low": float(low),
                        "high": float(high),
                        "seeds": point,
                    }
                )
    return result


def summarise(summaries: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """``reading -> arm -> metric -> [value of each seed]``."""
    nested = {
        "sampled": lambda arm: arm,
        "expected": lambda arm: arm["expected"],
        "greedy": lambda arm: arm["greedy"],
        "greedy expected": lambda arm: arm["greedy"]["expected"],
    }
    table: dict[str, dict[str, dict[str, list[float]]]] = {}
    for reading in READINGS:
        for summary in summaries:
            for arm in summary["arms"]:
                entry = nested[reading](arm)
                for metric in (*SHOWN, "closed_form_mae"):
                    if metric in entry:
                        table.setdefault(reading, {}).setdefault(arm["name"], {}).setdefault(metric, []).append(
                            entry[metric]
                        )
    return table


def report(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    seeds = record["seeds"]
    lines = [
        f"# The demo on `{record['task']}`, {len(seeds)} seeds",
        "",
        f"Made by `{record['command']}` on {record['date']}, commit `{record['commit']}`, {record['machine']}. "
        f"{record['n_heldout']} held-out prompts, one answer each; seconds per seed: "
        f"{', '.join(f'{s:.0f}' for s in record['seconds'])}. Every number is in `demo_{record['task']}.json`.",
        "",
        "*Sampled*: one answer a prompt at temperature 1, with the confidence it states. *Expected*: the same answers, "
        "the confidence read as the mean of the model's distribution over the confidence values. *Greedy*: the most "
        "likely token at each place. Means over the seeds; the seeds' own values in brackets.",
        "",
    ]
    heads = {"mean_confidence": "confidence", "overconfidence_gap": "gap", "closed_form_mae": "off the closed form by"}
    for reading, arms in record["readings"].items():
        columns = [m for m in (*SHOWN, "closed_form_mae") if any(m in metrics for metrics in arms.values())]
        lines += [f"## {reading.capitalize()}", ""]
        lines.append("| arm | " + " | ".join(heads.get(c, c) for c in columns) + " |")
        lines.append("|---" * (len(columns) + 1) + "|")
        for name, metrics in arms.items():
            cells = [_cell(metrics[c]) for c in columns]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [
        "## Differences between arms",
        "",
        f"Mean over the seeds with a 95 % paired bootstrap interval ({N_RESAMPLES} draws of prompts, shared by arms "
        "and seeds); then each seed.",
        "",
        "| reading | metric | difference | mean | 95 % interval | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for d in record["differences"]:
        lines.append(
            f"| {d['reading']} | {d['metric']} | {d['arm']} − {d['against']} | {d['mean']:+.3f} | "
            f"{d['low']:+.3f} to {d['high']:+.3f} | {', '.join(f'{v:+.3f}' for v in d['seeds'])} |"
        )
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    each = ", ".join("–" if v is None else f"{v:.3f}" for v in values)
    return f"**{sum(known) / len(known):.3f}** ({each})"


def _commit() -> str:
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "caop_fast"], capture_output=True, text=True, check=True
        )
        return done.stdout.strip() + (" with local changes" if dirty.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(argv: Sequence[str] | None = None) -> int:
    """Run and record."""
    parser = argparse.ArgumentParser(prog="python -m caop_fast.demo.study", description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASK_NAMES, default="pronounce", help="which task (pronounce)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the seeds (0 1 2)")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="where the runs are kept (runs/study)")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="where the record is written (docs)")
    args = parser.parse_args(argv)
    configs = [DemoConfig(task=args.task, seed=s, out=args.runs / f"{args.task}-{s}") for s in args.seeds]
    summaries = [finished_run(config) for config in configs]
    folders = [config.out for config in configs]
    seeds = " ".join(map(str, args.seeds))
    record = {
        "task": args.task,
        "command": f"python -m caop_fast.demo.study --task {args.task} --seeds {seeds}",
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"torch {summaries[0]['recipe']['torch']}, transformers {summaries[0]['recipe']['transformers']}",
        "seeds": args.seeds,
        "seconds": [s["seconds"] for s in summaries],
        "n_heldout": summaries[0]["n_heldout"],
        "base": dataclasses.asdict(configs[0].base),
        "train": configs[0].train.to_dict(),
        "readings": summarise(summaries),
        "differences": differences(folders),
    }
    write_atomic(args.out / f"demo_{args.task}.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
    write_atomic(args.out / f"demo_{args.task}.md", report(record))
    print(report(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
