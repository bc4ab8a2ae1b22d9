"""Numbers as text, and Markdown tables whose cells are escaped."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

NOTHING = "–"  # in a cell: not known, or does not apply


def escape(text: Any) -> str:
    """Text for a cell or a list item: one line, Markdown escaped."""
    line = " ".join(str(text).split())
    return re.sub(r"([\\|<>*`\[\]~$])", r"\\\1", line)


def cut(text: str, characters: int = 300) -> str:
    return text if len(text) <= characters else text[: characters - 1].rstrip() + "…"


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a Markdown table and a blank one; the first ``left`` columns are text, the others numbers.

    Cells are not escaped here.
    """
    marks = ["---" if i < left else "---:" for i in range(len(headers))]
    return [_row(headers), _row(marks), *(_row(row) for row in rows), ""]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def number(value: float | None, digits: int = 3) -> str:
    """``value`` with at least ``digits`` significant digits, without an exponent between 1e-4 and 1e7."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    if not 1e-4 <= abs(rounded) < 1e7:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(rounded))))}f}"


def times(value: float | None, digits: int = 3) -> str:
    """A ratio: "2.91x"."""
    return NOTHING if value is None else f"{number(value, digits)}x"


def percent(value: float | None) -> str:
    """A fraction as a percentage, with one decimal below 10."""
    return NOTHING if value is None else f"{100 * value:.{0 if abs(value) >= 0.0995 else 1}f} %"


def size(count: float | None) -> str:
    """Bytes in MB (1e6) or GB (1e9)."""
    if count is None:
        return NOTHING
    return f"{number(count / 1e9)} GB" if abs(count) >= 0.9995e9 else f"{number(count / 1e6)} MB"


def error(value: float | None) -> str:
    """A relative error: "3.1e-03"."""
    return NOTHING if value is None else "0" if value == 0 else f"{value:.1e}"


def over(value: float | None, other: float | None) -> float | None:
    """``value / other``; None if either is missing or the divisor is 0."""
    return None if value is None or not other else value / other


def spread(middle: float | None, low: float | None, high: float | None, rounds: int) -> str:
    """A median, a range, and the number of rounds: "12.3 (12.1–12.9; 50)"."""
    if middle is None or low is None or high is None:
        return number(middle)
    return f"{number(middle)} ({number(low)}–{number(high)}; {rounds})"


def spread_of(ratios: Sequence[float]) -> str:
    """Median, minimum and maximum of ratios: "1.5x (1.2–2.1)"."""
    if not ratios:
        return NOTHING
    if len(ratios) == 1:
        return times(ratios[0])
    return f"{times(statistics.median(ratios))} ({number(min(ratios))}–{number(max(ratios))})"


def listed(words: Iterable[str], most: int | None = None) -> str:
    """``words`` joined by commas; after ``most`` of them only how many more there are."""
    words = list(words)
    if most is None or len(words) <= most:
        return ", ".join(words)
    return f"{', '.join(words[:most])} and {len(words) - most} more"


def plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"
