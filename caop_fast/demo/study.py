"""The recorded experiment: the demo over several seeds, with means and paired bootstrap intervals.

    python -m caop_fast.demo.study --task pronounce --seeds 0 1 2 --runs runs/study --out docs

Seeds already finished in ``--runs`` with the same recipe are reused. Writes ``demo_TASK.json`` and ``demo_TASK.md``.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from caop_fast.calibration.counts import Answers
from caop_fast.calibration.files import write_atomic
from caop_fast.calibration.formulas import METRICS
from caop_fast.calibration.intervals import Resampling, percentiles, resample_metrics
from caop_fast.demo.methods import read_answers
from caop_fast.demo.run import ALL_METHODS, DemoConfig, run_demo
from caop_fast.demo.tasks import TASK_NAMES

COMPARED = (("opd", "base"), ("caop", "opd"), ("direct", "opd"), ("masked", "opd"), ("caop", "masked"))
SHOWN = (
    "accuracy_all",
    "mean_confidence",
    "overconfidence_gap",
    "ece_upper",
    "brier_upper",
    "spr",
    "auroc",
    "n_unparsed",
)
HEADS = {
    "accuracy_all": "accuracy",
    "mean_confidence": "confidence",
    "overconfidence_gap": "gap",
    "ece_upper": "ECE",
    "brier_upper": "Brier",
    "spr": "SPR",
    "auroc": "AUROC",
    "n_unparsed": "unread",
    "closed_form_mae": "off the closed form by",
}
READINGS = ("sampled", "expected", "greedy", "greedy expected")
DIFFERENCES = {
    "sampled": ("accuracy_all", "ece_upper", "brier_upper", "spr"),
    "expected": ("ece_upper", "brier_upper"),
    "greedy": ("accuracy_all", "ece_upper"),
}
N_RESAMPLES = 2000


def read_method(folder: Path, name: str, reading: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """``(prompt ids, correct, confidence)`` of a finished run's method by one of `READINGS`."""
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
        whole = {method["name"] for method in found["methods"]} == set(ALL_METHODS)
        if whole and found["recipe"] == json.loads(json.dumps(config.recipe())):
            return found
    return run_demo(config)


def differences(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Mean over the seeds of each compared pair's difference, with a 95 % interval.

    Prompts are drawn with replacement, and one draw serves all methods and every seed that holds the prompt, so what a
    prompt contributes everywhere cancels. Seeds are not resampled: they are listed instead.
    """
    result = []
    for reading, metrics in DIFFERENCES.items():
        read = {(name, folder): read_method(folder, name, reading) for name in ALL_METHODS for folder in folders}
        numbers = {i: k for k, i in enumerate(sorted({i for ids, _, _ in read.values() for i in ids}))}
        methods = {key: Answers(correct, confidence) for key, (_, correct, confidence) in read.items()}
        clusters = [np.array([numbers[i] for i in ids]) for ids, _, _ in read.values()]
        paired = list(zip(methods.values(), clusters, strict=True))
        drawn = resample_metrics(paired, len(numbers), metrics, Resampling(N_RESAMPLES))
        draws = dict(zip(methods, drawn, strict=True))
        for a, b in COMPARED:
            for metric in metrics:
                at = [[float(METRICS[metric](methods[x, f].counts())[0]) for f in folders] for x in (a, b)]
                point = [None if math.isnan(x - y) else x - y for x, y in zip(*at, strict=True)]
                known = [d for d in point if d is not None]
                change = np.mean([draws[a, f][metric] - draws[b, f][metric] for f in folders], axis=0)
                low, high = percentiles(change, 0.95) or (None, None)
                result.append(
                    {
                        "reading": reading,
                        "metric": metric,
                        "method": a,
                        "against": b,
                        "mean": sum(known) / len(known) if len(known) == len(point) else None,
                        "low": low,
                        "high": high,
                        "seeds": point,
                    }
                )
    return result


def summarise(summaries: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """``reading -> method -> metric -> [value of each seed]``."""
    nested = {
        "sampled": lambda method: method,
        "expected": lambda method: method["expected"],
        "greedy": lambda method: method["greedy"],
        "greedy expected": lambda method: method["greedy"]["expected"],
    }
    table: dict[str, dict[str, dict[str, list[float]]]] = {}
    for reading in READINGS:
        for summary in summaries:
            for method in summary["methods"]:
                entry = nested[reading](method)
                for metric in (*SHOWN, "closed_form_mae"):
                    if metric in entry:
                        table.setdefault(reading, {}).setdefault(method["name"], {}).setdefault(metric, []).append(
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
        "likely token at each place. Means over the seeds; the seeds' own values in brackets. Accuracy is over all "
        "answers; an answer whose confidence cannot be read counts as an error of 1 in ECE and Brier.",
        "",
    ]
    for reading, methods in record["readings"].items():
        columns = [m for m in (*SHOWN, "closed_form_mae") if any(m in metrics for metrics in methods.values())]
        lines += [f"## {reading.capitalize()}", ""]
        lines.append("| method | " + " | ".join(HEADS[c] for c in columns) + " |")
        lines.append("|---" * (len(columns) + 1) + "|")
        for name, metrics in methods.items():
            cells = [_cell(metrics[c]) for c in columns]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [
        "## Differences between methods",
        "",
        f"Mean over the seeds with a 95 % paired bootstrap interval ({N_RESAMPLES} draws of prompts, each shared by "
        "all methods and seeds that hold the prompt); then each seed.",
        "",
        "| reading | metric | difference | mean | 95 % interval | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for d in record["differences"]:
        lines.append(
            f"| {d['reading']} | {HEADS[d['metric']]} | {d['method']} − {d['against']} | {_signed(d['mean'])} | "
            f"{_signed(d['low'])} to {_signed(d['high'])} | {', '.join(map(_signed, d['seeds']))} |"
        )
    return "\n".join(lines) + "\n"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def _cell(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    whole = isinstance(known[0], int)
    each = ", ".join("–" if v is None else str(v) if whole else f"{v:.3f}" for v in values)
    mean = sum(known) / len(known)
    return f"**{mean:.1f}** ({each})" if whole else f"**{mean:.3f}** ({each})"


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
        "base": dataclasses.asdict(configs[0].base_config),
        "train": configs[0].train_config.to_dict(),
        "readings": summarise(summaries),
        "differences": differences(folders),
    }
    write_atomic(args.out / f"demo_{args.task}.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
    write_atomic(args.out / f"demo_{args.task}.md", report(record))
    print(report(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
