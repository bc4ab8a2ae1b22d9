"""Meaning and number format of every column of a report; tables for the terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Column:
    """One number of a report: its key, the head of its column, its format and its meaning."""

    key: str
    head: str
    form: str  # "percent", "share" (0 to 1), "signed", "count" or "nats"
    better: str  # "low", "high", "zero" or "" where neither end is better
    meaning: str


COLUMNS: dict[str, Column] = {
    column.key: column
    for column in (
        Column("n", "answers", "count", "", "How many answers were judged."),
        Column(
            "n_unparsed",
            "unread",
            "count",
            "low",
            "Answers that state no confidence that can be read. They count as wrong by a full 1 in every number marked "
            "“upper”, so leaving the statement out never helps.",
        ),
        Column(
            "accuracy",
            "accuracy",
            "percent",
            "high",
            "Share of the answers that are right, of those whose confidence can be read.",
        ),
        Column(
            "accuracy_all", "accuracy all", "percent", "high", "Share of all answers that are right, unread ones too."
        ),
        Column(
            "mean_confidence",
            "confidence",
            "percent",
            "",
            "The stated confidence, averaged over the answers that state one.",
        ),
        Column(
            "overconfidence_gap",
            "gap",
            "signed",
            "zero",
            "Mean confidence minus accuracy. Above zero: claims more than it delivers. Zero is honest on average.",
        ),
        Column(
            "ece",
            "ECE",
            "share",
            "low",
            "Expected calibration error: sort the answers into ten bins of stated confidence, take the distance "
            "between claim and accuracy in each, and average by bin size. 0 means that of the answers given at 70 %, "
            "70 % are right.",
        ),
        Column(
            "ece_upper",
            "ECE upper",
            "share",
            "low",
            "ECE with every unread answer counted as an error of 1. The same as ECE when all could be read.",
        ),
        Column(
            "brier",
            "Brier",
            "share",
            "low",
            "Mean squared distance between confidence and outcome (1 right, 0 wrong). Punishes both wrong levels and "
            "the failure to tell right answers from wrong ones. Always saying 50 % scores 0.25.",
        ),
        Column(
            "brier_upper",
            "Brier upper",
            "share",
            "low",
            "Brier score with every unread answer counted as an error of 1.",
        ),
        Column(
            "spr",
            "SPR",
            "share",
            "high",
            "Strict pairwise ranking: the chance that a right answer states a strictly higher confidence than a wrong "
            "one. Ties count 0, so a model that always says 99 % scores 0.",
        ),
        Column(
            "auroc",
            "AUROC",
            "share",
            "high",
            "The same chance with a tie counted as one half. 0.5 is a coin toss: the confidence says nothing about "
            "which answers are right. 1 is perfect sorting.",
        ),
        Column(
            "aurc",
            "AURC",
            "share",
            "low",
            "Area under the risk-coverage curve: the error rate when only the most confident answers are kept, "
            "averaged over how many are kept.",
        ),
        Column(
            "answer_entropy",
            "H answer",
            "nats",
            "",
            "Entropy of the next-token distribution over the tokens of the answer, in nats: how undecided the model is "
            "while it answers.",
        ),
        Column(
            "confidence_entropy",
            "H conf.",
            "nats",
            "",
            "Entropy of the distribution over confidence values, in nats. Near 0: the model always says the same.",
        ),
    )
}


def format_value(value: Any, form: str) -> str:
    """A number as a report shows it; an en dash where it is undefined (None). Raises ValueError for an unknown form."""
    if value is None:
        return "–"
    if form == "count":
        return f"{int(value):,}"
    if form == "percent":
        return f"{100 * value:.1f} %"
    if form == "share":
        return f"{value:.3f}"
    if form == "signed":
        # no "-0.000": a rounded zero has no sign
        return f"{value:+.3f}" if abs(value) >= 0.0005 else "0.000"
    if form == "nats":
        return f"{value:.2f}"
    raise ValueError(f"form must be count, percent, share, signed or nats, got {form!r}")


def printable(text: object) -> str:
    """Text without terminal control sequences: control, direction-changing and unpaired characters become U+FFFD.

    Line breaks and tabs become spaces. Letters of every script stay.
    """
    out = []
    for character in str(text):
        if character in "\t\n\r":
            out.append(" ")
        elif (
            unicodedata.category(character) in ("Cc", "Cs")
            or character in "\u2028\u2029"
            or unicodedata.bidirectional(character) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
        ):
            out.append("\ufffd")
        else:
            out.append(character)
    return "".join(out)


def _width(text: str) -> int:
    """Columns the text takes on a terminal: two for wide East Asian characters, none for combining marks."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in unicodedata.normalize("NFC", text)
    )


def format_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> str:
    """A plain-text table: first column to the left, the others to the right, a rule under the heads.

    Cells are made `printable`. Raises ValueError when a row has another number of cells than there are heads.
    """
    for row in rows:
        if len(row) != len(heads):
            raise ValueError(f"a row has {len(row)} cells, the table {len(heads)} columns: {list(row)!r}")
    cells = [[printable(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(_width(row[i]) for row in cells) for i in range(len(heads))]
    lines = []
    for row in cells:
        padded = [
            cell + " " * (width - _width(cell)) if i == 0 else " " * (width - _width(cell)) + cell
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    if title:
        lines.insert(0, printable(title))
    return "\n".join(lines)


def metric_rows(
    names: Sequence[str], metrics: Sequence[Mapping[str, Any] | None], keys: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Heads and formatted cells of a table with one row per model and one column per key of COLUMNS.

    A model without metrics (None), or without one of the keys, shows an en dash there.
    """
    heads = ["", *(COLUMNS[key].head for key in keys)]
    rows = [
        [name, *(format_value((metric or {}).get(key), COLUMNS[key].form) for key in keys)]
        for name, metric in zip(names, metrics, strict=True)
    ]
    return heads, rows
