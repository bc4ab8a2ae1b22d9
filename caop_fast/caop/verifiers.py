"""Verifiers: is an answer right? The same verifier is used in training, evaluation and audit.

A verifier sees the response alone, never the prompt, so a prompt that quotes an answer cannot pass for one. Whatever a
model writes gives a `Verdict`; only a broken *row* (no reference answer) raises.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from caop_fast.caop.statement import answer_text

__all__ = [
    "MultipleChoice",
    "OneOf",
    "Verdict",
    "Verifier",
    "answer_text",
    "normalise_text",
    "success_rates",
]


@dataclass(frozen=True)
class Verdict:
    """The result of a verifier.

    Attributes:
        correct: from 0 (wrong) to 1 (right); fractions are partial credit.
        parsed: the answer as the verifier read it, None where it found none.
        reason: why, in a few words for the log.
    """

    correct: float
    parsed: object | None
    reason: str

    def __post_init__(self) -> None:
        if not 0.0 <= self.correct <= 1.0:  # also false for NaN
            raise ValueError(f"correct must be a number in [0, 1], got {self.correct!r}")
        object.__setattr__(self, "correct", float(self.correct))


@runtime_checkable
class Verifier(Protocol):
    """Judges one response against its row."""

    def __call__(self, response: str, row: Mapping[str, Any]) -> Verdict: ...


def success_rates(verdicts: Iterable[Verdict], prompt_ids: Iterable[Hashable]) -> dict[Hashable, float]:
    """P_acc of every prompt: the mean of the verifier's `correct` over the rollouts of that prompt.

    Groups are formed by prompt id, not by position, so they may be unequal in size, interleaved, or gathered from
    several processes in any order.

    Args:
        verdicts: one per rollout.
        prompt_ids: one per rollout: which prompt it answers.

    Returns:
        {prompt id: mean in [0, 1]}, in the order in which the ids first appear.

    Raises:
        ValueError: the two differ in length.
    """
    grouped: dict[Hashable, list[float]] = {}
    verdicts, prompt_ids = list(verdicts), list(prompt_ids)
    if len(verdicts) != len(prompt_ids):
        raise ValueError(f"prompt_ids must have one entry per verdict: got {len(prompt_ids)} for {len(verdicts)}")
    for verdict, prompt in zip(verdicts, prompt_ids, strict=True):
        grouped.setdefault(prompt, []).append(verdict.correct)
    # fsum: the mean does not depend on the order in which rollouts were gathered.
    return {prompt: math.fsum(values) / len(values) for prompt, values in grouped.items()}


def normalise_text(text: str) -> str:
    """Compatibility-normalised (NFKC), case folded, runs of white space as one space, ends trimmed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


@dataclass(frozen=True)
class OneOf:
    """Right when the answer equals one of ``row[key]`` after normalisation.

    Args:
        key: the row's field with the acceptable answers: a string, or a non-empty sequence of strings.
        extract: takes the answer out of the response; the default drops the confidence statement and nothing else.
        normalise: applied to both sides before they are compared.
    """

    key: str = "answer"
    extract: Callable[[str], str] = answer_text
    normalise: Callable[[str], str] = normalise_text

    def __call__(self, response: str, row: Mapping[str, Any]) -> Verdict:
        accepted = reference_answer(row, self.key)
        accepted = [accepted] if isinstance(accepted, str) else accepted
        if not isinstance(accepted, Sequence) or not accepted or not all(isinstance(a, str) for a in accepted):
            raise ValueError(
                f"row[{self.key!r}] must be a string or a non-empty sequence of strings, got {accepted!r}{of_row(row)}"
            )
        answer = self.normalise(self.extract(response))
        if not answer:
            return Verdict(0.0, None, "no answer")
        if any(answer == self.normalise(a) for a in accepted):
            return Verdict(1.0, answer, "matches")
        return Verdict(0.0, answer, "differs from every accepted answer")


_TAG = re.compile(r"<\s{0,4}(/?)\s{0,4}answer\s{0,4}>", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\s{0,4}\{((?:[^{}]|\{[^{}]{0,40}\}){0,80})\}")
# Up to the end of the line: what follows decides whether "Answer: A ..." names option A or begins with an article.
_PHRASE = re.compile(
    r"\b(?:answer|choice|option)(?:\s{1,4}is)?[*_`]{0,3}[ \t]{0,4}(?:[:=：]|(?<=is))[*_`]{0,3}"
    r"\s{0,4}(?=([^\n]{1,120}))",
    re.IGNORECASE,
)
_BETWEEN = r"[)\]*_`.]{0,3}\s{0,4}(?:\bor\b|\band\b|[,/&|]|(?<=\n))\s{0,4}"
_WRAP = " \t\r\n*_`$\"'"
_TEXT_MACRO = re.compile(r"\\(?:text|mathrm|mathbf|textbf|rm)\s?\{([^{}]{0,40})\}")


@dataclass(frozen=True)
class MultipleChoice:
    """Right when the letter of the chosen option equals ``row[key]``.

    The letter is looked for in this order, and the first place that exists decides: the last ``<answer>`` element, the
    last ``\\boxed{}``, the last phrase such as "Answer: B" or "the answer is (B)", a response that is a letter and
    nothing else. Within that place two different letters ("A or B") are ambiguous, which is wrong.

    Args:
        key: the row's field with the right letter.
        letters: every letter that names an option.
    """

    key: str = "answer"
    letters: str = "ABCDEFGHIJ"

    def __call__(self, response: str, row: Mapping[str, Any]) -> Verdict:
        reference = reference_answer(row, self.key)
        if not (
            isinstance(reference, str) and len(reference.strip()) == 1 and reference.strip().upper() in self.letters
        ):
            raise ValueError(f"row[{self.key!r}] must be one of {self.letters!r}, got {reference!r}{of_row(row)}")
        right = reference.strip().upper()
        text = answer_text(response)
        for place, contents in (
            ("<answer> tag", _answer_elements(text)),
            ("\\boxed", [m.group(1) for m in _BOXED.finditer(text)]),
            ("answer phrase", [m.group(1) for m in _PHRASE.finditer(text)][-64:]),
            ("whole response", [text]),
        ):
            for content in reversed(contents):
                found = self._letters_in(content)
                if len(found) > 1:
                    return Verdict(0.0, None, f"ambiguous: {' and '.join(found)} in {place}")
                if found:
                    matches = found[0] == right
                    return Verdict(
                        float(matches), found[0], f"{'matches' if matches else 'differs'}, read from {place}"
                    )
                if place != "answer phrase":  # prose says "the answer is clear" too; a tag or a box is meant
                    return Verdict(0.0, None, f"no option letter in {place}")
        raise AssertionError("the last place always decides")

    def _letters_in(self, content: str) -> list[str]:
        """The distinct option letters that `content` names, in order; empty when it names none."""
        text = _TEXT_MACRO.sub(r"\1", _BOXED.sub(r"\1", content[:400])).strip(_WRAP)
        text = re.sub(r"^(?:option|choice|answer)\b[\s:]*", "", text, flags=re.IGNORECASE).strip(_WRAP)
        letter = f"[{re.escape(self.letters)}{re.escape(self.letters.lower())}]"
        head = re.match(rf"[(\[]?({letter})[)\]]?(?![\w'’])", text)
        if head is None:
            return []
        found, end = [head.group(1).upper()], head.end()
        following = re.compile(
            rf"{_BETWEEN}[(\[*_`]{{0,3}}({letter})[)\]]?(?=[*_`]{{0,3}}(?:\s*$|[ \t]*\n|[.]|{_BETWEEN}))"
        )
        while more := following.match(text, end):
            found.append(more.group(1).upper())
            end = more.end()
        found = list(dict.fromkeys(found))
        # "A molecule ..." begins with an article; "A", "A.", "A: text", "A because ..." name an option.
        tail = text[end:].strip(_WRAP)
        is_prose = bool(re.match(r"[^\W\d_]", tail)) and not re.match(r"(?:because|since|as|given)\b", tail)
        bracketed = head.group(0) != head.group(1)
        if is_prose and not bracketed and len(found) == 1 and (head.group(1) in "AI" or head.group(1).islower()):
            return []
        return found


def _answer_elements(text: str) -> list[str]:
    """Contents of the closed ``<answer>`` elements; without one, what follows a last opening tag never closed."""
    contents, opened = [], None
    for tag in _TAG.finditer(text):
        if not tag.group(1):
            opened = tag.end()
        elif opened is not None:
            contents.append(text[opened : tag.start()])
            opened = None
    if not contents and opened is not None:
        contents.append(text[opened:])
    return contents


def reference_answer(row: Mapping[str, Any], key: str) -> Any:
    """``row[key]``; a ValueError that names the row where it is missing."""
    if key not in row:
        raise ValueError(
            f"row must have the field {key!r} with the reference answer, got {sorted(map(str, row))}{of_row(row)}"
        )
    return row[key]


def of_row(row: Mapping[str, Any]) -> str:
    """The end of an error message: which row it speaks of, where the row has an id."""
    return f" in row {row['id']!r}" if "id" in row else ""
