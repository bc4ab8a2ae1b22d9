"""`sums`: the closed form is the truth, the rows follow it, and held-out prompts stay held out."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from caop_fast.demo.sums import Sums, digit_readings, parse_prompt, write_number
from caop_fast.demo.task import SPLITS, split_of

TASK = Sums()
SURE = {"": Fraction(1), "'": Fraction(9, 10), "~": Fraction(7, 10)}


def row(prompt: str) -> dict:
    return {"id": "x", "prompt": prompt, "answer": ["0"], "demonstration": "0"}


def exact_posterior(prompt: str) -> dict[str, Fraction]:
    """The same truth in exact arithmetic, by adding one digit at a time to the distribution of the sum."""
    distribution = {0: Fraction(1)}
    for operand in prompt.split(" + "):
        for place, token in enumerate(operand.split(" ")):
            digit, sure = int(token[0]), SURE[token[1:]]
            after: dict[int, Fraction] = {}
            for total, p in distribution.items():
                for value, q in ((digit, sure), (0 if digit == 9 else digit + 1, 1 - sure)):
                    if q:
                        key = total + value * 10**place
                        after[key] = after.get(key, Fraction(0)) + p * q
            distribution = after
    return {" ".join(str(total)[::-1]): p for total, p in distribution.items()}


def prompts() -> st.SearchStrategy[str]:
    token = st.builds("{}{}".format, st.integers(0, 9), st.sampled_from(list(SURE)))
    operand = st.lists(token, min_size=1, max_size=3).map(" ".join)
    return st.builds("{} + {}".format, operand, operand)


@pytest.mark.parametrize(
    ("prompt", "posterior"),
    [
        ("3 4 + 7 1", {"0 6": 1.0}),  # 43 + 17
        ("3 4' + 7 1~", {"0 6": 0.63, "0 7": 0.34, "0 8": 0.03}),  # 60; one of the tens larger; both
        ("9~ + 0", {"9": 0.7, "0": 0.3}),  # 9 wraps to 0
        ("0 9' + 0 1", {"0 0 1": 0.9, "0 1": 0.1}),  # 90 + 10, or 00 + 10
        ("1~ + 2~", {"3": 0.49, "4": 0.42, "5": 0.09}),
        ("9' + 9'", {"8 1": 0.81, "9": 0.18, "0": 0.01}),
        ("0 0 0 + 0", {"0": 1.0}),
    ],
)
def test_worked_posteriors(prompt, posterior):
    assert TASK.posterior(row(prompt)) == pytest.approx(posterior, abs=1e-12)


@settings(max_examples=300, deadline=None)
@given(prompts())
@example("9' 9~ 9 + 9 9' 9~")
def test_the_posterior_is_the_exact_one(prompt):
    found, exact = TASK.posterior(row(prompt)), exact_posterior(prompt)
    assert set(found) == set(exact)
    assert math.isclose(sum(found.values()), 1.0, abs_tol=1e-12)
    assert all(abs(found[answer] - p) < 1e-12 for answer, p in exact.items())


def test_the_posterior_uses_nothing_of_the_row_but_its_prompt():
    assert TASK.posterior({"prompt": "3 4' + 7 1~"}) == TASK.posterior(row("3 4' + 7 1~"))


@pytest.mark.parametrize("task", [TASK, Sums(1)], ids=["seed0", "seed1"])
def test_realised_sums_follow_the_posterior(task):
    """Over all rows the realised sum is the likeliest one exactly as often as the closed form says."""
    by_top: dict[float, list[bool]] = {}
    for r in (r for split in SPLITS for r in task.rows(split)):
        posterior = task.posterior(r)
        assert posterior[r["answer"][0]] > 0
        top = max(posterior, key=posterior.get)
        by_top.setdefault(round(posterior[top], 6), []).append(r["answer"][0] == top)
    assert set(by_top) == {1.0, 0.9, 0.81, 0.7, 0.63, 0.49}
    for p, hits in by_top.items():
        assert len(hits) > 1000
        assert abs(sum(hits) / len(hits) - p) <= 4.5 * math.sqrt(p * (1 - p) / len(hits)), p


@settings(max_examples=100, deadline=None)
@given(prompts(), st.data())
def test_success_probability_is_the_verifiers_expectation(prompt, data):
    exact = exact_posterior(prompt)
    answer = data.draw(st.sampled_from([*exact, "5 5 5 5", "", "0 +", "3 4'", "0 " + next(iter(exact))]))
    for response in (answer, f"{answer} Confidence: 0.70"):
        expected = sum(
            float(p) * TASK.verifier(response, {**row(prompt), "answer": [truth]}).correct for truth, p in exact.items()
        )
        assert abs(TASK.success_probability(response, row(prompt)) - expected) < 1e-12
        assert abs(expected - float(exact.get(answer, 0))) < 1e-12


@pytest.mark.parametrize(
    ("response", "probability"),
    [
        ("0 6 Confidence: 0.05", 0.63),
        ("0 7", 0.34),
        ("6 0 Confidence: 1.00", 0.0),  # most significant digit first
        ("0 6 0 Confidence: 1.00", 0.0),  # a leading zero
        ("0 6 0 6 Confidence: 1.00", 0.0),
        ("0 6' Confidence: 1.00", 0.0),  # the mark belongs to the digit, it is no quotation mark of the statement
        ("0' 6 Confidence: 1.00", 0.0),
        ("0 6~ Confidence: 1.00", 0.0),
        ("Confidence: 1.00", 0.0),
        ("", 0.0),
        ("Confidence: Confidence: <note> 0.70 +", 0.0),
    ],
)
def test_worked_success_probabilities(response, probability):
    assert TASK.success_probability(response, row("3 4' + 7 1~")) == pytest.approx(probability, abs=1e-12)


def test_the_row_names_the_realised_sum_and_only_that():
    for r in TASK.rows("heldout"):
        assert r["answer"] == [r["demonstration"]]
        assert r["answer"][0] in exact_posterior(r["prompt"])


def test_prompts_are_held_out_from_every_seed():
    heldout = {r["prompt"] for r in Sums(0).rows("heldout")}
    for seed in (0, 1, 7):
        task = Sums(seed, sizes={"pretrain": 8000, "train": 8000})
        for split in ("pretrain", "train"):
            assert not heldout & {r["prompt"] for r in task.rows(split)}


def test_the_seed_decides_the_rows():
    small = {"train": 500, "heldout": 500}
    first, again, other = Sums(3, sizes=small), Sums(3, sizes=small), Sums(4, sizes=small)
    assert first.rows("train") == again.rows("train")
    drawn = [{r["prompt"] for r in task.rows("train") if len(r["prompt"].split()) > 3} for task in (first, other)]
    assert len(drawn[0] & drawn[1]) < 0.1 * len(drawn[0])
    hidden = [{r["prompt"]: r["answer"] for r in task.rows("train")} for task in (first, other)]
    assert any(hidden[0][prompt] != hidden[1][prompt] for prompt in hidden[0].keys() & hidden[1].keys())


def test_sizes_and_mix_are_the_documented_ones():
    assert [len(TASK.rows(split)) for split in SPLITS] == [26_000, 13_000, 4_000]
    singles = set()
    for split in SPLITS:
        rows = TASK.rows(split)
        parsed = [r["prompt"].split(" + ") for r in rows]
        assert all(len(a.split()) == len(b.split()) for a, b in parsed)
        lengths = [len(a.split()) for a, _ in parsed]
        singles |= {r["prompt"] for r, n in zip(rows, lengths, strict=True) if n == 1}
        assert 0.015 < lengths.count(1) / len(rows) < 0.03
        assert abs(lengths.count(2) / len(rows) - 0.49) < 0.03
        smudged = [r["prompt"].count("'") + r["prompt"].count("~") for r in rows]
        assert max(smudged) == 2
        for count, share in enumerate((0.2, 0.4, 0.4)):
            assert abs(smudged.count(count) / len(rows) - share) < 0.03
        for a, b in parsed:
            for operand in (a.split(), b.split()):
                assert len(operand) == 1 or operand[-1][0] != "0"
        top = [max(TASK.posterior(r).values()) for r in rows[:1000]]
        assert 0.70 < sum(top) / len(top) < 0.82, "the best reader's accuracy leaves room for doubt"
        # A prefix is a fair sample: the one-digit prompts are not in one heap.
        assert 5 <= lengths[:1000].count(1) <= 50
    tokens = [f"{digit}{mark}" for digit in range(10) for mark in SURE]
    assert singles == {f"{a} + {b}" for a in tokens for b in tokens}


def test_smaller_sizes_and_their_limit():
    small = Sums(0, sizes={"train": 400})
    assert [len(small.rows(split)) for split in ("train", "heldout")] == [400, 4000]
    assert all(split_of(r["prompt"]) == "train" for r in small.rows("train"))
    with pytest.raises(ValueError, match=r"sizes\['heldout'\] must be at least \d+, got 3"):
        Sums(0, sizes={"heldout": 3}).rows("heldout")
    with pytest.raises(ValueError, match="sizes must have keys among"):
        Sums(0, sizes={"test": 3})


@pytest.mark.parametrize("seed", [0.0, "0", None, True])
def test_a_seed_that_is_no_int_is_an_error(seed):
    with pytest.raises(TypeError, match="seed must be an int"):
        Sums(seed)


@pytest.mark.parametrize("token", ["", "a", "10", "'", "1''", "1~'", "²", "-1", "~1"])
def test_a_token_that_is_no_digit_is_an_error(token):
    with pytest.raises(ValueError, match="token must be a digit"):
        digit_readings(token)


@pytest.mark.parametrize("prompt", ["", "1", "1 +", "+ 1", "1 + 2 + 3", "1 2 3 4 + 1", "1 2 3"])
def test_a_prompt_that_is_no_addition_is_an_error(prompt):
    with pytest.raises(ValueError, match="prompt must be two operands"):
        parse_prompt(prompt)


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (60, "0 6"), (1998, "8 9 9 1"), (7, "7"), (100, "0 0 1")])
def test_numbers_are_written_least_significant_digit_first(value, text):
    assert write_number(value) == text
