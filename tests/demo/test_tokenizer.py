"""The word-level tokenizer: closed vocabulary, exact round trips, and a chat template whose prompts are prefixes."""

from __future__ import annotations

import socket
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config

from caop_fast.caop.style import ConfidenceStyle
from caop_fast.demo.tokenizer import CHAT_TEMPLATE, encode_chats, encode_texts, word_level_tokenizer

# Words that clean_up_tokenization_spaces would glue to their neighbours, and look-alikes of the confidence values.
SYMBOLS = (
    *string.ascii_lowercase,
    "K",
    "AE",
    "T",
    "AH",
    "0",
    "1",
    "3'",
    "7~",
    "+",
    ".",
    ",",
    "!",
    "n't",
    "'s",
    "0.",
    "é",
    "Confidence",
)
TOKENIZER = word_level_tokenizer(SYMBOLS)
WORDS = sorted(TOKENIZER.get_vocab(), key=TOKENIZER.get_vocab().get)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture
def offline(monkeypatch):
    """Any attempt to reach the network fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("a tokenizer on disk must load without the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_the_vocabulary_is_exactly_the_documented_one():
    values = [f"{i * 0.05:.2f}" for i in range(21)]
    head = ["<pad>", "<bos>", "<eos>", "<answer>", "<example>", "<note>", "Confidence:", *values]
    assert head + list(SYMBOLS) == WORDS
    assert (values[0], values[14], values[-1]) == ("0.00", "0.70", "1.00")
    assert len(TOKENIZER) == len(WORDS)
    assert [TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id] == [0, 1, 2]
    assert sorted(TOKENIZER.all_special_ids) == [0, 1, 2]
    assert TOKENIZER.unk_token is None
    assert isinstance(TOKENIZER, PreTrainedTokenizerFast)


def test_another_style_gives_its_own_label_and_grid():
    style = ConfidenceStyle(label="My confidence level:", step=0.25, decimals=3)
    tokenizer = word_level_tokenizer(["x"], style=style)
    assert encode_texts(tokenizer, [f"x {style.statement(0.75)} <eos>"]) == [[14, 6, 7, 8, 12, 2]]
    assert tokenizer.decode([14, 6, 7, 8, 12]) == "x My confidence level: 0.750"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(range(3, len(WORDS))), max_size=30), st.booleans())
def test_decoding_and_encoding_are_inverse(ids, skip_special_tokens):
    text = TOKENIZER.decode(ids, skip_special_tokens=skip_special_tokens)
    assert text == " ".join(WORDS[i] for i in ids)
    assert encode_texts(TOKENIZER, [text]) == [ids]
    assert TOKENIZER.batch_decode([ids], skip_special_tokens=skip_special_tokens) == [text]


def test_only_special_tokens_vanish_in_decoding():
    ids = encode_texts(TOKENIZER, ["<bos> c a t <answer> K AE T <note> 3' Confidence: 0.70 <eos>"])[0]
    assert (
        TOKENIZER.decode([0, 0, *ids, 0], skip_special_tokens=True)
        == "c a t <answer> K AE T <note> 3' Confidence: 0.70"
    )


@pytest.mark.parametrize("word", ["xyz", "C", "Confidence:0.70", "0.701", "0,70", "é́", "[UNK]", "<unk>", "a.b", "aa"])
def test_an_unknown_word_is_an_error_never_a_token(word):
    with pytest.raises(ValueError, match=r"texts\[1\].*outside the vocabulary") as caught:
        encode_texts(TOKENIZER, ["c a t", f"c {word} t"])
    assert repr(word) in str(caught.value)
    with pytest.raises(Exception, match=r"\[UNK\]"):
        TOKENIZER(f"c {word} t")
    with pytest.raises(Exception, match=r"\[UNK\]"):
        TOKENIZER.apply_chat_template(user(f"c {word} t"), tokenize=True)


def test_encoding_adds_no_special_tokens_of_its_own():
    ids = encode_texts(TOKENIZER, ["c a t"])[0]
    assert len(ids) == 3
    assert TOKENIZER("c a t")["input_ids"] == TOKENIZER.encode("c a t", add_special_tokens=True) == ids


def test_encode_texts_neither_pads_nor_cuts_whatever_was_called_before():
    long, short = "a " * 300, "b"
    TOKENIZER([long, short], padding=True, truncation=True, max_length=8)  # leaves its state in the backend
    a, b = (TOKENIZER.get_vocab()[letter] for letter in "ab")
    assert encode_texts(TOKENIZER, [long, short, ""]) == [[a] * 300, [b], []]
    assert encode_texts(TOKENIZER, []) == []
    assert encode_texts(TOKENIZER, (text for text in ["b"])) == [[b]]
    with pytest.raises(TypeError, match="texts must be a sequence"):
        encode_texts(TOKENIZER, "a b")


def test_batches_are_padded_on_the_left():
    batch = TOKENIZER(["a b c", "a"], padding=True, add_special_tokens=False)
    assert batch["input_ids"][1][:2] == [0, 0]
    assert batch["attention_mask"] == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize(
    ("content", "rendered"),
    [
        ("c a t", "<bos> c a t <answer>"),
        ("c a t <example> K AE T <note> 0.60", "<bos> c a t <example> K AE T <note> 0.60 <answer>"),
        ("c a t <example> K AE T ", "<bos> c a t <example> K AE T <answer>"),  # an empty note leaves a space behind
    ],
)
def test_the_chat_template_renders_the_documented_prompts(content, rendered):
    text = TOKENIZER.apply_chat_template(user(content), tokenize=False, add_generation_prompt=True)
    assert text == rendered
    ids = TOKENIZER.apply_chat_template(user(content), tokenize=True, add_generation_prompt=True, return_dict=False)
    assert ids == encode_texts(TOKENIZER, [rendered])[0]
    assert TOKENIZER.decode(ids) == rendered


def test_a_prompt_is_a_prefix_of_its_finished_conversation():
    asked = user("c a t")
    done = [*asked, {"role": "assistant", "content": "K AE T Confidence: 0.70"}]
    again = [*done, *user("d o g")]
    texts = [
        TOKENIZER.apply_chat_template(asked, tokenize=False, add_generation_prompt=True),
        TOKENIZER.apply_chat_template(done, tokenize=False),
        TOKENIZER.apply_chat_template(again, tokenize=False, add_generation_prompt=True),
    ]
    assert texts[1] == "<bos> c a t <answer> K AE T Confidence: 0.70 <eos>"
    assert texts[2] == texts[1] + " d o g <answer>"
    prompt, finished, _ = encode_texts(TOKENIZER, texts)
    assert finished[: len(prompt)] == prompt
    assert finished[-1] == TOKENIZER.eos_token_id
    assert TOKENIZER.apply_chat_template(asked, tokenize=False) == "<bos> c a t"


@pytest.mark.parametrize("role", ["system", "tool", "assistent"])
def test_roles_the_template_does_not_know_are_errors(role):
    with pytest.raises(Exception, match=f"role must be user or assistant, got {role}"):
        TOKENIZER.apply_chat_template([{"role": role, "content": "c a t"}], tokenize=False)


def test_content_that_is_not_text_is_an_error():
    with pytest.raises(Exception, match="content must be a string"):
        TOKENIZER.apply_chat_template(
            [{"role": "user", "content": [{"type": "text", "text": "c a t"}]}], tokenize=False
        )


def test_encode_chats_equals_the_chat_template_one_by_one():
    chats = [
        user("c a t"),
        [*user("a"), {"role": "assistant", "content": "AH Confidence: 1.00"}],
        user("c <example> K <note> 0.05"),
    ]
    for generation in (True, False):
        expected = [
            TOKENIZER.apply_chat_template(c, tokenize=True, add_generation_prompt=generation, return_dict=False)
            for c in chats
        ]
        assert encode_chats(TOKENIZER, chats, add_generation_prompt=generation) == expected
    assert encode_chats(TOKENIZER, []) == []


def test_it_survives_saving_beside_a_model_config(tmp_path, offline):
    # A model's config.json in the same folder must not make AutoTokenizer choose that model's own tokenizer.
    Qwen3Config(vocab_size=len(TOKENIZER), num_hidden_layers=1).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    assert loaded.chat_template == CHAT_TEMPLATE
    assert loaded.padding_side == "left"
    assert sorted(loaded.all_special_ids) == [0, 1, 2]
    text = "<bos> 3' + 7~ . <answer> n't 's Confidence: 0.70 <eos>"
    assert encode_texts(loaded, [text]) == encode_texts(TOKENIZER, [text])
    assert loaded.decode(encode_texts(loaded, [text])[0]) == text
    assert encode_chats(loaded, [user("c a t")]) == encode_chats(TOKENIZER, [user("c a t")])
    assert loaded("c a t")["input_ids"] == TOKENIZER("c a t")["input_ids"]
    with pytest.raises(ValueError, match="outside the vocabulary"):
        encode_texts(loaded, ["xyz"])


@pytest.mark.parametrize(
    ("symbols", "message"),
    [
        (["a", ""], "non-empty"),
        (["a b"], "without white space"),
        (["a\u00a0b"], "without white space"),
        (["a", "b", "a"], r"more than once: \['a'\]"),
        (["0.70"], r"more than once: \['0.70'\]"),
        (["<eos>"], r"more than once: \['<eos>'\]"),
    ],
)
def test_bad_symbols_are_errors(symbols, message):
    with pytest.raises(ValueError, match=message):
        word_level_tokenizer(symbols)
