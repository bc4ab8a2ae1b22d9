"""Output of an audit: a table for the terminal, and a folder with an HTML page, plots and the numbers as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from caop_fast.calibration import page, plots
from caop_fast.calibration.answers import ModelAnswers
from caop_fast.calibration.files import write_atomic
from caop_fast.calibration.table import COLUMNS, format_table, format_value, metric_rows, printable

COLUMN_KEYS = (
    "n",
    "n_unparsed",
    "accuracy",
    "mean_confidence",
    "overconfidence_gap",
    "ece",
    "brier",
    "spr",
    "auroc",
    "aurc",
)
UPPER_KEYS = ("accuracy_all", "ece_upper", "brier_upper")


def _keys(report: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns of the report; the upper ones only where they differ from the plain ones."""
    unread = any(entry["metrics"]["n_unparsed"] for entry in report["models"])
    return (*COLUMN_KEYS, *UPPER_KEYS) if unread else COLUMN_KEYS


def _interval_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """One row per metric, one column per model: intervals are wide, and models are fewer than metrics."""
    entries = report["models"]
    keys = [key for key in entries[0]["intervals"] if key in _keys(report)]
    rows = [[COLUMNS[key].head, *(_interval(e["intervals"][key], COLUMNS[key].form) for e in entries)] for key in keys]
    return ["", *(entry["name"] for entry in entries)], rows


def _interval(interval: Sequence[float] | None, form: str) -> str:
    if interval is None:
        return "–"
    low, high = (format_value(bound, form) for bound in interval)
    return f"{low.removesuffix(' %')} to {high}"


def _reference_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """References for the metrics: the noise floor of ECE, and the constant that states the base rate."""
    rows = []
    for entry in report["models"]:
        floor = entry["ece_floor"]
        rows.append(
            [
                entry["name"],
                format_value(entry["metrics"]["ece"], "share"),
                "–" if floor is None else f"{floor['mean']:.3f} (up to {floor['upper']:.3f})",
                format_value(entry["metrics"]["brier"], "share"),
                # that of always stating the accuracy, over the same answers as its neighbours: the read ones
                format_value(entry["metrics"]["uncertainty"], "share"),
                format_value(entry["metrics"]["brier_skill"], "signed"),
            ]
        )
    return ["", "ECE", "ECE floor (noise)", "Brier", "Brier of a constant", "Brier skill"], rows


def _difference_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]], list[str]]:
    """Heads (a model each), rows (a metric each) and remarks of the comparison with the baseline."""
    compared, remarks = [], []
    for entry in report["models"]:
        name, difference = entry["name"], entry["difference"]
        if difference is None:
            continue
        if difference["metrics"] is None:
            remarks.append(f"{name}: not compared, {difference['reason']}.")
            continue
        compared.append(entry)
        if difference["n_prompts_left_out"]:
            remarks.append(
                f"{name}: compared on the {difference['n_prompts']:,} prompts both models answered; "
                f"{difference['n_prompts_left_out']:,} that only one answered are left out."
            )
    if not compared:
        return [], [], remarks
    keys = [key for key in compared[0]["difference"]["metrics"] if key in _keys(report)]
    rows = [[COLUMNS[key].head, *(_change(e["difference"]["metrics"][key]) for e in compared)] for key in keys]
    return ["", *(entry["name"] for entry in compared)], rows, remarks


def _change(value: Mapping[str, float | None]) -> str:
    if value["difference"] is None:
        return "–"
    text = format_value(value["difference"], "signed")
    if value["low"] is None:
        return text
    return f"{text} ({format_value(value['low'], 'signed')} to {format_value(value['high'], 'signed')})"


def _remarks(report: Mapping[str, Any]) -> list[str]:
    remarks = []
    for entry in report["models"]:
        name, n = entry["name"], entry["metrics"]["n"]
        other = {status: count for status, count in entry["statuses"].items() if status != "ok"}
        if other:
            counts = ", ".join(f"{status} {count:,}" for status, count in sorted(other.items()))
            remarks.append(
                f"{name}: {sum(other.values()):,} of {n:,} answers have no confidence that can be read ({counts})."
            )
        if entry["n_conflicting"]:
            remarks.append(
                f"{name}: {entry['n_conflicting']:,} answers state several confidences that differ; the last one "
                "counts."
            )
        if entry["n_guessed_scale"]:
            remarks.append(f"{name}: the scale of {entry['n_guessed_scale']:,} confidences was guessed (--lenient).")
        if entry["n_bare_percent"]:
            remarks.append(
                f"{name}: {entry['n_bare_percent']:,} of the unread answers state a bare number above 10, such as 85 "
                "without a percent sign; --lenient reads it as a percentage."
            )
        if entry["max_design_effect"] > 1:
            remarks.append(
                f"{name}: several answers share a prompt, and the noise floor takes answers as independent; where the "
                f"answers to a prompt agree, noise alone can give up to {entry['max_design_effect'] ** 0.5:.1f} times "
                "as much. The intervals do allow for it."
            )
        if entry["n_prompts"] is None:
            remarks.append(f"{name}: no prompt ids, so the intervals take every answer as independent of the others.")
    return remarks


def audit_table(report: Mapping[str, Any]) -> str:
    """The report of `audit` as plain text: metrics, intervals, references, comparison, remarks and verdicts."""
    level = f"{100 * report['level']:g} %"
    names = [entry["name"] for entry in report["models"]]
    blocks = [
        format_table(*metric_rows(names, [entry["metrics"] for entry in report["models"]], _keys(report))),
        format_table(*_interval_rows(report), title=f"{level} intervals (bootstrap)"),
        format_table(*_reference_rows(report), title="what noise alone and a constant at the base rate would give"),
    ]
    heads, rows, remarks = _difference_rows(report)
    if rows:
        title = f"difference from {report['baseline']}, prompt by prompt, with {level} intervals"
        blocks.append(format_table(heads, rows, title=title))
    remarks = [*_remarks(report), *remarks]
    if remarks:
        blocks.append("\n".join(map(printable, remarks)))
    blocks.append("\n".join(printable(f"{entry['name']}: {entry['verdict']}") for entry in report["models"]))
    return "\n\n".join(blocks)


def audit_page(report: Mapping[str, Any], models: Sequence[ModelAnswers]) -> str:
    """The report as one self-contained HTML page; without matplotlib it says why there are no pictures."""
    names = [entry["name"] for entry in report["models"]]
    colors = plots.model_colors(names)
    level = f"{100 * report['level']:g} %"
    keys = _keys(report)

    def colored(heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> page.Html:
        """A table whose model names, at the head or in the first column, carry their dots."""
        heads = [page.dotted(head, colors[head]) if head in colors else head for head in heads]
        return page.table(
            heads,
            [[page.dotted(row[0], colors[row[0]]) if row[0] in colors else row[0], *row[1:]] for row in rows],
            caption=caption,
        )

    reason = plots.plots_unavailable()
    bins = {"n_bins": report["n_bins"], "edges": report["edges"]}
    if reason is None:
        pictures: list[str] = [
            "Each dot stands for the answers given with about that confidence. On the dashed line the model is "
            "honest: of the answers it gives at 70 %, 70 % are right. Below the line it is overconfident; red marks "
            "the distance. Thin bars are 95 % intervals, and the strip below shows how often each confidence is "
            "stated.",
            page.reliability_gallery(models, colors, **bins),
        ]
        coverage = page.gallery(
            [
                page.themed_image(
                    lambda theme: plots.risk_coverage_plot(models, theme=theme, colors=colors),
                    alt="Error rate among the most confident answers against the share kept, one line per model",
                    caption="A line that falls to the left: the confidence tells which answers to trust.",
                )
            ],
            wide=True,
        )
    else:
        pictures, coverage = [reason], page.Html("")
    heads, rows, difference_remarks = _difference_rows(report)
    remarks = [*_remarks(report), *difference_remarks]
    sections = [
        page.Section("What it says, and how often it is right", [*pictures, coverage]),
        page.Section(
            "The numbers",
            [
                colored(
                    *metric_rows(names, [entry["metrics"] for entry in report["models"]], keys), caption="per model"
                ),
                colored(*_interval_rows(report), caption=f"{level} intervals (bootstrap)"),
                colored(
                    *_reference_rows(report), caption="what noise alone and a constant at the base rate would give"
                ),
                *(
                    [colored(heads, rows, caption=f"difference from {report['baseline']}, prompt by prompt")]
                    if rows
                    else []
                ),
                *([page.bullets(remarks)] if remarks else []),
            ],
        ),
        *_unread_section(report),
        page.Section(
            "What the columns mean",
            [
                page.glossary(keys),
                "ECE floor: the ECE that a perfectly calibrated model with these very confidences would measure on as "
                "many answers, from noise alone. Only what lies above it says something about the model.",
                "Brier of a constant: what always stating the accuracy would score, over the answers that were "
                "read. Brier skill is the share of it that the stated confidence saves; below 0 the constant is "
                "better.",
            ],
        ),
    ]
    verdicts = [
        entry["verdict"] if len(names) == 1 else f"{entry['name']}: {entry['verdict']}" for entry in report["models"]
    ]
    footer = (
        f"{report['n_bins']} bins, {report['edges']} edges; {report['n_resamples']:,} bootstrap draws, seed "
        f"{report['seed']}. Made by caop-fast audit."
    )
    return page.render_page(
        title="Calibration audit: " + ", ".join(names), lead=verdicts, sections=sections, footer=footer
    )


def _unread_section(report: Mapping[str, Any]) -> list[page.Section]:
    rows = [
        [entry["name"], unread["where"], unread["status"], unread["text"] or "–"]
        for entry in report["models"]
        for unread in entry["unread"]
    ]
    if not rows:
        return []
    table = page.table(["", "line", "status", "end of the answer"], rows, words=True)
    return [page.Section("Answers whose confidence could not be read (the first few)", [table])]


def write_report(report: Mapping[str, Any], models: Sequence[ModelAnswers], out: str | os.PathLike[str]) -> list[Path]:
    """Write audit.json, audit.html and, with matplotlib, reliability.svg and .png into `out`; return the paths.

    Every file is written in one step. OSError when the folder cannot be made or written.
    """
    out = Path(out)
    written = [write_atomic(out / "audit.json", json.dumps(report, indent=2, allow_nan=False) + "\n")]
    if plots.plots_unavailable() is None:
        figure = plots.reliability_diagram(models, n_bins=report["n_bins"], edges=report["edges"])
        written.append(write_atomic(out / "reliability.svg", plots.to_svg(figure)))
        written.append(write_atomic(out / "reliability.png", plots.to_png(figure)))
    written.append(write_atomic(out / "audit.html", audit_page(report, models)))
    return written
