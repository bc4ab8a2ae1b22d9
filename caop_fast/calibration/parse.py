"""Parse the confidence that a text states; used in training, logging and evaluation alike.

A statement is one of

* the word *confidence* (not a part of another word, and not of a compound such as *self-confidence*), then optionally
  *level* or *score* and a short remark in parentheses, then ``:`` or ``=`` (also full-width): rule ``"label"``;
* the same word as a quoted key followed by a colon: rule ``"json"``;
* an opening ``<confidence>`` tag, with or without attributes, closed or not: rule ``"tag"``.

What follows it is read by one grammar. Blanks, line breaks and markup (``**``, backquotes, quotes, brackets, ``$``,
``\\boxed{``) may come first, and so may a word that only says the number is rounded (*about*, ``~``). What is
ambiguous is not read, and a status says why: a guessed number is worse than none.
Every pattern is a run of one character class or has a bounded length, so that the time is linear in the text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

STATUSES = ("ok", "missing", "malformed", "no_number", "range", "out_of_range", "not_finite")


class ParsedConfidence(NamedTuple):
    """Result of `parse_confidence`; all fields but the counts describe the last statement.

    Attributes:
        value: the confidence in [0, 1]; None unless `status` is ``"ok"``.
        status: ``ok``; ``missing`` (no statement); ``malformed`` (``0.8.5``, ``85pts``, ``0.8 0.9``, ``1,000``);
            ``no_number`` (``high``, or nothing); ``range`` (two numbers, or a bound such as ``> 0.9``);
            ``out_of_range`` (``1.5``, ``-0.3``, ``11/10``, ``85`` without a unit); ``not_finite`` (``nan``, ``1/0``).
        span: start and end of the number in the original text, with its sign and its unit (``%``, ``/10``), so that
            it can be replaced whole. None where no number was written.
        rule: ``label``, ``json`` or ``tag``; None if missing.
        form: ``decimal``, ``percent``, ``permille`` or ``fraction``; None where no number was read.
        n_statements: how many statements the text holds, readable or not.
        conflicting: whether two readable statements give different values.
        guessed_scale: the number that the value was divided by without being told to; only with ``lenient=True``.
    """

    value: float | None
    status: str
    span: tuple[int, int] | None = None
    rule: str | None = None
    form: str | None = None
    n_statements: int = 0
    conflicting: bool = False
    guessed_scale: int | None = None


class _Reading(NamedTuple):
    status: str
    value: float | None = None
    span: tuple[int, int] | None = None
    form: str | None = None


_BLANK = "[ \\t\u00a0\u1680\u2000-\u200b\u200e\u200f\u202f\u205f\u2060\u3000\ufeff]"
_EMPHASIS = r"</?(?:b|i|u|em|strong|code|mark|br) ?/?>"
_SLASH = "[/\u2044\u2215\uff0f]"
_MARKS = ".,\u00b7\u066b\uff0c\uff0e"  # full stop, comma, middle dot, Arabic decimal mark, full-width comma and stop
_DASH = r"\-\u2010-\u2015\u2212"
_WORD_END = r"(?![^\W_])"
_CLOSE = r"(?:[*_`$)}]|\\\)){0,6}"
_OPEN_NUMBER = rf"[*_`$]{{0,4}}[+\-\u2212]?[{_MARKS}]?\d"

# `re.ASCII`, or "confıdence" with a dotless i would match.
_KEYWORD = re.compile("confidence", re.IGNORECASE | re.ASCII)
_GAP = re.compile(rf"(?:(?:{_BLANK}|[*_`\"'\u201c\u201d\u2018\u2019~)\]\\])+|{_EMPHASIS})*", re.IGNORECASE)
_QUALIFIER = re.compile(rf"-?(?:level|score){_WORD_END}", re.IGNORECASE)
_REMARK = re.compile(r"\([^()\n]{0,40}\)")
_OTHER_SCALE = re.compile(r"[2-9%]|\d{2}")  # in a remark: anything but 0 and 1
_SEPARATOR = re.compile("[:=\uff1a\ufe55\uff1d][:=]?")
_TAG_END = re.compile(r"(?:\s[^<>]*)?>")
_KEY_END = re.compile(r"(?:_|-|\s)?(?:level|score)?\\?([\"'])\s*:", re.IGNORECASE)
_OPEN = re.compile(
    rf"(?:(?:\s|{_BLANK}|[*_`\"'\u201c\u201d\u2018\u2019\u00ab$(\[{{|])+"
    rf"|\\(?:boxed|fbox|textbf|text|mathbf|mathrm) ?\{{|\\[(\[\"]|{_EMPHASIS})*",
    re.IGNORECASE,
)
_HEDGE = re.compile(
    rf"(?:[~\u2248\u2243\u223c]|(?:approximately|approx\.?|about|around|roughly|circa|ca\.){_WORD_END}){_BLANK}*",
    re.IGNORECASE,
)
_BOUND = re.compile(
    rf"(?:[<>\u2264-\u2267]=?|(?:between|from|at least|at most|over|under|above|below|up to|more than|less than)"
    rf"{_WORD_END}){_BLANK}*",
    re.IGNORECASE,
)
_LINE_BREAK = re.compile("[\n\r\u2028\u2029]")
_BULLET = re.compile(rf"[+\u2022{_DASH}]{_BLANK}+")
_LIST_ITEM = re.compile(rf"\d{{1,3}}[.)]{_BLANK}+\S")
_LOOSE_SIGN = re.compile(rf"[+\u00b1{_DASH}]+{_BLANK}*(?=[{_MARKS}]?\d)")
_NOT_FINITE = re.compile(rf"[+\-\u2212]?(?:nan|infinity|inf|\u221e){_WORD_END}", re.IGNORECASE)
_NUMBER = re.compile(
    rf"(?P<sign>[+\-\u2212\u2013\ufe63\uff0d]?)(?P<digits>[{_MARKS}]{{0,2}}\d[\d{_MARKS}]*)(?P<exponent>[eE][+\-\u2212]?\d+)?"
)
_DECIMAL = re.compile(rf"\d+(?:[{_MARKS}]\d*)?|[.\u066b\uff0e]\d+")
_THOUSANDS = re.compile(r"[1-9]\d{0,2}[,\uff0c]\d{3}")  # 1,000: a thousand, or one with three decimals?
_TWO_DECIMALS = re.compile(r"\d*\.\d+(?:,|\.{2,})(?:\d+(?:\.\d*)?|\.\d+)")  # 0.8,0.9 and 0.8..0.9
_PERCENT = re.compile(
    rf"{_CLOSE}{_BLANK}*\\?(?:[%\uff05\u066a\ufe6a]|(?P<permille>\u2030)|(?:percent|per cent|pct){_WORD_END})",
    re.IGNORECASE,
)
_FRACTION = re.compile(
    rf"{_CLOSE}{_BLANK}*(?:{_SLASH}|out of){_BLANK}*[*_`$]{{0,4}}(?P<denominator>\d[\d{_MARKS}]*)", re.IGNORECASE
)
_NUMBER_WORD = rf"(?:two|three|four|five|six|seven|eight|nine|ten|twenty|(?:a |one )?hundred){_WORD_END}"
# After a number these make it a part of something else.
_GLUED = re.compile(
    rf"[^\W_]|_+[^\W_]|{_SLASH}(?=\S)|[:*+\u00b7]\d|{_BLANK}*[\u00d7\u00f7^]|{_BLANK}+[*+x]{_BLANK}*\d"
    rf"|{_BLANK}+\(?(?:out of|on a scale|scale)|{_BLANK}+(?:{_SLASH}|in){_BLANK}*{_NUMBER_WORD}|{_BLANK}+\({_SLASH}",
    re.IGNORECASE,
)
_NEXT_NUMBER = re.compile(rf"{_BLANK}+(?:(?:in|of){_BLANK}+)?[{_MARKS}]?\d", re.IGNORECASE)
_JOINED_NUMBER = re.compile(
    rf"{_CLOSE}{_BLANK}*(?:\+/?-|\u00b1|[~\u223c\u301c\uff5e\u2026{_DASH}]+|\.{{2,3}}|(?<=[^\S\n])(?:to|and|or)(?=\s))"
    rf"{_BLANK}*(?={_OPEN_NUMBER})|{_BLANK}*,{_BLANK}*(?=[+\-]?\.?\d)",
    re.IGNORECASE,
)
_SKIP_MARKUP = re.compile(r"[*_`$]*")
_JUNK = re.compile(rf"(?:[^\W_]|%|[_{_MARKS}^/+\-\u2212\u00d7*:]{{1,3}}(?=[^\W_])){{0,64}}")
_TO_POINT = str.maketrans(dict.fromkeys(_MARKS, "."))


def parse_confidence(text: str, *, lenient: bool = False) -> ParsedConfidence:
    """Read the last confidence statement of `text`, by position, even when it is unreadable and an earlier one is not.

    A stated unit always counts (``85%``, ``85 percent``, ``8/10``, ``8 out of 10``); without one a number outside
    [0, 1] is ``out_of_range`` and is never clamped. ``0.9.`` ends a sentence, ``0,85`` has a decimal comma, ``1e-2``,
    ``.85``, ``1.`` and the decimal digits of any script are numbers. Numbers that two people would read differently
    are ``malformed``: ``1,000``, ``50/50`` (an idiom for one half), ``- 0.3`` on the label's line. After a line break
    ``1. Next`` is a list item, hence ``no_number``.

    Args:
        text: the completion alone; a prompt that quotes ``Confidence: 0.85`` would be read like an answer.
        lenient: read a number above 10 and up to 100 without a unit as a percentage, and say so in `guessed_scale`.
            Numbers above 1 and up to 10 stay out of range: 8 may be 8/10 as well as 8 %.

    Returns:
        A `ParsedConfidence`. Time is linear in ``len(text)``.

    Raises:
        TypeError: `text` is not a str. No str raises.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")
    n_statements, conflicting = 0, False
    first_value: float | None = None
    last: ParsedConfidence | None = None
    for last in _statements(text, lenient):
        n_statements += 1
        if last.value is not None:
            if first_value is None:
                first_value = last.value
            conflicting = conflicting or last.value != first_value
    if last is None:
        return ParsedConfidence(None, "missing")
    return last._replace(n_statements=n_statements, conflicting=conflicting)


def replace_confidence(text: str, number: str, *, every: bool = False) -> str:
    """`text` with the number of its last confidence statement written as `number`; nothing else changes.

    The unit belongs to the number: ``85%`` becomes ``0.60``, not ``0.60%``. Text in which there is no number to replace
    (status ``missing`` or ``no_number``) comes back unchanged.

    Args:
        text: any text.
        number: what to write, verbatim.
        every: replace the number of every statement, not only of the last.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")
    if not isinstance(number, str):
        raise TypeError(f"number must be a str, got {type(number).__name__}")
    statements = list(_statements(text, lenient=False))
    spans = [s.span for s in (statements if every else statements[-1:]) if s.span is not None]
    pieces, done = [], 0
    for start, end in spans:
        pieces += [text[done:start], number]
        done = end
    return "".join([*pieces, text[done:]])


def _statements(text: str, lenient: bool) -> Iterator[ParsedConfidence]:
    """Every statement in the order of the text; the counts are left at their defaults."""
    for keyword in _KEYWORD.finditer(text):
        found = _head(text, keyword.start(), keyword.end())
        if found is None:
            continue
        rule, at, other_scale = found
        status, value, span, form = _read_value(text, at)
        if other_scale and form == "decimal":  # "Confidence (0-100): 1" may be 1 % or all of it
            status, value = "malformed", None
        guessed_scale = None
        if value is not None and not 0 <= value <= 1:
            status = "out_of_range"
            if lenient and form == "decimal" and 10 < value <= 100:
                status, value, guessed_scale = "ok", value / 100, 100
        yield ParsedConfidence(value if status == "ok" else None, status, span, rule, form, guessed_scale=guessed_scale)


def _head(text: str, start: int, end: int) -> tuple[str, int, bool] | None:
    """The rule that makes the word at [start, end) a statement, where its value begins, and whether a remark names a
    scale other than 0 to 1; or None."""
    if _inside_word(text, start):
        return None
    if text[max(0, start - 3) : start].rstrip().endswith("<"):
        qualified = _QUALIFIER.match(text, end + (text[end : end + 1] == "_"))
        tag = _TAG_END.match(text, qualified.end() if qualified else end)
        if tag and text[end : end + 8].lstrip()[:1] not in (":", "=") and text[tag.end() - 2] != "/":
            return "tag", tag.end(), False
    if start and text[start - 1] in "\"'":
        key = _KEY_END.match(text, end)
        if key and key[1] == text[start - 1]:
            return "json", key.end(), False
    at = _skip(_GAP, text, end)
    if qualifier := _QUALIFIER.match(text, at):
        at = _skip(_GAP, text, qualifier.end())
    if remark := _REMARK.match(text, at):
        at = _skip(_GAP, text, remark.end())
    separator = _SEPARATOR.match(text, at)
    return ("label", separator.end(), bool(remark and _OTHER_SCALE.search(remark[0]))) if separator else None


def _skip(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Where `pattern` ends, if it matches at `at`."""
    match = pattern.match(text, at)
    return match.end() if match else at


def _inside_word(text: str, start: int) -> bool:
    """Whether what stands before `start` makes the word there a part of a longer one."""
    before = text[max(0, start - 4) : start].rstrip("_")  # underscores are markup unless a word precedes them
    if not before:
        return start > 3 and text[start - 1] == "_"
    if before.endswith(("\\n", "\\r", "\\t")):
        return False  # an escaped line break, as in JSON that was never decoded
    hyphen = before[-1] in "-\u2010\u2011"
    return before[-1].isalnum() or (hyphen and len(before) > 1 and before[-2].isalpha())


def _read_value(text: str, at: int) -> _Reading:
    """The number that stands at `at`, after blanks and markup."""
    start = _skip(_OPEN, text, at)
    if _LINE_BREAK.search(text, at, start):
        if bullet := _BULLET.match(text, start):
            start = _skip(_OPEN, text, bullet.end())
        if _LIST_ITEM.match(text, start):
            return _Reading("no_number")
    bound = None
    if hedge := _HEDGE.match(text, start):
        start = _skip(_OPEN, text, hedge.end())
    elif bound := _BOUND.match(text, start):
        start = _skip(_OPEN, text, bound.end())
    if found := _NOT_FINITE.match(text, start):
        return _Reading("not_finite", None, found.span())
    number = _NUMBER.match(text, start)
    if number is None:
        if loose := _LOOSE_SIGN.match(text, start):  # "- 0.3", "--0.3", "±0.3"
            return _Reading("malformed", None, (start, _number_end(text, loose.end())))
        return _Reading("no_number")
    reading = _read_number(text, number)
    end = reading.span[1] if reading.span else number.end()
    in_brackets = bound and bound[0].rstrip() == "<" and text[end : end + 1] == ">"
    if bound and not in_brackets and reading.status != "malformed":  # "> 0.9"; but "<0.9>" fills in a template
        return _Reading("range", None, (bound.start(), end))
    return reading


def _read_number(text: str, number: re.Match[str]) -> _Reading:
    start = number.start()
    digits, exponent = number["digits"], number["exponent"] or ""
    core = digits if exponent else digits.rstrip(_MARKS)  # trailing marks end a sentence
    end = number.end() - (len(digits) - len(core))
    if _TWO_DECIMALS.fullmatch(core):
        return _Reading("range", None, (start, _number_end(text, start)))
    broken = core.isdecimal() and len(core) < len(digits) and _NEXT_NUMBER.match(text, number.end())  # "0. 85"
    if broken or not _DECIMAL.fullmatch(core) or _THOUSANDS.fullmatch(core):
        return _malformed(text, start, broken.end() - 1 if broken else end)
    negative = number["sign"] not in ("", "+")
    value, form = _to_float(core, exponent), "decimal"
    # "85.%": a unit glued to the trailing mark belongs to the number all the same.
    glued = len(core) < len(digits) and text[number.end() : number.end() + 1] in ("%", "/")
    unit_at = number.end() if glued else end
    if unit := _PERCENT.match(text, unit_at):
        form = "permille" if unit["permille"] else "percent"
        shift = 3 if unit["permille"] else 2
        # Shifting the decimal exponent rounds once, where a division would round twice.
        value = value / 10**shift if exponent else _to_float(core, f"e-{shift}")
        end = unit.end()
    elif unit := _FRACTION.match(text, unit_at):
        form = "fraction"
        below = unit["denominator"].rstrip(_MARKS)
        end = unit.end() - (len(unit["denominator"]) - len(below))
        if not _DECIMAL.fullmatch(below) or _PERCENT.match(text, end) or (core, below) == ("50", "50"):
            return _malformed(text, start, end)
        denominator = _to_float(below, "")
        value = value / denominator if denominator else math.nan
    if _GLUED.match(text, end):
        return _malformed(text, start, end)
    if joined := _JOINED_NUMBER.match(text, end):
        return _Reading("range", None, (start, _number_end(text, _skip(_SKIP_MARKUP, text, joined.end()))))
    if following := _NEXT_NUMBER.match(text, end):
        return _Reading("malformed", None, (start, _number_end(text, following.end() - 1)))
    if math.isnan(value):
        return _Reading("not_finite", None, (start, end), form)
    value = -value if negative and value else value
    return _Reading("ok", value, (start, end), form)


def _to_float(digits: str, exponent: str) -> float:
    return float(digits.translate(_TO_POINT) + exponent.replace("\u2212", "-"))


def _number_end(text: str, at: int) -> int:
    """Where the number at `at`, with its unit, ends: for spans, when its value does not matter."""
    number = _NUMBER.match(text, at)
    if number is None:
        return at
    end = number.start("digits") + len(number["digits"].rstrip(_MARKS)) if not number["exponent"] else number.end()
    unit = _PERCENT.match(text, end)
    return unit.end() if unit else end


def _malformed(text: str, start: int, end: int) -> _Reading:
    """The whole word around a number that is no number, up to the next statement."""
    junk = _skip(_JUNK, text, end)
    following = _KEYWORD.search(text, end, junk)
    return _Reading("malformed", None, (start, following.start() if following else junk))
