"""Graded answers of models, and the JSONL files they are read from."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from caop_fast.calibration.counts import Answers, FloatArray
from caop_fast.calibration.parse import parse_confidence

MAX_REPORTED_ERRORS = 5
MAX_EXAMPLES = 5  # unread answers kept per model, to be shown
EXCERPT = 120  # characters kept of each: its end, where the confidence is expected


class AnswerFileError(ValueError):
    """One or more lines of an answer file cannot be used; the message names file and line of each."""


@dataclass(frozen=True)
class Unread:
    """An answer whose confidence could not be read: its place (file:line), parse status, the end of its text."""

    where: str
    status: str
    text: str


@dataclass(frozen=True, eq=False)
class ModelAnswers:
    """The answers of one model, as an audit judges them.

    name: what the model is called in tables and plots.
    answers: whether each answer is right, and the confidence it states.
    groups: [n] hashable prompt ids (answers to one prompt share one), or None when every answer stands alone.
    statuses: how many answers had each parse status; {} when confidences were given as numbers by the caller.
    n_conflicting: answers that state several confidences which differ. n_guessed: answers whose scale was guessed.
    n_bare_percent: unread answers that `lenient` would read, such as a bare 85.
    unread: the first few answers of which no confidence could be read.
    """

    name: str
    answers: Answers
    groups: np.ndarray | None = None
    statuses: Mapping[str, int] = field(default_factory=dict)
    n_conflicting: int = 0
    n_guessed: int = 0
    n_bare_percent: int = 0
    unread: tuple[Unread, ...] = ()

    def __post_init__(self) -> None:
        if self.groups is not None:
            groups = np.fromiter(self.groups, dtype=object)  # a text dtype would cut trailing NULs
            if groups.shape != (len(self.answers),):
                raise ValueError(f"model {self.name!r}: groups must have one entry per answer, got {groups.shape}")
            object.__setattr__(self, "groups", groups)

    @property
    def correct(self) -> FloatArray:
        """[n] in [0, 1], 1 = right."""
        return self.answers.correct

    @property
    def confidence(self) -> FloatArray:
        """[n] in [0, 1], NaN = the answer states no confidence that can be read."""
        return self.answers.confidence


@dataclass(frozen=True)
class Fields:
    """Names of the fields in a line. Where several are given, the first one a line has is used."""

    response: str = "response"
    confidence: str = "confidence"
    correct: str = "correct"
    prompt_id: tuple[str, ...] = ("prompt_id", "id")
    model: tuple[str, ...] = ("arm", "model")


@dataclass
class _Rows:
    """The answers of one model while they are being read."""

    correct: list[float] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    groups: list[str | None] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    n_conflicting: int = 0
    n_guessed: int = 0
    n_bare_percent: int = 0
    unread: list[Unread] = field(default_factory=list)


def _shown(value: object) -> str:
    """A value in an error message: its JSON, at most 60 characters, ASCII."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _correct(record: Mapping[str, Any], name: str) -> float:
    if name not in record:
        raise ValueError(f"no field {name!r} (fields: {_shown(sorted(record))}); --correct-field names another")
    value = record[name]
    # bool is an int in Python, so true and false are taken as 1 and 0 here
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name!r} is {_shown(value)}; takes 0, 1, true, false or a fraction between")
    return float(value)


def _stated(value: object, name: str) -> float:
    """A confidence given as a number; null and NaN mean that none could be read."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name!r} is {_shown(value)}; takes a number in [0, 1] or null; a text is a response")
    if not 0 <= value <= 1:
        raise ValueError(f"{name!r} is {_shown(value)}; takes a number in [0, 1], or null where none could be read")
    return float(value)


def _label(record: Mapping[str, Any], names: Sequence[str]) -> str | None:
    for name in names:
        value = record.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise ValueError(f"{name!r} is {_shown(value)}; takes a text that is not empty, or a whole number")
        return str(value)
    return None


def _add(record: Mapping[str, Any], rows: _Rows, fields: Fields, lenient: bool, where: str) -> None:
    text, bare_percent = "", False
    correct = _correct(record, fields.correct)
    if fields.confidence in record:
        confidence = _stated(record[fields.confidence], fields.confidence)
        status, conflicting, guessed = ("missing" if math.isnan(confidence) else "ok"), False, False
    elif fields.response in record:
        response = record[fields.response]
        if not isinstance(response, str):
            raise ValueError(f"{fields.response!r} is {_shown(response)}; takes a text")
        text = response[-EXCERPT:]
        parsed = parse_confidence(response, lenient=lenient)
        confidence = math.nan if parsed.value is None else parsed.value
        status, conflicting, guessed = parsed.status, bool(parsed.conflicting), bool(parsed.guessed_scale)
        bare_percent = status == "out_of_range" and parse_confidence(response, lenient=True).status == "ok"
    else:
        raise ValueError(
            f"neither {fields.confidence!r} nor {fields.response!r} (fields: {_shown(sorted(record))}); "
            "--confidence-field and --response-field name others"
        )
    group = _label(record, fields.prompt_id)
    rows.correct.append(correct)
    rows.confidence.append(confidence)
    rows.groups.append(group)
    rows.statuses[status] += 1
    rows.n_conflicting += conflicting
    rows.n_guessed += guessed
    rows.n_bare_percent += bare_percent
    if math.isnan(confidence) and len(rows.unread) < MAX_EXAMPLES:
        rows.unread.append(Unread(where, status, text))


def read_lines(
    lines: Iterable[bytes], source: str, fields: Fields, *, lenient: bool = False
) -> dict[str | None, ModelAnswers]:
    """Read JSON lines (bytes, UTF-8) into one `ModelAnswers` per model; the key None holds lines that name no model.

    Blank lines are skipped. Every other line must be usable: AnswerFileError names the first five that are not,
    as `source:line: what it got; what it takes`. Either all lines of a model carry a prompt id or none does.
    """
    found: dict[str | None, _Rows] = {}
    errors: list[str] = []
    n_errors = 0
    for number, raw in enumerate(lines, start=1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if not line:
                continue
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"the line is {_shown(record)}; takes a JSON object")
            model = _label(record, fields.model)
            _add(record, found.setdefault(model, _Rows()), fields, lenient, f"{source}:{number}")
        except RecursionError:
            n_errors, message = n_errors + 1, "not valid JSON: nested too deeply"
        except UnicodeDecodeError as error:
            n_errors, message = n_errors + 1, f"not UTF-8: {error.reason} at byte {error.start}"
        except json.JSONDecodeError as error:
            n_errors, message = n_errors + 1, f"not valid JSON: {error.msg} at column {error.colno}"
        except ValueError as error:
            n_errors, message = n_errors + 1, str(error)
        else:
            continue
        if len(errors) < MAX_REPORTED_ERRORS:
            errors.append(f"{source}:{number}: {message}")
    if n_errors > len(errors):
        errors.append(f"... and {n_errors - len(errors)} more lines of {source} that cannot be used")
    if errors:
        raise AnswerFileError("\n".join(errors))
    if not found:
        raise AnswerFileError(f"{source}: holds no answers")
    if None in found and len(found) > 1:
        others = ", ".join(_shown(name) for name in found if name is not None)
        raise AnswerFileError(f"{source}: some lines name a model ({others}) and {len(found[None].correct)} do not")
    return {name: _model(name, rows, source) for name, rows in found.items()}


def _model(name: str | None, rows: _Rows, source: str) -> ModelAnswers:
    without = sum(group is None for group in rows.groups)
    if 0 < without < len(rows.groups):
        raise AnswerFileError(
            f"{source}: {without} of {len(rows.groups)} lines have no prompt id; "
            "give every line one (answers to the same prompt share it) or none"
        )
    return ModelAnswers(
        name=name or Path(source).stem,
        answers=Answers(rows.correct, rows.confidence),
        groups=None if without else np.array(rows.groups, dtype=object),
        statuses=dict(rows.statuses),
        n_conflicting=rows.n_conflicting,
        n_guessed=rows.n_guessed,
        n_bare_percent=rows.n_bare_percent,
        unread=tuple(rows.unread),
    )


def _distinct_names(paths: Sequence[str]) -> list[str]:
    """The shortest endings of the paths (without the suffix) that tell them apart: before, after; or a/eval, b/eval."""
    parts = [(*Path(path).parts[:-1], Path(path).stem) for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def read_answers(
    paths: Sequence[str], fields: Fields | None = None, *, lenient: bool = False, stdin: BinaryIO | None = None
) -> list[ModelAnswers]:
    """Read JSONL files, one answer per line, into the answers of each model, in the order of their first line.

    One file: a model per value of the model field, or one model named after the file. Several files: a model per file,
    named after the file; a file that holds several models gives `file/model` each. `-` reads `stdin`.

    Raises AnswerFileError for a line that cannot be used, ValueError for a file given twice, OSError for a file that
    cannot be opened.
    """
    fields = fields or Fields()
    if not paths:
        raise ValueError("no answer files given")
    if len(set(map(str, paths))) != len(paths):
        raise ValueError(f"a file is given twice: {', '.join(map(str, paths))}")
    models: list[ModelAnswers] = []
    for path, file_name in zip(paths, _distinct_names(list(map(str, paths))), strict=True):
        if str(path) == "-":
            if stdin is None:
                raise ValueError("'-' was given but there is no standard input")
            found = read_lines(stdin, "stdin", fields, lenient=lenient)
            file_name = "stdin"
        else:
            with open(path, "rb") as file:
                found = read_lines(file, str(path), fields, lenient=lenient)
        for label, model in found.items():
            if len(found) > 1 and len(paths) > 1:
                name = f"{file_name}/{label}"
            elif len(paths) > 1 or label is None:
                name = file_name
            else:
                name = label
            models.append(replace(model, name=name))
    return models
