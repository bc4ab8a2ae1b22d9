"""The parser's time is linear in the text, on megabytes made to stall a backtracking pattern."""

from __future__ import annotations

import time

import pytest

from caop_fast.calibration import parse_confidence

MEGABYTE = 1_000_000
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
RUNS += ["<b>", "\\boxed{", "\u200b", "\u2014", "\u0661", "e", "1e1", "1/", "of ", "in ", "to ", "~ "]


def seconds(text: str) -> float:
    start = time.process_time()
    parse_confidence(text)
    return time.process_time() - start


def texts(n: int) -> dict[str, str]:
    found = {f"{unit!r}*": unit * (n // len(unit)) for unit in REPEATED}
    heads = [
        "confidence",
        "confidence:",
        "confidence: 0.8",
        "confidence: 0.8,",
        "confidence: 1",
        "<confidence",
        '"confidence"',
    ]
    for head in heads:
        for unit in RUNS:
            run = unit * (n // len(unit))
            found[f"{head} {unit!r}*"] = head + run
            found[f"{head} {unit!r}* !"] = head + run + "!"
            found[f"{head} {unit!r}* ,1"] = head + run + ",1"
    return found


def test_no_text_of_20_kb_is_slow():
    # a quadratic pattern takes 10^8 steps here, which is seconds; the linear ones take a millisecond
    slow = {name: took for name, text in texts(20_000).items() if (took := seconds(text)) > 0.1}
    slow = {name: took for name in slow if (took := seconds(texts(20_000)[name])) > 0.1}  # not a hiccup of the machine
    assert not slow


@pytest.mark.parametrize("unit", REPEATED)
def test_a_megabyte_of_statements(unit):
    assert seconds(unit * (MEGABYTE // len(unit))) < 4.0


@pytest.mark.parametrize("unit", RUNS)
def test_a_megabyte_behind_a_number(unit):
    run = unit * (MEGABYTE // len(unit))
    assert seconds("confidence: 0.8" + run + "!") < 1.0
    assert seconds("confidence:" + run + ",1") < 1.0


def test_many_statements_cost_their_length():
    small, large = "confidence: 0.8 - x\n" * 2_000, "confidence: 0.8 - x\n" * 20_000
    best = min(seconds(small) for _ in range(3))
    assert min(seconds(large) for _ in range(3)) < 40 * max(best, 1e-3)
