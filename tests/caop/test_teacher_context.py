from __future__ import annotations

import copy

import pytest

from caop_fast.calibration.parse import parse_confidence
from caop_fast.caop import (
    DEFAULT_NOTE,
    DEFAULT_TEMPLATE,
    ConfidenceStyle,
    TeacherContext,
    ask_for_confidence,
    confidence_instruction,
    encode_prompt,
    student_messages,
)
from helpers.small_tokenizers import byte_level

DEMO = TeacherContext(template="{prompt} <example> {demonstration} {note}", note="<note> {confidence}")
CONVERSATION = [
    {"role": "system", "content": "You are a chemist."},
    {"role": "user", "content": "First question?"},
    {"role": "assistant", "content": "First answer. Confidence: 0.30"},
    {"role": "user", "content": "Second {question}?"},
    {"role": "assistant", "content": "Let me"},
]
PRIVILEGED = ("demonstration", "answer", "id", "note", "solution", "confidence", "feedback", "teacher", "rationale")


def canary(field):
    return f"CANARY-{field}-7Q"


def canary_rows():
    base = {field: canary(field) for field in PRIVILEGED}
    yield {**base, "prompt": "c a t"}
    yield {**base, "prompt": "c a t", "system": "Be brief."}
    yield {**base, "prompt": CONVERSATION}
    yield {**base, "prompt": CONVERSATION[1:], "system": "Be brief.", "answer": [canary("answer")]}


@pytest.mark.parametrize("row", list(canary_rows()))
def test_nothing_privileged_reaches_the_students_prompt(row, tokenizers):
    TeacherContext().messages(row, confidence="0.60")  # making the teacher's text first must leave no trace
    messages = student_messages(row)
    rendered = repr(messages)
    ids = encode_prompt(messages, tokenizers["digits"], max_tokens=None, row_id=row["id"])
    for text in (rendered, tokenizers["digits"].decode(ids)):
        assert "CANARY" not in text
        assert "0.60" not in text
    expected = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
    system = [{"role": "system", "content": row["system"]}] if "system" in row else []
    assert messages == system + expected


@pytest.mark.parametrize("row", list(canary_rows()))
def test_teacher_sees_the_demonstration_and_no_other_field(row):
    rendered = repr(TeacherContext().messages(row, confidence="0.60"))
    assert canary("demonstration") in rendered
    assert rendered.count("CANARY") == 1


@pytest.mark.parametrize("confidence", [None, "0.60"])
def test_only_the_last_user_turn_changes(confidence):
    row = {"prompt": CONVERSATION, "demonstration": "Ethanol. Confidence: 1.00", "id": 3}
    before = copy.deepcopy(row)
    messages = DEMO.messages(row, confidence=confidence)
    assert row == before
    assert [m for i, m in enumerate(messages) if i != 3] == [m for i, m in enumerate(CONVERSATION) if i != 3]
    stated, note = ("1.00", "") if confidence is None else ("0.60", " <note> 0.60")
    assert messages[3] == {
        "role": "user",
        "content": f"Second {{question}}? <example> Ethanol. Confidence: {stated}{note}",
    }


def test_messages_are_copies_all_the_way_down():
    row = {"prompt": [{"role": "user", "content": "hi", "meta": {"k": [1]}}], "demonstration": "x"}
    for messages in (student_messages(row), DEMO.messages(row, confidence="0.50")):
        messages[0]["meta"]["k"].append(2)
        messages[0]["content"] = "changed"
    assert row["prompt"] == [{"role": "user", "content": "hi", "meta": {"k": [1]}}]


@pytest.mark.parametrize(
    "demonstration",
    [
        "So B.\nConfidence: 1.00",
        "**Confidence:** 100%\nSo B. Confidence: 1.00",
        '{"answer": "B", "confidence": 1.0}',
        "<confidence>1</confidence> and later Confidence = 10/10.",
    ],
)
def test_no_other_confidence_is_left_beside_the_note(demonstration):
    context = TeacherContext()
    text = context.messages({"prompt": "Q", "demonstration": demonstration}, confidence="0.35")[0]["content"]
    parsed = parse_confidence(text)
    assert parsed.value == 0.35
    assert not parsed.conflicting
    assert parsed.n_statements >= 2
    for stale in ("1.00", "100%", "1.0}", ">1<", "10/10"):
        assert stale not in text
    assert "B" in text or "later" in text


def test_braces_in_any_text_are_only_text():
    nasty = "{prompt} {demonstration} {note} {0} {} {{x}} {confidence} }{ {prompt.__class__} %s \\1 \\g<0>"
    row = {"prompt": nasty, "demonstration": nasty}
    text = DEMO.messages(row, confidence="0.60")[0]["content"]
    assert text == f"{nasty} <example> {nasty} <note> 0.60"
    assert DEMO.messages(row)[0]["content"] == f"{nasty} <example> {nasty}"


def test_an_empty_note_takes_only_the_templates_white_space_along():
    context = TeacherContext(template="{prompt}\n\n{note}\n\nEnd {{note}}", note="N {confidence}")
    assert context.messages({"prompt": "Q  "})[0]["content"] == "Q  \n\nEnd {note}"
    assert context.messages({"prompt": "Q  "}, confidence="0.5")[0]["content"] == "Q  \n\nN 0.5\n\nEnd {note}"


def test_default_templates_state_the_confidence_once_understood():
    row = {"prompt": "Q?", "demonstration": "D."}
    stated = TeacherContext().messages(row, confidence="0.35")[0]["content"]
    plain = TeacherContext().messages(row)[0]["content"]
    assert stated.index("Q?") < stated.index("D.") < stated.index("0.35")
    assert "onfidence" not in plain
    assert "\n\n\n" not in plain
    assert "\n\n\n" not in stated
    assert "{" not in stated + plain
    assert "{demonstration}" in DEFAULT_TEMPLATE
    assert "{confidence}" in DEFAULT_NOTE


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"template": "{demonstration} {note}"}, "prompt"),
        ({"template": "{prompt} {promt}"}, "template"),
        ({"template": "{prompt.__class__}"}, "template"),
        ({"template": "{prompt[0]}"}, "template"),
        ({"template": "{prompt!r}"}, "template"),
        ({"template": "{prompt:>9}"}, "template"),
        ({"template": "{prompt} {"}, "template"),
        ({"template": "{prompt} {}"}, "template"),
        ({"note": "be honest"}, "note"),
        ({"note": "{confidence} {prompt}"}, "note"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_bad_templates_are_refused_at_once(kwargs, named):
    with pytest.raises(ValueError, match=named):
        TeacherContext(**kwargs)


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({}, ValueError),
        ({"prompt": 3}, TypeError),
        ({"prompt": []}, ValueError),
        ({"prompt": [{"role": "system", "content": "s"}]}, ValueError),
        ({"prompt": ["hi"]}, TypeError),
        ({"prompt": [{"role": "user"}]}, TypeError),
        ({"prompt": "hi", "system": 3}, TypeError),
        ({"prompt": CONVERSATION, "system": "another"}, ValueError),
    ],
)
def test_bad_rows_are_refused_and_named(row, error):
    with pytest.raises(error, match="row 'r9'"):
        student_messages({**row, "id": "r9"})


def test_bad_teacher_rows_are_refused():
    with pytest.raises(ValueError, match=r"demonstration.*row 4"):
        DEMO.messages({"prompt": "q", "id": 4}, confidence="0.50")
    with pytest.raises(TypeError, match="demonstration"):
        DEMO.messages({"prompt": "q", "demonstration": ["x"]})
    row = {"prompt": "q", "demonstration": "d"}
    with pytest.raises(TypeError, match="confidence"):
        DEMO.messages(row, confidence=0.5)
    for confidence in ("high", "1.5", "", "0.5 0.6"):
        with pytest.raises(ValueError, match="confidence"):
            DEMO.messages(row, confidence=confidence)
    with pytest.raises(ValueError, match="note"):
        TeacherContext(template="{prompt} {demonstration}").messages(row, confidence="0.50")
    parts = [{"role": "user", "content": [{"type": "image"}]}]
    with pytest.raises(TypeError, match="last user turn"):
        DEMO.messages({"prompt": parts, "demonstration": "d"})


# --- encode_prompt ---------------------------------------------------------------------------------------------------


def test_prompt_is_the_rendered_conversation_up_to_the_assistants_turn(tokenizers):
    tokenizer = tokenizers["grouped"]
    ids = encode_prompt(CONVERSATION[:4], tokenizer, max_tokens=None, row_id=1)
    assert isinstance(ids, list)
    assert all(type(i) is int for i in ids)
    body = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in CONVERSATION[:4])
    assert tokenizer.decode(ids) == f"{body}<|im_start|>assistant\n"


def test_an_assistant_prefix_is_continued(tokenizers):
    text = tokenizers["grouped"].decode(encode_prompt(CONVERSATION, tokenizers["grouped"], max_tokens=None, row_id=1))
    assert text.endswith("<|im_start|>assistant\nLet me")


def test_word_level_prompts_of_student_and_teacher(words):
    row = {"prompt": "c a t", "demonstration": "K AE T Confidence: 1.00", "id": "cat"}
    student = encode_prompt(student_messages(row), words, max_tokens=8, row_id="cat")
    assert words.convert_ids_to_tokens(student) == ["<bos>", "c", "a", "t", "<answer>"]
    teacher = DEMO.encode(row, words, confidence="0.60")
    expected = "<bos> c a t <example> K AE T Confidence: 0.60 <note> 0.60 <answer>"
    assert words.convert_ids_to_tokens(teacher) == expected.split()
    assert words.convert_ids_to_tokens(DEMO.encode(row, words))[-3:] == ["Confidence:", "1.00", "<answer>"]


def test_too_long_names_row_length_and_budget_and_cuts_nothing(words):
    row = {"prompt": "c a t", "demonstration": "K AE T", "id": "row-77"}
    needed = len(DEMO.encode(row, words))
    tight = TeacherContext(template=DEMO.template, note=DEMO.note, max_tokens=needed - 1)
    with pytest.raises(ValueError, match=rf"row-77.*{needed} tokens.*max_tokens={needed - 1}"):
        tight.encode(row, words)
    fits = TeacherContext(template=DEMO.template, note=DEMO.note, max_tokens=needed)
    assert len(fits.encode(row, words)) == needed
    # The teacher's budget is its own: the student's smaller one still holds for the student's prompt.
    assert len(encode_prompt(student_messages(row), words, max_tokens=5, row_id="row-77")) == 5
    with pytest.raises(ValueError, match="max_tokens=4"):
        encode_prompt(student_messages(row), words, max_tokens=4, row_id="row-77")


def test_a_tokenizers_own_length_limit_cuts_nothing():
    tokenizer = byte_level(digits_alone=True)
    tokenizer.model_max_length = 4
    ids = encode_prompt(CONVERSATION[:2], tokenizer, max_tokens=None, row_id=1)
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n")
    assert "You are a chemist." in tokenizer.decode(ids)


def test_template_variables_are_passed_on(tokenizers):
    tokenizer = byte_level(digits_alone=True)
    tokenizer.chat_template += "{%- if enable_thinking is defined and not enable_thinking %}<nothink>{% endif %}"
    turn = [{"role": "user", "content": "hi"}]
    off = encode_prompt(turn, tokenizer, max_tokens=None, row_id=1, template_kwargs={"enable_thinking": False})
    assert tokenizer.decode(off).endswith("<nothink>")
    assert not tokenizer.decode(encode_prompt(turn, tokenizer, max_tokens=None, row_id=1)).endswith("<nothink>")


def test_a_tokenizer_without_chat_template_is_refused():
    tokenizer = byte_level(digits_alone=True)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        encode_prompt([{"role": "user", "content": "hi"}], tokenizer, max_tokens=None, row_id=1)
    with pytest.raises(ValueError, match="messages"):
        encode_prompt([], byte_level(digits_alone=True), max_tokens=None, row_id=1)


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_the_instruction_names_the_form_that_is_parsed():
    style = ConfidenceStyle(label="Confidence score:", step=0.1, decimals=1)
    text = confidence_instruction(style)
    for part in ('"Confidence score:"', "0.0", "1.0", "0.1"):
        assert part in text
    user = ask_for_confidence(CONVERSATION, style=style)
    assert [m for i, m in enumerate(user) if i != 3] == [m for i, m in enumerate(CONVERSATION) if i != 3]
    assert user[3]["content"] == f"{CONVERSATION[3]['content']}\n\n{text}"
    system = ask_for_confidence(CONVERSATION, style=style, place="system")
    assert system[0]["content"] == f"{CONVERSATION[0]['content']}\n\n{text}"
    assert system[1:] == CONVERSATION[1:]
    made = ask_for_confidence(CONVERSATION[1:], style=style, place="system")
    assert made == [{"role": "system", "content": text}, *CONVERSATION[1:]]


def test_asking_in_the_wrong_place_is_an_error():
    style = ConfidenceStyle()
    with pytest.raises(ValueError, match="place"):
        ask_for_confidence(CONVERSATION, style=style, place="assistant")
    with pytest.raises(ValueError, match="user turn"):
        ask_for_confidence(CONVERSATION[:1], style=style)
    with pytest.raises(TypeError, match="text"):
        ask_for_confidence([{"role": "user", "content": [{"type": "image"}]}], style=style)
