"""Reading JSONL answers: every line is used or named in an error, models and ids end up where they belong."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from caop_fast.calibration.answers import AnswerFileError, Fields, ModelAnswers, read_answers, read_lines
from helpers.audits import answered


def lines(*records: object) -> list[bytes]:
    return [(r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in records]


def read(*records: object, **options: object) -> dict[str | None, ModelAnswers]:
    return read_lines(lines(*records), "x.jsonl", Fields(), **options)


def test_responses_are_parsed_and_statuses_counted() -> None:
    model = read(
        {"response": "Paris. Confidence: 85%", "correct": 1},
        {"response": "Paris, overconfidence: 0.3", "correct": False},
        {"response": "Confidence: high", "correct": 0},
        {"response": "Confidence: 1.5", "correct": True},
        {"response": "Confidence: 0.2 no, Confidence: 0.4", "correct": 0.5},
    )[None]
    np.testing.assert_array_equal(model.confidence, [0.85, np.nan, np.nan, np.nan, 0.4])
    np.testing.assert_array_equal(model.correct, [1, 0, 0, 1, 0.5])
    assert model.statuses == {"ok": 2, "missing": 1, "no_number": 1, "out_of_range": 1}
    assert model.n_conflicting == 1
    assert model.groups is None
    assert [(u.where, u.status) for u in model.unread] == [
        ("x.jsonl:2", "missing"),
        ("x.jsonl:3", "no_number"),
        ("x.jsonl:4", "out_of_range"),
    ]


def test_numbers_null_and_nan_and_precedence_over_the_response() -> None:
    model = read(
        {"confidence": 1, "correct": 1},
        {"confidence": None, "response": "Confidence: 0.9", "correct": 1},
        b'{"confidence": NaN, "correct": 1}',
        {"confidence": 0.25, "response": "Confidence: 0.9", "correct": 1},
    )[None]
    np.testing.assert_array_equal(model.confidence, [1, np.nan, np.nan, 0.25])
    assert model.statuses == {"ok": 2, "missing": 2}


def test_lenient_guesses_are_counted() -> None:
    records = [{"response": "Confidence: 85", "correct": 1}, {"response": "Confidence: 85%", "correct": 1}]
    assert math.isnan(read(*records)[None].confidence[0])
    model = read(*records, lenient=True)[None]
    np.testing.assert_array_equal(model.confidence, [0.85, 0.85])
    assert model.n_guessed == 1


def test_counts_what_lenient_would_read() -> None:
    texts = ["85", "11", "10", "1.5", "-3", "120", "high", "85%"]
    records = [{"response": f"Confidence: {text}", "correct": 1} for text in texts]
    model = read(*records)[None]
    assert (model.n_bare_percent, model.statuses["out_of_range"]) == (2, 6)
    assert read(*records, lenient=True)[None].n_bare_percent == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{not json", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'["a"]', "takes a JSON object"),
        (b"\xff\xfe{}", "not UTF-8"),
        ({"confidence": 0.5}, "no field 'correct'"),
        ({"confidence": 0.5, "correct": "yes"}, "'correct' is \"yes\""),
        ({"confidence": 0.5, "correct": None}, "'correct' is null"),
        ({"confidence": 0.5, "correct": 2}, "'correct' is 2"),
        (b'{"confidence": 0.5, "correct": NaN}', "'correct' is NaN"),
        ({"confidence": 85, "correct": 1}, "'confidence' is 85; takes a number in [0, 1]"),
        ({"confidence": "0.5", "correct": 1}, "'confidence' is \"0.5\""),
        ({"confidence": True, "correct": 1}, "'confidence' is true"),
        (b'{"confidence": Infinity, "correct": 1}', "'confidence' is Infinity"),
        ({"correct": 1, "text": "x"}, "neither 'confidence' nor 'response' (fields: [\"correct\", \"text\"])"),
        ({"correct": 1, "response": None}, "'response' is null"),
        ({"confidence": 0.5, "correct": 1, "id": 1.5}, "'id' is 1.5"),
        ({"confidence": 0.5, "correct": 1, "arm": ""}, "'arm' is \"\""),
    ],
)
def test_a_bad_line_is_an_error_that_names_it(line: object, message: str) -> None:
    good = {"confidence": 0.5, "correct": 1}
    with pytest.raises(AnswerFileError) as caught:
        read(good, b"", line, good)
    assert str(caught.value).startswith("x.jsonl:3: ")
    assert message in str(caught.value)


def test_many_bad_lines_are_counted() -> None:
    with pytest.raises(AnswerFileError) as caught:
        read(*[{"correct": 1}] * 12)
    text = str(caught.value)
    assert [f"x.jsonl:{i}:" in text for i in range(1, 8)] == [True] * 5 + [False] * 2
    assert "7 more lines" in text


@pytest.mark.parametrize("content", [(), (b"", b"   ")])
def test_no_answers_is_an_error(content: tuple[bytes, ...]) -> None:
    with pytest.raises(AnswerFileError, match="holds no answers"):
        read(*content)


def test_byte_order_mark_and_blank_lines() -> None:
    model = read(b'\xef\xbb\xbf{"confidence": 0.5, "correct": 1}', b"", b'{"confidence": 0.7, "correct": 0}')[None]
    np.testing.assert_array_equal(model.confidence, [0.5, 0.7])


def test_prompt_id_before_id_and_all_or_none() -> None:
    a = {"confidence": 0.5, "correct": 1}
    model = read({**a, "id": "r1", "prompt_id": 7}, {**a, "id": "r2", "prompt_id": "7"})[None]
    assert model.groups.tolist() == ["7", "7"]
    with pytest.raises(AnswerFileError, match="1 of 2 lines have no prompt id"):
        read({**a, "id": 1}, a)


def test_ids_that_differ_only_in_a_trailing_nul_stay_apart() -> None:
    model = read({"confidence": 0.5, "correct": 1, "id": "a"}, {"confidence": 0.5, "correct": 1, "id": "a\0"})[None]
    assert len(set(model.groups)) == 2


def test_arms_in_one_file_and_a_line_without_one() -> None:
    a = {"confidence": 0.5, "correct": 1}
    assert {
        name: len(model.correct)
        for name, model in read({**a, "arm": "x"}, {**a, "model": "y"}, {**a, "arm": "x"}).items()
    } == {
        "x": 2,
        "y": 1,
    }
    with pytest.raises(AnswerFileError, match="and 1 do not"):
        read({**a, "arm": "x"}, a)


def test_names_of_arms_from_files(tmp_path) -> None:
    a = {"confidence": 0.5, "correct": 1}

    def write(name: str, *records: object) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"".join(lines(*records)))
        return str(path)

    one = write("a/eval.jsonl", a)
    two = write("b/eval.jsonl", {**a, "model": "m"})
    three = write("many.jsonl", {**a, "arm": "x"}, {**a, "arm": "y"})

    def names(*paths: str) -> list[str]:
        return [model.name for model in read_answers(paths)]

    assert names(one) == ["eval"]
    assert names(two) == ["m"]
    assert names(one, two) == ["a/eval", "b/eval"]
    assert names(three, one) == ["many/x", "many/y", "eval"]
    with pytest.raises(ValueError, match="given twice"):
        read_answers([one, one])


@pytest.mark.parametrize(
    ("correct", "confidence", "groups", "message"),
    [
        ([1], [0.5, 0.5], None, "correct and confidence must be of one length, got 1 and 2"),
        ([2], [0.5], None, "correct must lie in"),
        ([1], [1.5], None, "confidence must lie in"),
        ([math.nan], [0.5], None, "correct must lie in"),
        ([1, 0], [0.5, 0.5], ["a"], "model 'a': groups must have one entry per answer"),
    ],
)
def test_what_cannot_be_judged_is_refused(correct, confidence, groups, message) -> None:
    with pytest.raises(ValueError, match=message):
        answered("a", np.array(correct), np.array(confidence), groups)
