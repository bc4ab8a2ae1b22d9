from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caop_fast.caop import MultipleChoice, OneOf, ToolCalls, Verdict, Verifier, answer_text, success_rates
from helpers.hang import ended_if_it_hangs

# --- answer_text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("K AE T Confidence: 0.70", "K AE T"),
        ("K AE T", "K AE T"),
        ("Confidence: 0.70 K AE T", "K AE T"),
        ("Confidence: 0.70\nThe answer is B.", "The answer is B."),
        ("first\nConfidence: 70%\nlast", "first\nlast"),
        ("K AE T Confidence:", "K AE T"),
        ("K AE T\n**Confidence:** ", "K AE T"),
        ("Confidence: high, so the answer is B", "Confidence: high, so the answer is B"),
        ("Overconfidence: 0.3 harms. So B", "Overconfidence: 0.3 harms. So B"),
        ("B\n\n**Confidence:** 0.85", "B"),
        ("**B** **Confidence: 85%**", "**B**"),
        ("- B\n- Confidence: 0.85.", "- B"),
        ("B (Confidence: 0.85) is right", "B is right"),
        ("B \\boxed{7} Confidence: $\\boxed{0.85}$", "B \\boxed{7}"),
        ("<answer>B</answer> <confidence>0.85</confidence> ok", "<answer>B</answer> ok"),
        ("<answer>B</answer><confidence>0.85", "<answer>B</answer>"),
        ('{"answer": "B", "confidence": 0.85}', '{"answer": "B"}'),
        ('{"confidence": "85%", "answer": "B"}', '{"answer": "B"}'),
        ('{"answer": {"x": {"confidence": 0.85}}}', '{"answer": {"x": {}}}'),
        ("K Confidence: 0.8 Confidence: 0.9", "K Confidence: 0.8"),
        ("", ""),
        ("Confidence: 0.9", ""),
    ],
)
def test_answer_text_drops_the_last_statement_and_nothing_else(response, answer):
    assert answer_text(response) == answer


@given(st.text(max_size=40), st.sampled_from(["Confidence: 0.85", "**Confidence:** 85%", "<confidence>1</confidence>"]))
def test_answer_text_never_loses_a_word_of_the_answer(answer, statement):
    if "confidence" in answer.lower():
        return
    kept = answer_text(f"{answer}\n{statement}")
    wanted = [c for c in answer if c.isalnum()]
    assert [c for c in kept if c.isalnum()] == wanted


# --- success_rates ---------------------------------------------------------------------------------------------------


def test_success_rate_is_the_verifiers_mean_by_prompt_id():
    groups = {"a": [1, 0, 0, 1, 1], "b": [0], "c": [1, 1, 0], 7: [0.5, 0.25]}
    flat = [(prompt, Verdict(c, None, "")) for prompt, values in groups.items() for c in values]
    for seed in range(5):  # by id, so any order of gathering gives the same
        random.Random(seed).shuffle(flat)
        rates = success_rates([v for _, v in flat], [p for p, _ in flat])
        assert rates == {"a": 3 / 5, "b": 0.0, "c": 2 / 3, 7: 0.375}


def test_success_rates_refuses_unpaired_input():
    with pytest.raises(ValueError, match="one entry per verdict"):
        success_rates([Verdict(1, None, "")], ["a", "b"])
    assert success_rates([], []) == {}


@pytest.mark.parametrize("correct", [-0.1, 1.1, float("nan")])
def test_verdict_refuses_what_is_no_score(correct):
    with pytest.raises(ValueError, match="correct"):
        Verdict(correct, None, "")


# --- OneOf -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "correct"),
    [
        ("K AE T Confidence: 0.70", 1),
        ("Confidence: 0.70 K AE T", 1),
        ("  k  ae t\n", 1),
        ("Ｋ AE T", 1),
        ("K AH T Confidence: 0.10", 1),
        ("K AE", 0),
        ("K AE T T", 0),
        ("KAET", 0),
        ("", 0),
        ("Confidence: 1.00", 0),
    ],
)
def test_one_of(response, correct):
    verdict = OneOf()(response, {"answer": ["K AE T", "K AH T"], "prompt": "K AE T"})
    assert verdict.correct == correct
    assert verdict.reason


def test_one_of_takes_another_key_and_a_single_string():
    assert OneOf("solutions")("7", {"solutions": "7"}).correct == 1


@pytest.mark.parametrize("row", [{}, {"answer": []}, {"answer": None}, {"answer": [3]}])
def test_a_row_without_reference_is_an_error_that_names_it(row):
    with pytest.raises(ValueError, match=r"answer.*row 'r17'"):
        OneOf()("B", {**row, "id": "r17"})


# --- MultipleChoice --------------------------------------------------------------------------------------------------

CHOICE = [
    ("<answer>\nB\n</answer>", "B"),
    ("<reasoning>A or C? <answer>A</answer></reasoning>\n<answer> b </answer>\nConfidence: 0.9", "B"),
    ("<answer>B: CN1CCN/C(c2)C</answer>", "B"),
    ("<answer>(B)</answer>", "B"),
    ("<answer>\\boxed{B}</answer>", "B"),
    ("<answer>\\text{B}</answer>", "B"),
    ("<answer>Option B</answer>", "B"),
    ("<ANSWER>**B.**</ANSWER>", "B"),
    ("cut off: <answer>\nB", "B"),
    ("I put it in the <answer> tag: <answer>B</answer>, as the <answer> tag wants", "B"),
    ("so \\boxed{A}, no: \\boxed{\\text{B}}", "B"),
    ("\\boxed{A} was my draft. <answer>B</answer>", "B"),
    ("Answer: B", "B"),
    ("**Answer:** B", "B"),
    ("Final answer: The correct option is B.", "B"),
    ("The answer is (B) because of A, C and D.", "B"),
    ("The answer is A because the ring opens.", "A"),
    ("Answer: A Confidence: 0.80", "A"),
    ("Answer: A\nConfidence: 0.80", "A"),
    ("Answer: B\nThe choice is clear and the answer is a matter of taste.", "B"),
    ("B", "B"),
    ("(b)", "B"),
    ("D.\nConfidence: 0.3", "D"),
    ("Answer: A or B", "ambiguous"),
    ("<answer>A, B</answer>", "ambiguous"),
    ("<answer>\nA\nB\n</answer>", "ambiguous"),
    ("<answer>A and B</answer>", "ambiguous"),
    ("\\boxed{A/B}", "ambiguous"),
    ("Answer: A molecule with two rings", None),
    ("<answer>none of them</answer> Answer: B", None),
    ("<answer></answer>", None),
    ("Because of it, I cannot say", None),
    ("", None),
    ("<answer>Z</answer>", None),
]


@pytest.mark.parametrize(("response", "letter"), CHOICE)
@pytest.mark.parametrize("reference", ["A", "B", "C"])
def test_multiple_choice(response, letter, reference):
    verdict = MultipleChoice()(response, {"answer": reference, "prompt": f"Answer: {reference}"})
    assert verdict.correct == (letter == reference)
    if letter == "ambiguous":
        assert "ambiguous" in verdict.reason
    else:
        assert verdict.parsed == letter


@pytest.mark.parametrize("answer", ["", "AB", "Z", None, 1])
def test_multiple_choice_refuses_a_broken_row(answer):
    with pytest.raises(ValueError, match="answer"):
        MultipleChoice(letters="ABCD")("B", {"answer": answer})


# --- ToolCalls -------------------------------------------------------------------------------------------------------

TOOL_ROW = {
    "prompt": "Use the tools.",
    "answer": '[{"Action": "getTide", "Action_Input": "{\\"port\\": \\"Brest\\", \\"days\\": 3}"},'
    ' {"Action": "listPorts", "Action_Input": "{}"}]',
}
TIDE = 'Action: getTide\nAction Input: {"days": 3, "port": "Brest"}\n'
PORTS = "Action: listPorts\nAction Input: {}\n"


@pytest.mark.parametrize(
    ("response", "correct"),
    [
        (f"Thought: two calls.\n{TIDE}{PORTS}", 1),
        (f"{PORTS}Observation: ok\n{TIDE}Confidence: 0.9", 1),
        (f"{TIDE}{PORTS.strip()} Confidence: 0.9", 1),
        ('**Action:** `getTide`\n**Action Input:** ```json\n{"days": 3.0, "port": "Brest"}\n```\n' + PORTS, 1),
        (TOOL_ROW["answer"], 1),
        (f"The calls are:\n```json\n{TOOL_ROW['answer']}\n```\nConfidence: 0.8", 1),
        (f"I considered [two] ways [{{}}]. {TOOL_ROW['answer']}", 1),
        (TIDE, 0),
        (f"{TIDE}{TIDE}{PORTS}", 0),
        (f"{TIDE}{PORTS}{PORTS}", 0),
        (TIDE.replace("3", '"3"') + PORTS, 0),
        (TIDE.replace("3", "true") + PORTS, 0),
        (TIDE.replace("Brest", "brest") + PORTS, 0),
        (TIDE.replace('"days": 3, ', "") + PORTS, 0),
        (TIDE.replace("{", '{"days": 4, ') + PORTS, 0),
        (TIDE.replace("}", ', "x": 1}') + PORTS, 0),
        (TIDE + PORTS.replace("{}", "[]"), 0),
        (TIDE + PORTS.replace("{}", ""), 0),
        (TIDE + PORTS.replace("{}", "{} {}"), 0),
        (TIDE + "Action: listPorts\n", 0),
        (TIDE + "Action: list ports\nAction Input: {}", 0),
        (TIDE.replace("3", "NaN") + PORTS, 0),
        (TIDE.replace("3", "1e999") + PORTS, 0),
        ("[]", 0),
        ("no call", 0),
        ("", 0),
    ],
)
def test_all_tool_calls_count(response, correct):
    verdict = ToolCalls()(response, TOOL_ROW)
    assert verdict.correct == correct, verdict.reason
    assert verdict.reason


def test_order_of_calls_counts_when_asked():
    assert ToolCalls(ordered=True)(TIDE + PORTS, TOOL_ROW).correct == 1
    verdict = ToolCalls(ordered=True)(PORTS + TIDE, TOOL_ROW)
    assert (verdict.correct, verdict.reason) == (0, "right calls in another order")


def test_an_argument_called_confidence_is_an_argument():
    row = {"answer": [{"Action": "setAlarm", "Action_Input": {"confidence": 0.5}}]}
    assert ToolCalls()('Action: setAlarm\nAction Input: {"confidence": 0.5}', row).correct == 1
    assert ToolCalls()('Action: setAlarm\nAction Input: {"confidence": 0.6}', row).correct == 0
    assert ToolCalls()("Action: setAlarm\nAction Input: {}", row).correct == 0


@pytest.mark.parametrize(
    "answer", ["", "[]", "{}", "[1]", '[{"Action": "x"}]', None, '[{"Action": "x", "Action_Input": 3}]']
)
def test_tool_calls_refuses_a_broken_row(answer):
    with pytest.raises(ValueError, match="answer"):
        ToolCalls()("x", {"answer": answer})


# --- all of them -----------------------------------------------------------------------------------------------------

VERIFIERS = [(OneOf(), {"answer": ["K AE T"]}), (MultipleChoice(), {"answer": "B"}), (ToolCalls(), TOOL_ROW)]
FRAGMENTS = st.sampled_from(
    [
        "<answer>",
        "</answer>",
        "\\boxed{",
        "}",
        "Answer:",
        "B",
        "Confidence:",
        "0.5",
        "Action:",
        "\nAction: x",
        "{",
        "[",
        '"',
        "\nAction Input:",
        "[{",
        "\\",
        "\ud800",
        "\x00",
        "1" * 5000,
        "[" * 3000,
        "NaN",
        "\u2028",
        "İ",
        "<",
        "|",
    ]
)


@pytest.mark.parametrize(("verifier", "row"), VERIFIERS)
@given(st.one_of(st.text(max_size=60), st.lists(FRAGMENTS, max_size=12).map("".join)))
def test_no_text_makes_a_verifier_raise(verifier, row, response):
    verdict = verifier(response, row)
    assert isinstance(verifier, Verifier)
    assert 0 <= verdict.correct <= 1
    assert verdict.reason


@pytest.mark.parametrize(("verifier", "row"), VERIFIERS)
@pytest.mark.parametrize(
    "piece",
    [
        "<answer>",
        "</answer>",
        "\\boxed{",
        "Answer: ",
        "answer is ",
        "Confidence: 0.5 ",
        "\nAction: x",
        "[{",
        "[ ",
        "A or ",
        "\nAction: x\nAction Input: {}",
        '\nAction: x\nAction Input: "',
        "{",
        " ",
        "*",
        "\n",
        "confidence",
        '"',
    ],
)
def test_verifiers_take_linear_time(verifier, row, piece):
    with ended_if_it_hangs():  # quadratic time does: 1e12 pairs of characters
        verifier(piece * (1_000_000 // len(piece)), row)
