"""The linear losses over vocabularies cut over ranks, against float64; in Triton's interpreter, too.

``sharded_runs.py`` runs all cases in one go, on four ranks; the tests look at what each rank found.
"""

from __future__ import annotations

import pytest

from helpers import interpreted
from helpers.ranks import Found, healthy, run
from helpers.sharded_cases import DISTILLATION, VOCAB, WAYS, all_cases, interpreted_cases, rows_per_rank

pytestmark = pytest.mark.long

STATE = 12  # numbers per token that a rank gives away
MIXTURE = 2  # and those of an interior divergence
TWICE = [
    f"4-{way}-{layout}-{variant}"
    for way, variants in {
        **dict.fromkeys(DISTILLATION, ("0.0", "0.4", "tensor")),
        "tokens": ("0",),
        "topk": ("bucket",),
        "confidence": ("cross_entropy",),
    }.items()
    for layout in ("chunk", "fewer")
    for variant in variants
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run("helpers.sharded_runs", 4, tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def found_interpreted(tmp_path_factory: pytest.TempPathFactory) -> Found:
    if (reason := interpreted.reason_to_skip()) is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("interpreted")
    return run("helpers.sharded_runs", 2, folder, interpreted.environment())


@pytest.mark.parametrize("name", [case.name for case in all_cases()])
def test_equals_float64(found, name):
    common = [rank["common"] for rank in healthy(found, name)]
    groups = [common[:2], common[2:]] if name.startswith("2") else [common]
    assert all(len(set(group)) == 1 for group in groups)  # the ranks of a group agree to the bit


@pytest.mark.parametrize("name", [case.name for case in interpreted_cases()])
def test_equals_float64_interpreted(found_interpreted, name):
    assert len({rank["common"] for rank in healthy(found_interpreted, name)}) == 1


@pytest.mark.parametrize("name", TWICE)
def test_equal_calls_have_equal_bits(found, name):
    for rank in healthy(found, f"twice-{name}"):
        assert len(set(rank["bits"])) == 1


@pytest.mark.parametrize("name", TWICE)
def test_what_the_ranks_tell_each_other(found, name):
    """One gather a chunk, two for an interior beta, and one sum; VocabularyShards spares the exchange of sizes."""
    _, way, layout, variant = name.split("-")
    for rank in healthy(found, f"twice-{name}"):
        chunks = 1 if way == "min" else rank["chunks"]  # "min" keeps the states of its blocks
        gathers, sums = chunks * (2 if variant == "0.4" else 1), 1
        elements = rank["live"] * (STATE + (MIXTURE if variant == "0.4" else 0))
        if way in ("topk", "confidence"):  # these gather logits
            rows = rows_per_rank(layout, 4)
            elements = rank["live"] * max(min(n, VOCAB - 3 if layout == "fewer" else n) for n in rows)
        told = {"gathers": gathers, "elements": elements}
        forward, backward = dict(told), {"sums": sums, "elements": 0}
        if way in ("balanced", "topk"):
            forward, backward = {**told, "sums": sums}, {}
        if way == "confidence":
            backward = {**told, "sums": sums}
        exchange = {"gathers": gathers + 1, "elements": elements + 2}
        assert rank["forward"] == [{**forward, **exchange}, {**forward, **exchange}, forward]
        assert rank["backward"] == [backward] * 3


@pytest.mark.parametrize("way", WAYS)
def test_no_tokens(found, way):
    healthy(found, f"none-{way}")


@pytest.mark.parametrize("way", WAYS)
def test_ranks_of_unequal_width_cut_the_tokens_alike(found, way):
    healthy(found, f"uneven-{way}")


def test_narrow_logits_are_gathered(found):
    healthy(found, "narrow")


def test_one_graph(found):
    healthy(found, "compiled")


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("cut", "ValueError", "process_group needs both heads cut at the same ids"),
        ("sizes", "ValueError", "vocab_size=28"),
        ("told student", "ValueError", "student_weight has"),
        ("told teacher", "ValueError", "teacher_weight has"),
        ("told tokens", "ValueError", "weight has"),
        ("empty", "ValueError", "student_weight has [0, 0, 0, 0]"),
        ("kind", "TypeError", "process_group must be"),
        ("mesh", "TypeError", "got DeviceMesh"),
        ("label", "ValueError", "labels must be -100 or in [0, 29)"),
        ("label of fewer ids", "ValueError", "labels must be -100 or in [0, 20)"),
        ("tokens", "ValueError", "labels must be -100 or in [0, 29)"),
        ("many ids", "ValueError", "vocab_size must be in [1, 29]"),
        ("no ids", "ValueError", "vocab_size must be"),
        ("kind of ids", "TypeError", "vocab_size must be an integer"),
        ("dtensor", "ValueError", "student_weight.to_local()"),
        ("teacher dtensor", "ValueError", "teacher_weight.to_local()"),
        ("dtensor hidden", "ValueError", "student_hidden must be a plain tensor"),
        ("dtensor labels", "ValueError", "labels must be a plain tensor"),
        ("dtensor bias", "ValueError", "student_bias.to_local()"),
        ("negative rows", "ValueError", "student_rows must be"),
        ("kind of rows", "TypeError", "teacher_rows must be"),
        ("kind of group", "TypeError", "process_group must be"),
    ],
)
def test_mistakes_are_errors_on_every_rank(found, name, error, words):
    for rank, cases in enumerate(found):
        assert f"mistake-{name}" in cases, f"rank {rank} stopped before: {list(cases.values())[-1]}"
        raised = cases[f"mistake-{name}"]
        assert raised.startswith(f"{error}: "), raised
        assert words in raised
        assert name != "told tokens" or not raised.startswith("ValueError: student_weight")
