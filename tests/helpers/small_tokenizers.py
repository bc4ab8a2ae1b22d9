"""Small real tokenizers, trained on the spot: nothing is downloaded."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "The answer is 42. Confidence: 0.85",
    "I am sure that the reaction gives ethanol. Confidence: 0.90\n",
    "Final answer: B\nConfidence: 85%\n\nConfidence: 0.5, I think.",
    "**Confidence:** `0.75` because 3 + 4 = 7; the sum of 12 and 30 is 42.",
    "Confiance, naïve, 数学の答えは五。 Confidence： 0.10",
]

CHAT_TEMPLATE = (
    "{%- for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{%- if not (loop.last and m['role'] == 'assistant' and continue_final_message is defined and "
    "continue_final_message) %}<|im_end|>\n{% endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level(*, digits_alone: bool, pre_split: bool = True, vocab_size: int = 420) -> PreTrainedTokenizerFast:
    """A byte-level BPE as chat models use it; without `pre_split` merges cross every border ("5\\n", ": 0")."""
    backend = Tokenizer(models.BPE())
    if not pre_split:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    elif digits_alone:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    )


def metaspace() -> PreTrainedTokenizerFast:
    """SentencePiece manners: spaces as U+2581, one put before the text and stripped by decoding, bytes as <0xE2>."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=260,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=["▁", "\n"],
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES[:4] * 4, trainer)
    # Byte tokens belong to the model, not to the special tokens, or decoding would skip them.
    parts = json.loads(backend.to_str())
    vocabulary = parts["model"]["vocab"]
    for i in range(256):
        vocabulary[f"<0x{i:02X}>"] = len(vocabulary)
    backend = Tokenizer.from_str(json.dumps(parts))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>", chat_template=CHAT_TEMPLATE
    )


def word_level(words: list[str] | None = None) -> PreTrainedTokenizerFast:
    """One token a word, decoding joins with spaces; unknown words raise."""
    words = words if words is not None else ["<answer>", "Confidence:", *(f"{i / 20:.2f}" for i in range(21))]
    vocabulary = ["<pad>", "<bos>", "<eos>", *words, "K", "AE", "T", "c", "a", "t", "<example>", "<note>"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        pad_token="<pad>",
        bos_token="<bos>",
        clean_up_tokenization_spaces=False,
        chat_template=(
            "<bos>{% for m in messages %} {{ m['content'] }}{% endfor %}"
            "{% if add_generation_prompt %} <answer>{% endif %}"
        ),
    )


BUILDERS = {
    "digits": lambda: byte_level(digits_alone=True),
    "grouped": lambda: byte_level(digits_alone=False),
    "unsplit": lambda: byte_level(digits_alone=False, pre_split=False),
    "metaspace": metaspace,
}
