"""A verifier of tool calls: every call of the reference must be made, with the same arguments, and no other."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from caop_fast.caop.statement import answer_text
from caop_fast.caop.verifiers import Verdict, of_row, reference_answer

_ACTION = re.compile(r"^[ \t]{0,8}[*_`]{0,3}Action[*_`]{0,3}[ \t]{0,4}:[*_`]{0,3}[ \t]{0,4}([^\n]{1,300})", re.M | re.I)
_INPUT = re.compile(
    r"\s{0,8}[*_`]{0,3}Action[ _]Input[*_`]{0,3}[ \t]{0,4}:[*_`]{0,3}\s{0,8}(?:```(?:json)?\s{0,8}|`)?", re.I
)
_LIST = re.compile(r"\[\s{0,40}(?:\{|\])")
_NAME = re.compile(r"[\w.\-/:]{1,200}")


@dataclass(frozen=True)
class ToolCalls:
    """Right when the calls of the response are exactly those of ``row[key]``: names and arguments, every one of them.

    The response may hold lines ``Action: name`` / ``Action Input: {json}``, one pair per call, or a JSON list of
    ``{"Action": name, "Action_Input": arguments}``. Arguments are JSON objects, or strings that hold one, and are
    compared as values: key order and spacing do not count, ``3`` equals ``3.0``; ``"3"``, ``3`` and ``true`` differ.

    Args:
        key: the row's field with the reference: such a list, or a string that holds one.
        ordered: whether the calls must come in the reference's order.
    """

    key: str = "answer"
    ordered: bool = False

    def __call__(self, response: str, row: Mapping[str, Any]) -> Verdict:
        reference = reference_answer(row, self.key)
        try:
            expected = _calls_of(_loads(reference) if isinstance(reference, str) else reference)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"row[{self.key!r}] must be a JSON list of tool calls: {error}{of_row(row)}") from None
        try:
            found = _read_calls(response)
        except RecursionError:
            return Verdict(0.0, None, "tool calls nested too deeply")
        except ValueError as error:
            return Verdict(0.0, None, f"unreadable: {error}")
        parsed = [{"Action": name, "Action_Input": arguments} for name, arguments in found]
        if found == expected or (not self.ordered and Counter(found) == Counter(expected)):
            return Verdict(1.0, parsed, "matches")
        if len(found) != len(expected):
            return Verdict(0.0, parsed, f"{len(found)} calls, expected {len(expected)}")
        if Counter(found) == Counter(expected):
            return Verdict(0.0, parsed, "right calls in another order")
        names_match = Counter(name for name, _ in found) == Counter(name for name, _ in expected)
        return Verdict(0.0, parsed, "arguments differ" if names_match else "other tools called")


def _read_calls(text: str) -> list[tuple[str, str]]:
    """The calls of a response as (name, canonical arguments). Reads each character a bounded number of times."""
    if _ACTION.search(text):
        return _read_action_lines(text)
    first = _LIST.search(text)
    if first is None:
        raise ValueError("no tool call found")
    # Prose may hold brackets too: the outermost list that decodes, from the first opening, else from the last one.
    starts = [m.start() for m in _LIST.finditer(text)]
    for start in dict.fromkeys((starts[0], starts[-1])):
        try:
            return _calls_of(_decode(text, start)[0])
        except ValueError as error:
            problem = error
    raise problem


def _read_action_lines(text: str) -> list[tuple[str, str]]:
    calls: list[tuple[str, str]] = []
    position = 0
    while action := _ACTION.search(text, position):
        number = len(calls) + 1
        name = _NAME.fullmatch(action.group(1).strip(" \t\r*_`\"'").strip())
        if name is None:
            raise ValueError(f"call {number} has no tool name")
        given = _INPUT.match(text, action.end())
        if given is None:
            raise ValueError(f"call {number} has no Action Input")
        value, end = _decode(text, given.end())
        line_end = text.find("\n", end)
        rest = text[end : line_end if line_end >= 0 else len(text)]
        if answer_text(rest[:300]).strip(" \t\r`*"):
            raise ValueError(f"call {number} has text after its Action Input")
        calls.append((name.group(0), _arguments(value, number)))
        position = end
    return calls


def _calls_of(value: Any) -> list[tuple[str, str]]:
    if not isinstance(value, list) or not value:
        raise ValueError("not a non-empty list of calls")
    calls = []
    for number, call in enumerate(value, 1):
        if not isinstance(call, Mapping) or not isinstance(call.get("Action"), str) or "Action_Input" not in call:
            raise ValueError(f"call {number} must have Action and Action_Input")
        calls.append((call["Action"].strip(), _arguments(call["Action_Input"], number)))
    return calls


def _arguments(value: Any, number: int) -> str:
    """Arguments in one canonical spelling, so that equal strings mean equal values."""
    if isinstance(value, str):
        value = _loads(value)
    if not isinstance(value, Mapping):
        raise ValueError(f"Action_Input of call {number} must be a JSON object")
    return json.dumps(_canonical(value), sort_keys=True, ensure_ascii=False, allow_nan=False)


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a JSON object repeats a key")
    return members


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is not a finite number")
    return number


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_no_repeats, parse_float=_finite, parse_constant=_refuse)


def _loads(text: str) -> Any:
    return _DECODER.decode(text.strip())


def _decode(text: str, start: int) -> tuple[Any, int]:
    return _DECODER.raw_decode(text, start)
