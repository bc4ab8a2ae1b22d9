"""The tokenizer of the demo's tasks: one token per word of a closed vocabulary; an unknown word is an error.

It is an ordinary `PreTrainedTokenizerFast` with a chat template, so the general code (rollouts, splice, teacher
contexts, checkpoints) treats it as it treats the tokenizer of a large model. The template renders

    student prompt        <bos> c a t <answer>
    teacher prompt        <bos> c a t <example> K AE T <note> 0.60 <answer>
    with the completion   <bos> c a t <answer> K AE T Confidence: 0.70 <eos>

so a prompt is always a prefix of its finished conversation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from caop_fast.caop.style import ConfidenceStyle

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
# Plain words, not special tokens: decoding keeps them, so that a reader of a log sees where the answer begins.
ANSWER, EXAMPLE, NOTE = "<answer>", "<example>", "<note>"

CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['content'] is not string %}{{ raise_exception('message content must be a string') }}{% endif %}"
    "{%- if message['role'] == 'user' %}{{- ' ' ~ (message['content'] | trim) }}"
    "{%- elif message['role'] == 'assistant' %}"
    "{{- ' " + ANSWER + " ' ~ (message['content'] | trim) ~ ' ' ~ eos_token }}"
    "{%- else %}{{ raise_exception('message role must be user or assistant, got ' ~ message['role']) }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- ' " + ANSWER + "' }}{% endif %}"
)


def word_level_tokenizer(
    symbols: Sequence[str], *, style: ConfidenceStyle | None = None, max_length: int = 64
) -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer whose tokens are exactly the space-separated words it knows.

    Ids, in this order: ``<pad> <bos> <eos>`` (special), ``<answer> <example> <note>``, the words of the confidence
    label, every value of the confidence grid as one token, then `symbols`. Padding goes to the left, as generation
    needs it. Encoding adds no special token by itself: the chat template writes them.

    Args:
        symbols: the task's own words; distinct, without white space, none of the names above.
        style: how a confidence is written; the default `ConfidenceStyle()` gives ``Confidence:`` and 21 values.
        max_length: what `model_max_length` reports, in tokens.

    Returns:
        a `PreTrainedTokenizerFast`; encoding a word outside the vocabulary raises (see `encode_texts`).

    Raises:
        ValueError: a symbol is empty, holds white space or occurs twice.
    """
    style = ConfidenceStyle() if style is None else style
    words = [PAD, BOS, EOS, ANSWER, EXAMPLE, NOTE, *style.label.split(), *(style.number(v) for v in style.values)]
    words += list(symbols)
    for word in words:
        if not word or word.split() != [word]:
            raise ValueError(f"symbols must be non-empty words without white space, got {word!r}")
    if len(set(words)) < len(words):
        twice = sorted({word for word in words if words.count(word) > 1})
        raise ValueError(f"symbols must be distinct and not reserved, got more than once: {twice}")
    # WordLevel raises on an unknown word unless its unk_token is in the vocabulary; here it is not, on purpose.
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        truncation_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,  # it would join " '" and " ." and change the decoded words
        chat_template=CHAT_TEMPLATE,
    )


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Encode rendered texts in one call of the fast tokenizer: no special tokens added, no padding, no cut.

    Args:
        tokenizer: any fast tokenizer.
        texts: complete texts, special tokens written out, as `apply_chat_template(tokenize=False)` gives them.

    Returns:
        the token ids, one list per text.

    Raises:
        TypeError: `texts` is one string instead of a sequence of strings.
        ValueError: a text holds a word outside a closed vocabulary; the message names text and words.
    """
    if isinstance(texts, str):
        raise TypeError("texts must be a sequence of strings, got one string")
    texts = list(texts)
    if not texts:
        return []
    try:
        encoded = tokenizer(
            texts,
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # its length warning speaks of texts longer than model_max_length; the caller has budgets
        )
    except Exception as error:  # the Rust side raises a bare Exception
        known = tokenizer.get_vocab()
        for i, text in enumerate(texts):
            unknown = sorted({word for word in text.split() if word not in known})
            if unknown and "[UNK]" in str(error):
                raise ValueError(f"texts[{i}]={text!r} has words outside the vocabulary: {unknown}") from error
        raise
    return encoded["input_ids"]


def encode_chats(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    *,
    add_generation_prompt: bool = True,
) -> list[list[int]]:
    """Render many conversations with the chat template and encode them in one call.

    Equal to `apply_chat_template(conversation, tokenize=True)` one by one, several times faster.

    Args:
        tokenizer: any fast tokenizer with a chat template that writes its own special tokens.
        conversations: lists of ``{"role", "content"}`` messages.
        add_generation_prompt: end with the tokens after which the model answers.

    Returns:
        the token ids, one list per conversation.
    """
    chats = [[dict(message) for message in conversation] for conversation in conversations]
    if not chats:
        return []
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=add_generation_prompt)
    return encode_texts(tokenizer, cast(list[str], texts))  # text, since tokenize=False
