"""The parser's work is linear in the text, on megabytes made to stall a backtracking pattern.

Two ways to be slower, two tests without a clock: what patterns go through, match by match, is counted; the steps of a
pattern that goes back within a match are not seen, but on texts this long they would take minutes to hours, and such
a call is ended.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from caop_fast.calibration import parse, parse_confidence
from helpers.hang import ended_if_it_hangs

LONG = 2_000_000  # characters: 4e12 pairs of them
REPEATED = [
    "confidence",
    "confidence:",
    "confidence: 1 ",
    "confidence: 0.8-",
    "confidence: 1/1:",
    "confidence:1/a-/",
    "confidence:1-/x;",
    "<confidence ",
    "<confidence><",
    "<confidence a=",
    '"confidence',
    '"confidence" ',
    "confidence (",
    "confidence (((",
    "confidence**",
    "confidence:**",
    "confidence level",
    "confidence:<b>",
    "confidence:\\boxed{",
    "confidence:" + " " * 50,
    "confidence:about ",
    "confidence:\n1. ",
]
RUNS = [
    " ",
    "\n",
    "\t",
    "*",
    "_",
    "-",
    "~",
    "`",
    '"',
    "(",
    "[",
    "{",
    "<",
    ">",
    "\\",
    "/",
    ".",
    ",",
    "1",
    "0",
    "1,",
    "1.",
    "1 ",
    "- ",
    "%",
]
HEADS = [
    "confidence",
    "confidence:",
    "confidence: 0.8",
    "confidence: 0.8,",
    "confidence: 1",
    "<confidence",
    '"confidence"',
]
RUNS += ["<b>", "\\boxed{", "\u200b", "\u2014", "\u0661", "e", "1e1", "1/", "of ", "in ", "to ", "~ "]


class CountingPattern:
    """A compiled pattern that adds up the characters it goes through, and its calls."""

    def __init__(self, pattern: re.Pattern[str], counts: list[int]) -> None:
        self.pattern, self.counts = pattern, counts

    def _count(self, match: re.Match[str] | None, at: int, end: int) -> re.Match[str] | None:
        self.counts.append(1 + (end if match is None else match.end()) - at)
        return match

    def match(self, text: str, at: int = 0) -> re.Match[str] | None:
        return self._count(self.pattern.match(text, at), at, at)

    def fullmatch(self, text: str) -> re.Match[str] | None:
        return self._count(self.pattern.fullmatch(text), 0, len(text))

    def search(self, text: str, at: int = 0, end: int | None = None) -> re.Match[str] | None:
        end = len(text) if end is None else end
        return self._count(self.pattern.search(text, at, end), at, end)

    def finditer(self, text: str) -> Iterator[re.Match[str]]:
        self.counts.append(len(text))
        return self.pattern.finditer(text)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each call of a pattern of the parser: 1, and the characters it went through."""
    found: list[int] = []
    for name, pattern in list(vars(parse).items()):
        if isinstance(pattern, re.Pattern):
            monkeypatch.setattr(parse, name, CountingPattern(pattern, found))
    return found


def texts(head: str, n: int) -> dict[str, str]:
    """About ``n`` characters behind ``head``, which may be followed by more."""
    found = {}
    for unit in RUNS:
        run = unit * (n // len(unit))
        found[f"{head} {unit!r}*"] = head + run
        found[f"{head} {unit!r}* !"] = head + run + "!"
        found[f"{head} {unit!r}* ,1"] = head + run + ",1"
    return found


def statements(n: int) -> dict[str, str]:
    """About ``n`` characters of statements or what may begin one."""
    return {f"{unit!r}*": unit * (n // len(unit)) for unit in REPEATED}


def test_what_patterns_go_through_is_linear(counts):
    """Each text and twice of it; a statement costs a few calls, each character a few of them."""

    def work(text: str) -> int:
        counts.clear()
        parse_confidence(text)
        return sum(counts)

    small, large = statements(5_000), statements(10_000)
    for head in HEADS:
        small |= texts(head, 5_000)
        large |= texts(head, 10_000)
    for name, text in small.items():
        assert len(text) < work(text) < 10 * len(text), name
        assert work(large[name]) < 2.1 * work(text), name


@pytest.mark.parametrize("head", HEADS)
def test_nothing_behind_a_head_stalls_a_pattern(head):
    for text in texts(head, LONG // 4).values():
        with ended_if_it_hangs():
            parse_confidence(text)


@pytest.mark.parametrize("unit", REPEATED)
def test_megabytes_of_statements(unit):
    with ended_if_it_hangs():
        parse_confidence(unit * (LONG // len(unit)))


@pytest.mark.parametrize("unit", RUNS)
def test_megabytes_behind_a_number(unit):
    run = unit * (LONG // len(unit))
    with ended_if_it_hangs():
        parse_confidence("confidence: 0.8" + run + "!")
        parse_confidence("confidence:" + run + ",1")


def test_a_call_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr("helpers.hang.HANG_SECONDS", 0.05)
    with pytest.raises(TimeoutError), ended_if_it_hangs():
        re.match("(?:a|a)*b", "a" * 60)
