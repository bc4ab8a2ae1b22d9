"""The interface of the demo's tasks: rows in three splits, a verifier, a tokenizer, and the teacher's context."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

from caop_fast.caop.style import ConfidenceStyle
from caop_fast.caop.teacher_context import TeacherContext
from caop_fast.caop.verifiers import OneOf, Verifier
from caop_fast.demo.tokenizer import EXAMPLE, NOTE, word_level_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Split = Literal["pretrain", "train", "heldout"]
SPLITS: tuple[Split, ...] = get_args(Split)
SPLIT_SHARES: dict[Split, float] = {"pretrain": 0.6, "train": 0.3, "heldout": 0.1}

Row = Mapping[str, Any]


def stable_fraction(key: str) -> float:
    """A number in [0, 1) that depends on `key` only: the same in every process, version and machine."""
    # 52 bits: a whole number that float64 holds exactly, so the quotient never rounds up to 1.
    return (int.from_bytes(hashlib.sha256(key.encode("utf-8")).digest()[:8], "big") >> 12) / 2**52


def split_of(key: str) -> Split:
    """The split that `key` (a prompt) belongs to, by its hash: 60 % pretrain, 30 % train, 10 % held out."""
    fraction, edge = stable_fraction(key), 0.0
    for split, share in SPLIT_SHARES.items():
        edge += share
        if fraction < edge:
            return split
    return SPLITS[-1]  # the shares' float sum may fall short of 1 by an ulp


def single_spaced(text: str) -> str:
    """`text` with single spaces between its words. Case is kept: ``k`` is a letter and ``K`` a phoneme."""
    return " ".join(text.split())


class Task(ABC):
    """A task whose every prompt and answer is a sequence of words from a closed vocabulary.

    Attributes:
        name: as the command line spells it.
        symbols: the words of prompts and answers, without the tokenizer's own.
        max_prompt_words, max_answer_words: the longest prompt and the longest demonstration, in words.
        style: how confidence is written.

    A row is ``{"id": str, "prompt": str, "answer": list[str], "demonstration": str}``: the user turn's text, every
    acceptable answer, and the reference answer, which is privileged: only the teacher may see it. Ids are unique over
    all splits, and no prompt occurs in two rows.
    """

    name: str
    symbols: tuple[str, ...]
    max_prompt_words: int
    max_answer_words: int
    style: ConfidenceStyle = ConfidenceStyle()

    @abstractmethod
    def _build(self, split: Split) -> Sequence[Row]:
        """Make the rows of one split, in an order that is random but stable."""

    def rows(self, split: Split) -> tuple[Row, ...]:
        """The rows of a split, always in the same order; any prefix is a fair sample of the split.

        Raises:
            ValueError: `split` is not one of `SPLITS`.
        """
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        if split not in self._cache:
            self._cache[split] = tuple(self._build(split))
        return self._cache[split]

    @cached_property
    def _cache(self) -> dict[str, tuple[Row, ...]]:
        return {}

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A new tokenizer of the task; every call gives the same ids."""
        return word_level_tokenizer(self.symbols, style=self.style)

    @cached_property
    def verifier(self) -> Verifier:
        """Right when the response's words, without the confidence statement, are exactly one of ``row["answer"]``."""
        return OneOf("answer", normalise=single_spaced)

    @cached_property
    def teacher(self) -> TeacherContext:
        """The privileged context: ``c a t <example> K AE T <note> 0.60``, the note only when a confidence is given."""
        return TeacherContext(
            template=f"{{prompt}} {EXAMPLE} {{demonstration}} {{note}}",
            note=f"{NOTE} {{confidence}}",
            max_tokens=self.max_teacher_prompt_tokens,
        )

    @property
    def max_prompt_tokens(self) -> int:
        """The longest student prompt in tokens: ``<bos>``, the prompt, ``<answer>``."""
        return self.max_prompt_words + 2

    @property
    def max_teacher_prompt_tokens(self) -> int:
        """The longest prompt of the teacher in tokens, with a statement, should the example hold one."""
        # <bos> prompt <example> demonstration statement <note> value <answer>
        statement = len(self.style.label.split()) + 1
        return 1 + self.max_prompt_words + 1 + self.max_answer_words + statement + 2 + 1

    @property
    def max_new_tokens(self) -> int:
        """The longest completion that can be right (answer, statement, ``<eos>``), with room for one stray word."""
        return self.max_answer_words + len(self.style.label.split()) + 1 + 1 + 1
