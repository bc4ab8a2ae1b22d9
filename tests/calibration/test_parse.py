"""What a text states, form by form; every row is a trap that some parser fell into."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from caop_fast.calibration import parse_confidence, replace_confidence
from caop_fast.calibration.parse import STATUSES

# text, value, the characters of the span, form
READ = [
    ("Confidence: 0.85", 0.85, "0.85", "decimal"),
    ("Confidence (0-100): 85%", 0.85, "85%", "percent"),
    ("Confidence (from 0 to 1.0): 0.85", 0.85, "0.85", "decimal"),
    ("Confidence (1-10): 8/10", 0.8, "8/10", "fraction"),
    ("CONFIDENCE: 0.85", 0.85, "0.85", "decimal"),
    ("confidence:0.85", 0.85, "0.85", "decimal"),
    ("confidence=0.85;", 0.85, "0.85", "decimal"),
    ("--confidence=0.85", 0.85, "0.85", "decimal"),
    ("result.confidence = 0.85", 0.85, "0.85", "decimal"),
    ("Confidence := 0.85", 0.85, "0.85", "decimal"),
    ("**Confidence:** 0.85", 0.85, "0.85", "decimal"),
    ("**Confidence**: `0.85`", 0.85, "0.85", "decimal"),
    ("**Confidence**:** 0.85**", 0.85, "0.85", "decimal"),
    ("_Confidence_ = .85", 0.85, ".85", "decimal"),
    ("__Confidence__: 0.85", 0.85, "0.85", "decimal"),
    ("_Confidence: 0.85_", 0.85, "0.85", "decimal"),
    ("***Confidence***: 0.85", 0.85, "0.85", "decimal"),
    ("## Confidence: 0.85", 0.85, "0.85", "decimal"),
    ("- Confidence: 0.85", 0.85, "0.85", "decimal"),
    ("-Confidence: 0.85", 0.85, "0.85", "decimal"),
    ("<b>Confidence:</b> <b>0.85</b>", 0.85, "0.85", "decimal"),
    ("(confidence: 0.85)", 0.85, "0.85", "decimal"),
    ("[Confidence]: 0.85", 0.85, "0.85", "decimal"),
    ("Confidence (0-1): 0.85", 0.85, "0.85", "decimal"),
    ("Confidence\uff1a0.85", 0.85, "0.85", "decimal"),
    ("Confidence\uff1d 0.85", 0.85, "0.85", "decimal"),
    ("Confidence level: 85%", 0.85, "85%", "percent"),
    ("**Confidence** level: 85%", 0.85, "85%", "percent"),
    ("Confidence score = 0,85", 0.85, "0,85", "decimal"),
    ("confidence_score: 0.85", 0.85, "0.85", "decimal"),
    ("confidence-level: 0.85", 0.85, "0.85", "decimal"),
    ("over confidence: 0.85", 0.85, "0.85", "decimal"),
    ("Confidence:\n0.85", 0.85, "0.85", "decimal"),
    ("**Confidence:**\n\n85%", 0.85, "85%", "percent"),
    ("Confidence:\n- 0.85", 0.85, "0.85", "decimal"),
    ("Confidence:\n1.", 1.0, "1", "decimal"),
    ("Confidence:\u200b\u00a00.85", 0.85, "0.85", "decimal"),
    ("answer\\nConfidence: 0.85\\n", 0.85, "0.85", "decimal"),
    # numbers
    ("Confidence: 0", 0.0, "0", "decimal"),
    ("Confidence: 1", 1.0, "1", "decimal"),
    ("Confidence: 1.", 1.0, "1", "decimal"),
    ("Confidence: 0.9.", 0.9, "0.9", "decimal"),
    ("Confidence: 0.9...", 0.9, "0.9", "decimal"),
    ("Confidence: 0.85\u3002", 0.85, "0.85", "decimal"),
    ("Confidence: 0.85, because", 0.85, "0.85", "decimal"),
    ("Confidence: +0.85", 0.85, "+0.85", "decimal"),
    ("Confidence: -0.0", 0.0, "-0.0", "decimal"),
    ("Confidence: 1e-2", 0.01, "1e-2", "decimal"),
    ("Confidence: 8.5E-1", 0.85, "8.5E-1", "decimal"),
    ("Confidence: 1e\u22122", 0.01, "1e\u22122", "decimal"),
    ("Confidence: 1e-400", 0.0, "1e-400", "decimal"),
    ("Confidence: \u0660\u066b\u0668\u0665", 0.85, "\u0660\u066b\u0668\u0665", "decimal"),
    ("Confidence: \uff10\uff0e\uff18\uff15", 0.85, "\uff10\uff0e\uff18\uff15", "decimal"),
    ("Confidence: \u0966.\u096e", 0.8, "\u0966.\u096e", "decimal"),
    ("Confidence: 0.85 (high)", 0.85, "0.85", "decimal"),
    ("Confidence: 0.8 (0.7-0.9)", 0.8, "0.8", "decimal"),
    ("Confidence: 0.85 - high", 0.85, "0.85", "decimal"),
    ("Confidence: 0.9 / Answer: B", 0.9, "0.9", "decimal"),
    ("Confidence: 0.9. 2. The next", 0.9, "0.9", "decimal"),
    ("Confidence: 0.9\n2. The next", 0.9, "0.9", "decimal"),
    ("Confidence: about 0.8", 0.8, "0.8", "decimal"),
    ("Confidence: ~80%", 0.8, "80%", "percent"),
    ("Confidence: approx. **0.8**", 0.8, "0.8", "decimal"),
    ("Confidence: <0.9>", 0.9, "0.9", "decimal"),
    ("Confidence: [0.9]", 0.9, "0.9", "decimal"),
    ('Confidence: "0.9"', 0.9, "0.9", "decimal"),
    (r"Confidence: \boxed{0.85}", 0.85, "0.85", "decimal"),
    (r"Confidence: $\boxed{0.85}$.", 0.85, "0.85", "decimal"),
    (r"Confidence: $\boxed{85\%}$", 0.85, r"85\%", "percent"),
    # units
    ("Confidence: 85%", 0.85, "85%", "percent"),
    ("confidence: 85 %", 0.85, "85 %", "percent"),
    ("Confidence: 85.%", 0.85, "85.%", "percent"),
    ("Confidence: 0.5%", 0.005, "0.5%", "percent"),
    ("Confidence: 1%", 0.01, "1%", "percent"),
    ("Confidence: 100%!", 1.0, "100%", "percent"),
    ("Confidence: 57%", 0.57, "57%", "percent"),
    ("Confidence: 85\uff05", 0.85, "85\uff05", "percent"),
    ("Confidence: 85 percent sure", 0.85, "85 percent", "percent"),
    ("Confidence: **1**%", 0.01, "1**%", "percent"),
    ("Confidence: 850\u2030", 0.85, "850\u2030", "permille"),
    ("Confidence: 8/10", 0.8, "8/10", "fraction"),
    ("Confidence: 8 / 10.", 0.8, "8 / 10", "fraction"),
    ("Confidence: 1/3", 1 / 3, "1/3", "fraction"),
    ("Confidence: 10/10", 1.0, "10/10", "fraction"),
    ("Confidence: 0.85/1.00", 0.85, "0.85/1.00", "fraction"),
    ("Confidence: **8**/10", 0.8, "8**/10", "fraction"),
    ("Confidence: 8 out of 10", 0.8, "8 out of 10", "fraction"),
    # tags and keys
    ("<confidence>0.85</confidence>", 0.85, "0.85", "decimal"),
    ("<Confidence>\n  85%\n</Confidence>", 0.85, "85%", "percent"),
    ("<confidence scale=\"0-1\" x='2'>0.85</confidence>", 0.85, "0.85", "decimal"),
    ("< confidence >.5", 0.5, ".5", "decimal"),
    ("<confidence>0.85", 0.85, "0.85", "decimal"),
    ("<confidence_level>0.4", 0.4, "0.4", "decimal"),
    ('{"confidence": 0.85}', 0.85, "0.85", "decimal"),
    ('{"answer": "B", "confidence" : "0.85", "n": 3}', 0.85, "0.85", "decimal"),
    ('{"confidence":"85%"}', 0.85, "85%", "percent"),
    ("{'confidence': '0.85'}", 0.85, "0.85", "decimal"),
    ('{"confidence_score":\n0.85\n}', 0.85, "0.85", "decimal"),
    (r"{\"confidence\": 0.85}", 0.85, "0.85", "decimal"),
]

# text, status, the characters of the span
UNREAD = [
    ("", "missing", None),
    ("0.85", "missing", None),
    ("confidence 0.85", "missing", None),
    ("Confidence is 0.85", "missing", None),
    ("I am 90% confident: 0.9", "missing", None),
    ("Overconfidence: 0.3", "missing", None),
    ("self-confidence: 0.3", "missing", None),
    ("model_confidence: 0.3", "missing", None),
    ("confidences: 0.3", "missing", None),
    ("confidence interval: [0.1, 0.2]", "missing", None),
    ("conf\u0131dence: 0.3", "missing", None),
    ("</confidence>: 0.3", "missing", None),
    ('<confidence value="0.9"/>0.3', "missing", None),
    ("Confidence\n0.85", "missing", None),
    ("Confidence:", "no_number", None),
    ("Confidence: \n", "no_number", None),
    ("Confidence: high", "no_number", None),
    ("Confidence: High (0.9)", "no_number", None),
    ("Confidence: N/A", "no_number", None),
    ("Confidence: information", "no_number", None),
    ("Confidence:\n1. Paris", "no_number", None),
    ("Confidence:\n\n1) Paris", "no_number", None),
    ('{"confidence": null}', "no_number", None),
    ("<confidence></confidence> 0.3", "no_number", None),
    ("Confidence: 0.8-0.9", "range", "0.8-0.9"),
    ("Confidence: 0.8\u20130.9", "range", "0.8\u20130.9"),
    ("Confidence: 0.8 to 0.9", "range", "0.8 to 0.9"),
    ("Confidence: 80%-90%", "range", "80%-90%"),
    ("Confidence: 80-90%", "range", "80-90%"),
    ("Confidence: **0.8**-**0.9**", "range", "0.8**-**0.9"),
    ("Confidence: [0.8, 0.9]", "range", "0.8, 0.9"),
    ("Confidence: [0.8,0.9]", "range", "0.8,0.9"),
    ("Confidence: 0.8...0.9", "range", "0.8...0.9"),
    ("Confidence: 0.8 \u00b1 0.1", "range", "0.8 \u00b1 0.1"),
    ("Confidence: 0.8 +/- 0.1", "range", "0.8 +/- 0.1"),
    ("Confidence: > 0.9", "range", "> 0.9"),
    ("Confidence: at least 90%", "range", "at least 90%"),
    ("Confidence: between 0.8 and 0.9", "range", "between 0.8 and 0.9"),
    ("Confidence: 0.8.5", "malformed", "0.8.5"),
    ("Confidence: 0..8", "malformed", "0..8"),
    ("Confidence: 0. 85", "malformed", "0. 85"),
    ("Confidence: 0.8 0.9", "malformed", "0.8 0.9"),
    ("Confidence: 1 000", "malformed", "1 000"),
    ("Confidence: 1,000", "malformed", "1,000"),
    ("Confidence: 1,000%", "malformed", "1,000%"),
    ("Confidence: 1_000", "malformed", "1_000"),
    ("Confidence: 1/3/5", "malformed", "1/3/5"),
    ("Confidence: 1/ten", "malformed", "1/ten"),
    ("Confidence: 8/10%", "malformed", "8/10%"),
    ("Confidence: 50/50", "malformed", "50/50"),
    ("Confidence: 1 in 3", "malformed", "1 in 3"),
    ("Confidence: 1:3", "malformed", "1:3"),
    ("Confidence: 1 out of ten", "malformed", "1"),
    ("Confidence: 1 / ten", "malformed", "1"),
    ("Confidence: 1 in ten", "malformed", "1"),
    ("Confidence: 1 (out of 10)", "malformed", "1"),
    ("Confidence: 1 on a scale of 1-10", "malformed", "1"),
    ("Confidence: 1 (/10)", "malformed", "1"),
    ("Confidence (1-10): 1", "malformed", "1"),
    ("Confidence (0-100): 1", "malformed", "1"),
    ("Confidence (%): 1", "malformed", "1"),
    ("Confidence: 1\u00d710^-2", "malformed", "1\u00d710^-2"),
    ("Confidence: 10^-2", "malformed", "10^-2"),
    ("Confidence: 0.9 * 0.5", "malformed", "0.9"),
    ("Confidence: 1st", "malformed", "1st"),
    ("Confidence: 1\u00b2", "malformed", "1\u00b2"),
    ("Confidence: 0x1", "malformed", "0x1"),
    ("Confidence: 0.8e", "malformed", "0.8e"),
    ("Confidence: - 0.3", "malformed", "- 0.3"),
    ("Confidence: --0.3", "malformed", "--0.3"),
    ("Confidence: \u00b10.3", "malformed", "\u00b10.3"),
    ("Confidence: 85", "out_of_range", "85"),
    ("Confidence: 1.5", "out_of_range", "1.5"),
    ("Confidence: 1.0001", "out_of_range", "1.0001"),
    ("Confidence: -0.3", "out_of_range", "-0.3"),
    ("Confidence: \u22120.3", "out_of_range", "\u22120.3"),
    ("Confidence: 120%", "out_of_range", "120%"),
    ("Confidence: -5%", "out_of_range", "-5%"),
    ("Confidence: 11/10", "out_of_range", "11/10"),
    ("Confidence: 1e400", "out_of_range", "1e400"),
    ("Confidence: nan", "not_finite", "nan"),
    ("Confidence: -Infinity", "not_finite", "-Infinity"),
    ("Confidence: \u221e", "not_finite", "\u221e"),
    ('{"confidence": NaN}', "not_finite", "NaN"),
    ("Confidence: 1/0", "not_finite", "1/0"),
    ("Confidence: 0/0", "not_finite", "0/0"),
]


@pytest.mark.parametrize(("text", "value", "number", "form"), READ)
def test_reads(text, value, number, form):
    parsed = parse_confidence(text)
    assert (parsed.status, parsed.form) == ("ok", form)
    assert parsed.value == value  # to the last bit: 57% is 0.57
    assert math.copysign(1, parsed.value) == 1
    assert text[slice(*parsed.span)] == number
    assert (parsed.n_statements, parsed.conflicting, parsed.guessed_scale) == (1, False, None)


@pytest.mark.parametrize(("text", "status", "number"), UNREAD)
def test_leaves_unread(text, status, number):
    parsed = parse_confidence(text)
    assert parsed.status == status
    assert parsed.value is None
    assert (parsed.span and text[slice(*parsed.span)]) == number
    assert (parsed.rule is None) == (status == "missing")


@pytest.mark.parametrize(("text", "value", "number", "form"), READ)
def test_context_does_not_change_the_reading(text, value, number, form):
    for before, after in [("The answer is 42.\n", ""), ("\u00e9\U0001f600 ", "\n\nThat is all."), ("", " \n</s>")]:
        parsed = parse_confidence(before + text + after)
        assert parsed.value == value, before + text + after
        assert (before + text + after)[slice(*parsed.span)] == number


def test_rules():
    assert parse_confidence("Confidence: 0.5").rule == "label"
    assert parse_confidence('{"confidence": 0.5}').rule == "json"
    assert parse_confidence("<confidence>0.5</confidence>").rule == "tag"


def test_last_statement_wins_even_unreadable():
    parsed = parse_confidence("Confidence: 0.4 ... Confidence: 0.8.5")
    assert (parsed.status, parsed.n_statements, parsed.conflicting) == ("malformed", 2, False)
    parsed = parse_confidence("Confidence: high\nConfidence: 0.4\n<confidence>40%</confidence>")
    assert (parsed.value, parsed.rule, parsed.n_statements, parsed.conflicting) == (0.4, "tag", 3, False)
    parsed = parse_confidence("Confidence: 0.4 Confidence: 0.5 Confidence: 0.4")
    assert (parsed.value, parsed.n_statements, parsed.conflicting) == (0.4, 3, True)
    parsed = parse_confidence("Confidence: 0.4. Mind overconfidence: 0.9")
    assert (parsed.value, parsed.n_statements) == (0.4, 1)


def test_lenient_guesses_only_percentages_and_says_so():
    assert parse_confidence("Confidence: 85", lenient=True)[:2] == (0.85, "ok")
    assert parse_confidence("Confidence: 85", lenient=True).guessed_scale == 100
    assert parse_confidence("Confidence: 100", lenient=True).value == 1.0
    for unsure in ("8", "10", "1.5", "101", "-85", "150%", "11/10", "85/1"):
        parsed = parse_confidence(f"Confidence: {unsure}", lenient=True)
        assert (parsed.status, parsed.value, parsed.guessed_scale) == ("out_of_range", None, None), unsure
    assert parse_confidence("Confidence: 0.85", lenient=True).guessed_scale is None
    with pytest.raises(TypeError):
        parse_confidence("Confidence: 0.85", True)


def test_only_str():
    for bad in (None, b"Confidence: 0.5", 0.5):
        with pytest.raises(TypeError, match="text must be a str"):
            parse_confidence(bad)
        with pytest.raises(TypeError, match="text must be a str"):
            replace_confidence(bad, "0.60")
    with pytest.raises(TypeError, match="number must be a str"):
        replace_confidence("Confidence: 0.5", 0.6)


PIECES = st.sampled_from(
    [
        *"0123456789.,:=-+%/*_`\"'<>{}[]()\\~ \n\t^x",
        *(
            "confidence",
            "Confidence:",
            "over",
            " level",
            "<confidence>",
            '"confidence":',
            "\\boxed{",
            "out of",
            "to",
            "nan",
        ),
        *(
            "1e",
            "e-",
            "\u0663",
            "\uff18",
            "\u00b2",
            "\u2212",
            "\u2013",
            "\u200b",
            "\ud800",
            "percent",
            "0.5",
            "about ",
            "<b>",
        ),
    ]
)


@settings(deadline=None)
@given(st.lists(PIECES, max_size=14).map("".join) | st.text(max_size=40))
@example("Confidence: " + "1" * 5000)
@example("Confidence: 1e" + "9" * 5000)
@example("Confidence: " + "1" * 5000 + "/" + "1" * 5000)
@example("Confidence: 1_")
def test_never_raises_and_keeps_its_promises(text):
    for lenient in (False, True):
        parsed = parse_confidence(text, lenient=lenient)
        assert parsed.status in STATUSES
        assert (parsed.value is not None) == (parsed.status == "ok")
        assert parsed.value is None or (0 <= parsed.value <= 1)
        assert (parsed.span is None) == (parsed.status in ("missing", "no_number"))
        assert (parsed.n_statements == 0) == (parsed.status == "missing")
        if parsed.span:
            start, end = parsed.span
            assert 0 <= start < end <= len(text)
            assert re.search(r"\d|nan|inf|\u221e", text[start:end], re.IGNORECASE)


@settings(deadline=None)
@given(st.floats(0, 1), st.sampled_from(["{:.17g}", "{:.2f}", "{:e}", "{!r}"]))
def test_every_written_number_reads_back(value, form):
    number = form.format(value)
    assert parse_confidence(f"x\nConfidence: {number}\n").value == float(number)


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_percent_is_correctly_rounded(millionths):
    digits = f"{millionths // 10**4}.{millionths % 10**4:04d}"
    assert parse_confidence(f"Confidence: {digits}%").value == millionths / 10**6


def test_replace():
    assert replace_confidence("A. Confidence: 85% sure", "0.60") == "A. Confidence: 0.60 sure"
    assert replace_confidence("**Confidence:** 8/10.", "0.60") == "**Confidence:** 0.60."
    assert replace_confidence('{"confidence": "85%"}', "0.60") == '{"confidence": "0.60"}'
    assert replace_confidence(r"Confidence: \boxed{0.85}", "0.60") == r"Confidence: \boxed{0.60}"
    assert replace_confidence("Confidence: 0.8-0.9", "0.60") == "Confidence: 0.60"
    assert replace_confidence("Confidence: 0.8.5!", "0.60") == "Confidence: 0.60!"
    for nothing in ("", "overconfidence: 0.3", "Confidence: high"):
        assert replace_confidence(nothing, "0.60") == nothing
    two = "Confidence: 1.00 then <confidence>90%</confidence>"
    assert replace_confidence(two, "0.60") == "Confidence: 1.00 then <confidence>0.60</confidence>"
    assert replace_confidence(two, "0.60", every=True) == "Confidence: 0.60 then <confidence>0.60</confidence>"
    # the last statement has no number: an earlier one is not touched in its place
    assert replace_confidence("Confidence: 0.4. Confidence: high", "0.60") == "Confidence: 0.4. Confidence: high"


@settings(deadline=None)
@given(st.lists(PIECES, max_size=14).map("".join))
def test_replaced_text_differs_in_the_span_only(text):
    parsed = parse_confidence(text)
    replaced = replace_confidence(text, "0.60")
    if parsed.span is None:
        assert replaced == text
    else:
        assert replaced == text[: parsed.span[0]] + "0.60" + text[parsed.span[1] :]
