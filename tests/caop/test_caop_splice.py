from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from caop_fast.calibration.parse import parse_confidence
from caop_fast.caop import ConfidenceStyle, candidate_ids, locate_confidence, splice_confidence
from helpers.small_tokenizers import byte_level, word_level

STYLE = ConfidenceStyle()
BPE = ["digits", "grouped", "unsplit", "metaspace"]

# (completion, what the spliced completion must read)
REPLACED = [
    ("The answer is B.\nConfidence: 0.85", "The answer is B.\nConfidence: 0.60"),
    ("The answer is B.\nConfidence: 0.85\n", "The answer is B.\nConfidence: 0.60\n"),
    ("Confidence: 85%", "Confidence: 0.60"),
    ("Confidence: 85 %, B", "Confidence: 0.60, B"),
    ("Confidence: 8/10\nAnswer: B", "Confidence: 0.60\nAnswer: B"),
    ("Confidence: 0.9.", "Confidence: 0.60."),
    ("Confidence:0,85", "Confidence:0.60"),
    ("**Confidence:** `.85` because 3 + 4 = 7", "**Confidence:** `0.60` because 3 + 4 = 7"),
    ("Confidence：０．８５。", "Confidence：0.60。"),
    ("Confidence: ٠٫٨٥ naïve 数学", "Confidence: 0.60 naïve 数学"),
    ("\\boxed{B} Confidence: $\\boxed{0.85}$", "\\boxed{B} Confidence: $\\boxed{0.60}$"),
    ('{"answer": "B", "confidence": "85%"}', '{"answer": "B", "confidence": "0.60"}'),
    ("<answer>B</answer><confidence>1</confidence>", "<answer>B</answer><confidence>0.60</confidence>"),
    ("Confidence: 0.2\nNo. Confidence: 1.5 ", "Confidence: 0.2\nNo. Confidence: 0.60 "),
    ("Confidence: 0.8.5", "Confidence: 0.60"),
    ("Confidence: 0.8 0.9 0.7 0.6 B", "Confidence: 0.60 B"),
    ("Confidence: 0.8-0.9 or so", "Confidence: 0.60 or so"),
    ("Overconfidence: 0.3 is bad. Confidence: nan", "Overconfidence: 0.3 is bad. Confidence: 0.60"),
    ("🙂 Confidence: 🙂 no. Confidence:\n0.85🙂", "🙂 Confidence: 🙂 no. Confidence:\n0.60🙂"),
]
APPENDED = [
    ("The answer is B.", "The answer is B.\nConfidence: 0.60"),
    ("The answer is B.\n\n", "The answer is B.\n\nConfidence: 0.60"),
    ("", "Confidence: 0.60"),
    ("B Confidence:", "B Confidence: 0.60"),
    ("B Confidence: ", "B Confidence: 0.60"),
    ("B Confidence: high", "B Confidence: high\nConfidence: 0.60"),
    ("Overconfidence: 0.3", "Overconfidence: 0.3\nConfidence: 0.60"),
]


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", BPE)
@pytest.mark.parametrize(
    ("text", "wanted", "status"),
    [(*case, "replaced") for case in REPLACED] + [(*case, "appended") for case in APPENDED],
)
def test_text_changes_in_the_number_alone(tokenizers, name, text, wanted, status):
    tokenizer = tokenizers[name]
    body = tokenizer.encode(text, add_special_tokens=False)
    sampled = decode(tokenizer, body)
    assert sampled == text
    spliced = splice_confidence([*body, tokenizer.eos_token_id], 0.6, tokenizer, style=STYLE)
    assert spliced.status == status
    assert decode(tokenizer, spliced.ids) == wanted
    assert spliced.ids[-1] == tokenizer.eos_token_id
    assert len(spliced.value_mask) == len(spliced.ids)
    assert not spliced.value_mask[-1]
    value_ids = [i for i, on in zip(spliced.ids, spliced.value_mask, strict=True) if on]
    assert decode(tokenizer, value_ids).endswith("0.60")
    assert [p for p, on in enumerate(spliced.value_mask) if on] == locate_confidence(spliced.ids, tokenizer)


def random_tokenisation(tokenizer, text, draw):
    """Ids that spell `text` by random tokens, and the byte range of each; seldom the canonical ids."""
    spelling = byte_spelling()
    by_bytes = {}
    for token, i in tokenizer.get_vocab().items():
        if i not in tokenizer.all_special_ids:
            by_bytes[bytes(spelling[c] for c in token)] = i
    raw, position, ids, ranges = text.encode(), 0, [], []
    while position < len(raw):
        lengths = [n for n in range(1, 16) if raw[position : position + n] in by_bytes and position + n <= len(raw)]
        n = draw(st.sampled_from(lengths))
        ids.append(by_bytes[raw[position : position + n]])
        ranges.append((position, position + n))
        position += n
    return ids, ranges


def byte_spelling():
    """GPT-2's printable stand-ins for the 256 bytes, from its published rule."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_ins = dict(zip((b for b in range(256) if b not in plain), range(256, 512), strict=False))
    return {chr(stand_ins.get(b, b)): b for b in range(256)}


statements = st.sampled_from(["0.85", "85%", "0,5", "٠٫٨٥", "０．８", "8/10", ".7", "0.8.5", "1.5", "0.2 0.3"])
prose = st.text(st.sampled_from("aB 3.\n%é数🙂:*"), max_size=12)


@pytest.mark.parametrize("name", ["digits", "grouped", "unsplit"])
@given(st.data())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_sampled_tokenisation_keeps_every_other_token(tokenizers, name, data):
    tokenizer = tokenizers[name]
    text = data.draw(prose) + " Confidence: " + data.draw(statements) + data.draw(prose)
    parsed = parse_confidence(text)
    assume(parsed.span is not None)
    body, ranges = random_tokenisation(tokenizer, text, data.draw)
    assert decode(tokenizer, body) == text
    value = data.draw(st.sampled_from(STYLE.values))
    new, mask, status = splice_confidence([*body, tokenizer.eos_token_id], value, tokenizer, style=STYLE)
    assume(status == "replaced")  # "85%3": nothing readable can stand there
    after = decode(tokenizer, new)
    begin = parsed.span[0]
    number = STYLE.number(value)
    assert after.startswith(text[:begin] + number)
    kept = after[begin + len(number) :]
    assert text.endswith(kept)
    end = len(text) - len(kept)
    assert end >= parsed.span[1]
    assert parse_confidence(after).value == value
    # Byte ranges of the sampled tokens say which ids may not change.
    b0, b1 = len(text[:begin].encode()), len(text[:end].encode())
    n_before = sum(stop <= b0 for _, stop in ranges)
    n_after = sum(start >= b1 for start, _ in ranges)
    # A token that ends inside a character at the border goes with the whole character.
    while n_before and not is_boundary(text, ranges[n_before - 1][1]):
        n_before -= 1
    while n_after and not is_boundary(text, ranges[len(ranges) - n_after][0]):
        n_after -= 1
    assert new[:n_before] == body[:n_before]
    assert new[len(new) - 1 - n_after : -1] == body[len(body) - n_after :]
    # The mask: exactly the tokens that hold characters of the number.
    on = [p for p, marked in enumerate(mask) if marked]
    assert on == list(range(on[0], on[-1] + 1))
    assert len(decode(tokenizer, new[: on[0]])) <= begin
    assert len(decode(tokenizer, new[: on[0] + 1])) > begin
    assert decode(tokenizer, new[: on[-1] + 1]) == text[:begin] + number


@pytest.mark.parametrize("name", ["digits", "grouped", "unsplit"])
@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_located_tokens_are_those_that_hold_the_number(tokenizers, name, data):
    tokenizer = tokenizers[name]
    text = data.draw(prose) + " Confidence: " + data.draw(statements) + data.draw(prose)
    body, ranges = random_tokenisation(tokenizer, text, data.draw)
    span = parse_confidence(text).span
    assume(span is not None)
    b0, b1 = len(text[: span[0]].encode()), len(text[: span[1]].encode())
    located = locate_confidence(body, tokenizer)
    overlapping = [i for i, (start, stop) in enumerate(ranges) if stop > b0 and start < b1]
    assert set(overlapping) <= set(located)
    # Tokens beyond those only ever complete a character that a border token began.
    for extra in set(located) - set(overlapping):
        assert not (is_boundary(text, ranges[extra][0]) and is_boundary(text, ranges[extra][1]))


@pytest.mark.parametrize("name", BPE)
@given(text=st.text(max_size=30), value=st.sampled_from(STYLE.values))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_was_sampled_then_states_the_value(tokenizers, name, text, value):
    tokenizer = tokenizers[name]
    body = tokenizer.encode(text, add_special_tokens=False)
    sampled = decode(tokenizer, body)
    # Hypothesis tries the constants of the code under test: end tokens and bare labels have tests of their own.
    assume(not set(body) & set(tokenizer.all_special_ids))
    assume("confidence" not in sampled.lower())
    new, mask, status = splice_confidence([*body, tokenizer.eos_token_id], value, tokenizer, style=STYLE)
    after = decode(tokenizer, new)
    assert status == "appended"
    assert new[: len(body)] == body
    assert after in (f"{sampled}\n{STYLE.statement(value)}", f"{sampled}{STYLE.statement(value)}")
    assert parse_confidence(after).value == value
    assert not any(mask[: len(body)])
    assert not mask[-1]
    assert all(mask[mask.index(True) : -1])


def is_boundary(text, byte):
    raw = text.encode()
    return byte == len(raw) or raw[byte] & 0xC0 != 0x80


def test_sampled_ids_survive_although_not_canonical(tokenizers):
    tokenizer = tokenizers["grouped"]
    single = [tokenizer.encode(c, add_special_tokens=False)[0] for c in "B. Confidence: 0.85 ok"]
    assert single != tokenizer.encode("B. Confidence: 0.85 ok", add_special_tokens=False)
    spliced = splice_confidence([*single, tokenizer.eos_token_id], 0.1, tokenizer, style=STYLE)
    assert spliced.ids[:15] == single[:15]
    assert spliced.ids[-4:] == [*single[-3:], tokenizer.eos_token_id]
    assert decode(tokenizer, spliced.ids) == "B. Confidence: 0.10 ok"


def test_token_that_holds_digit_and_newline_keeps_the_newline(tokenizers):
    tokenizer = tokenizers["unsplit"]
    straddling = [
        (token, i)
        for token, i in tokenizer.get_vocab().items()
        if len(token) > 1 and token[0].isdigit() and token.lstrip("0123456789.")[:1] in ("Ċ", ",", "Ġ")
    ]
    assert straddling, "the training text should give tokens that begin in a number and end outside"
    for token, i in straddling:
        body = [*tokenizer.encode("Confidence: 0.", add_special_tokens=False), i]
        text = decode(tokenizer, body)
        span = parse_confidence(text).span
        new = splice_confidence([*body, tokenizer.eos_token_id], 0.6, tokenizer, style=STYLE)
        if new.status == "replaced":
            assert decode(tokenizer, new.ids) == text[: span[0]] + "0.60" + text[span[1] :], token


def test_word_level_completion(words):
    ids = words.encode("K AE T Confidence: 0.85 <eos>", add_special_tokens=False)
    assert locate_confidence(ids, words) == [4]
    spliced = splice_confidence(ids, 0.62, words, style=STYLE)
    assert words.convert_ids_to_tokens(spliced.ids) == ["K", "AE", "T", "Confidence:", "0.60", "<eos>"]
    assert spliced.value_mask == [False, False, False, False, True, False]
    assert spliced.status == "replaced"


@pytest.mark.parametrize("body", ["K AE T", "K AE T Confidence:"])
def test_word_level_completion_without_a_value(words, body):
    ids = words.encode(f"{body} <eos>", add_special_tokens=False)
    spliced = splice_confidence(ids, 0, words, style=STYLE)
    assert words.convert_ids_to_tokens(spliced.ids) == ["K", "AE", "T", "Confidence:", "0.00", "<eos>"]
    assert spliced.value_mask == [False, False, False, False, True, False]
    assert spliced.status == "appended"
    assert locate_confidence(ids, words) == []


def test_value_in_the_answer_is_not_the_statement(words):
    ids = words.encode("0.10 K Confidence: 0.85 T <eos>", add_special_tokens=False)
    spliced = splice_confidence(ids, 1, words, style=STYLE)
    assert words.decode(spliced.ids) == "0.10 K Confidence: 1.00 T <eos>"
    assert spliced.value_mask.index(True) == 3


def test_cut_completion_is_left_alone(words):
    ids = words.encode("K AE T Confidence: 0.85", add_special_tokens=False)
    assert splice_confidence(ids, 0.1, words, style=STYLE) == (ids, [False] * 5, "truncated")


def test_stop_ids_and_padding_after_the_end(words):
    ids = words.encode("K Confidence: 0.85 <eos> <pad> 0.10", add_special_tokens=False)
    spliced = splice_confidence(ids, 0.3, words, style=STYLE)
    assert words.decode(spliced.ids) == "K Confidence: 0.30 <eos> <pad> 0.10"
    assert sum(spliced.value_mask) == 1
    assert locate_confidence(ids, words) == [2]
    other = words.convert_tokens_to_ids("<pad>")
    assert splice_confidence(ids[:3], 0.3, words, style=STYLE, stop_ids={other}).status == "truncated"
    ended = splice_confidence([*ids[:3], other], 0.3, words, style=STYLE, stop_ids=[other])
    assert ended.status == "replaced"
    assert ended.ids[-1] == other


def test_special_tokens_inside_a_completion_stay(tokenizers):
    tokenizer = tokenizers["digits"]
    marker = tokenizer.convert_tokens_to_ids("<|im_start|>")
    head, tail = (tokenizer.encode(t, add_special_tokens=False) for t in ("B\nConfidence: 0.85", " done"))
    ids = [marker, *head, marker, *tail, tokenizer.eos_token_id]
    spliced = splice_confidence(ids, 0.6, tokenizer, style=STYLE)
    assert tokenizer.decode(spliced.ids) == tokenizer.decode(ids).replace("0.85", "0.60")
    assert [i for i in spliced.ids if i == marker] == [marker, marker]


def test_clean_up_of_spaces_takes_no_sampled_space_away():
    tokenizer = byte_level(digits_alone=True)
    tokenizer.clean_up_tokenization_spaces = True
    # Newer transformers spare BPE tokenizers unless told twice; older ones do not know this name.
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    tokenizer.add_tokens(["5 ,"])  # one token that holds a digit of the number and a space that clean-up would drop
    text = "I 'm sure , quite . Confidence: 0.85 , ok ."
    body = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.convert_tokens_to_ids("5 ,") in body
    assert tokenizer.decode(body) != text
    spliced = splice_confidence([*body, tokenizer.eos_token_id], 0.6, tokenizer, style=STYLE)
    assert decode(tokenizer, spliced.ids) == text.replace("0.85", "0.60")


def test_broken_bytes_in_front_of_the_statement(tokenizers):
    tokenizer = tokenizers["digits"]
    half = tokenizer.encode("数", add_special_tokens=False)[:1]
    body = [*half, *tokenizer.encode(" Confidence: 0.85", add_special_tokens=False), *half]
    spliced = splice_confidence([*body, tokenizer.eos_token_id], 0.6, tokenizer, style=STYLE)
    assert spliced.status == "replaced"
    assert decode(tokenizer, spliced.ids) == decode(tokenizer, body).replace("0.85", "0.60")
    assert spliced.ids[:1] == half
    assert spliced.ids[-2:-1] == half


def test_tensors_and_arrays_are_taken_and_other_shapes_refused(words):
    ids = words.encode("K Confidence: 0.85 <eos>", add_special_tokens=False)
    expected = splice_confidence(ids, 0.3, words, style=STYLE)
    assert splice_confidence(np.array(ids), 0.3, words, style=STYLE) == expected
    torch = pytest.importorskip("torch")
    assert splice_confidence(torch.tensor(ids), 0.3, words, style=STYLE) == expected
    assert type(splice_confidence(torch.tensor(ids), 0.3, words, style=STYLE).ids[0]) is int
    for bad in (np.array([ids]), [1.5], "text"):
        with pytest.raises(ValueError, match="ids must be one completion"):
            splice_confidence(bad, 0.3, words, style=STYLE)
        with pytest.raises(ValueError, match="ids must be one completion"):
            locate_confidence(bad, words)


@pytest.mark.parametrize("said", ["Confidence: 1~", "Confidence: 9' 0.85"])
def test_a_number_inside_a_word_that_cannot_be_split_gets_a_fresh_statement(said):
    tokenizer = word_level(["Confidence:", "1~", "9'", "0.85", "0.60"])
    ids = tokenizer.encode(f"{said} <eos>", add_special_tokens=False)
    spliced = splice_confidence(ids, 0.6, tokenizer, style=STYLE)
    text = tokenizer.decode(spliced.ids, skip_special_tokens=True)
    assert text.startswith(said.split()[0])
    assert parse_confidence(text).value == 0.6
    assert spliced.status == "appended"
    assert [tokenizer.decode([i]) for i, v in zip(spliced.ids, spliced.value_mask, strict=True) if v] == ["0.60"]


def test_bad_input(words):
    ids = words.encode("K Confidence: 0.85 <eos>", add_special_tokens=False)
    given = list(ids)
    with pytest.raises(ValueError, match="value must be"):
        splice_confidence(ids, 1.5, words, style=STYLE)
    with pytest.raises(ValueError, match="stop_ids"):
        splice_confidence(ids, 0.5, words, style=STYLE, stop_ids=[])
    endless = word_level()
    endless.eos_token = None
    with pytest.raises(ValueError, match="stop_ids"):
        splice_confidence(ids, 0.5, endless, style=STYLE)
    # A closed vocabulary without the number cannot be spliced, and silently writing another one is no way out.
    with pytest.raises(ValueError, match=r"cannot write .*Confidence: 0\.55"):
        splice_confidence(
            (lacking := word_level(["Confidence:", "0.85"])).encode(
                "K Confidence: 0.85 <eos>", add_special_tokens=False
            ),
            0.55,
            lacking,
            style=STYLE,
        )
    assert ids == given


def test_candidate_ids_are_the_tokens_after_the_label(words):
    ids = candidate_ids(words, STYLE)
    assert words.convert_ids_to_tokens(ids) == [STYLE.number(v) for v in STYLE.values]
    spliced = splice_confidence(words.encode("K <eos>", add_special_tokens=False), 0.35, words, style=STYLE)
    assert spliced.ids[spliced.value_mask.index(True)] == ids[7]


def test_candidate_ids_with_a_space_inside_the_token():
    tokenizer = byte_level(digits_alone=False)
    with pytest.raises(ValueError, match=r"single token after 'Confidence:'.*'0\.00'"):
        candidate_ids(tokenizer, STYLE)
    tokenizer.add_tokens([f" {STYLE.number(v)}" for v in STYLE.values])
    ids = candidate_ids(tokenizer, STYLE)
    assert [decode(tokenizer, [i]) for i in ids] == [f" {STYLE.number(v)}" for v in STYLE.values]
    assert len(set(ids)) == 21


def test_candidate_ids_name_the_value_a_vocabulary_lacks():
    lacking = word_level(["Confidence:", *(f"{i / 20:.2f}" for i in range(21) if i != 11)])
    with pytest.raises(ValueError, match=r"'0\.55'"):
        candidate_ids(lacking, STYLE)


@pytest.mark.parametrize("name", BPE)
@pytest.mark.parametrize("at_the_end", [True, False])
def test_long_completions_need_no_quadratic_decoding(tokenizers, name, at_the_end):
    tokenizer = tokenizers[name]
    filler, statement = "some words and 12 numbers 数学. " * 600, "Confidence: 0.85"
    text = f"{filler}\n{statement}" if at_the_end else f"{statement}\n{filler}"
    counted = CountingDecoder(tokenizer)
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    assert len(ids) > 4000
    spliced = splice_confidence(ids, 0.6, counted, style=STYLE)
    assert decode(tokenizer, spliced.ids) == text.replace("0.85", "0.60")
    assert counted.decoded < (6 if at_the_end else 40) * len(ids)


class CountingDecoder:
    """Passes everything on to a tokenizer; counts the tokens it decodes and its calls."""

    def __init__(self, tokenizer):
        self.tokenizer, self.decoded, self.calls = tokenizer, 0, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def decode(self, ids, **kwargs):
        self.decoded += len(ids)
        self.calls += 1
        return self.tokenizer.decode(ids, **kwargs)

    def encode(self, text, **kwargs):
        self.calls += 1
        return self.tokenizer.encode(text, **kwargs)


def test_a_short_splice_takes_a_handful_of_tokenizer_calls(words):
    """What a splice costs is its calls of the tokenizer: it runs once for every rollout."""
    counted = CountingDecoder(words)
    ids = words.encode("K AE T K AE T K AE T Confidence: 0.85 <eos>", add_special_tokens=False)
    splice_confidence(ids, 0.6, counted, style=STYLE)
    assert counted.calls <= 10
