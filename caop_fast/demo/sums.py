"""The task `sums`: addition with smudged digits, whose ideal confidence has a closed form.

    prompt  3 4' + 7 1~      43 + 17, least significant digit first, 4 and 1 are smudged
    answer  0 6              the realised sum, least significant digit first

A clear digit is itself. A smudged digit d is d with the probability its mark names, else d + 1 mod 10:
``d'`` with 0.9, ``d~`` with 0.7. The realised digits are drawn once per row and stay hidden; the verifier knows their
sum. No reader of the prompt can do better than

    P(sum = s | prompt) = sum over the digits' readings that add up to s of the product of their probabilities,

four readings at most, since at most two digits are smudged. Tests compare learned confidences with it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence

from caop_fast.demo.task import Row, Split, Task, split_of

# Mark -> probability that the digit is what it looks like.
MARKS: dict[str, float] = {"": 1.0, "'": 0.9, "~": 0.7}
SMUDGES = tuple(mark for mark in MARKS if mark)
MAX_DIGITS = 3
MAX_SMUDGED = 2

# Two-digit sums are learned well, three-digit ones only in part; with the smudges this spreads success over (0, 1].
DIGIT_SHARES = {2: 0.5, 3: 0.5}
SMUDGED_SHARES = {0: 0.2, 1: 0.4, 2: 0.4}
SIZES: dict[Split, int] = {"pretrain": 26_000, "train": 13_000, "heldout": 4_000}


def write_number(value: int) -> str:
    """A number as the task writes it: ``60`` is ``"0 6"``, least significant digit first, no leading zeros."""
    return " ".join(reversed(str(value)))


def digit_readings(token: str) -> tuple[tuple[int, float], ...]:
    """The values a digit token may stand for, with their probabilities: ``"9~"`` gives ``((9, 0.7), (0, 0.3))``.

    Raises:
        ValueError: `token` is no digit with one of the marks.
    """
    digit, mark = token[:1], token[1:]
    if digit not in tuple("0123456789") or mark not in MARKS:
        raise ValueError(f"token must be a digit and one of the marks {list(MARKS)}, got {token!r}")
    seen, certainty = int(digit), MARKS[mark]
    if certainty == 1.0:
        return ((seen, 1.0),)
    return ((seen, certainty), ((seen + 1) % 10, 1.0 - certainty))


def parse_prompt(prompt: str) -> list[tuple[int, str]]:
    """Split a prompt into (power of ten, digit token) pairs of both operands.

    Raises:
        ValueError: the prompt is not two operands of one to three digits around a plus sign.
    """
    operands = [operand.split() for operand in prompt.split("+")]
    if len(operands) != 2 or not all(1 <= len(operand) <= MAX_DIGITS for operand in operands):
        raise ValueError(f"prompt must be two operands of 1 to {MAX_DIGITS} digits around '+', got {prompt!r}")
    return [(10**place, token) for operand in operands for place, token in enumerate(operand)]


def _realise(prompt: str, rng: random.Random) -> int:
    """Draw every smudged digit and return the realised sum."""
    total = 0
    for power, token in parse_prompt(prompt):
        (seen, certainty), *other = digit_readings(token)
        total += power * (seen if not other or rng.random() < certainty else other[0][0])
    return total


def _join(digits: Sequence[str]) -> str:
    half = len(digits) // 2
    return " ".join([*digits[:half], "+", *digits[half:]])


def _single_digit_prompts() -> Iterator[str]:
    """All 900 prompts of one digit per operand."""
    tokens = [f"{digit}{mark}" for digit in range(10) for mark in MARKS]
    return (_join(pair) for pair in itertools.product(tokens, repeat=2))


def _draw_prompt(rng: random.Random) -> str:
    """Draw a prompt of two or three digits per operand; the most significant digit looks like 1 to 9."""
    n = rng.choices(list(DIGIT_SHARES), weights=list(DIGIT_SHARES.values()))[0]
    smudged = rng.choices(list(SMUDGED_SHARES), weights=list(SMUDGED_SHARES.values()))[0]
    digits = [str(rng.randint(1 if place % n == n - 1 else 0, 9)) for place in range(2 * n)]
    for place in rng.sample(range(2 * n), smudged):
        digits[place] += rng.choice(SMUDGES)
    return _join(digits)


class Sums(Task):
    """Addition with smudged digits.

    A prompt belongs to one split by its hash, whatever the seed, and occurs in one row: held-out prompts are never
    trained on, not even by a model trained with another seed. The small space of one-digit operands is used up, 900
    prompts in all, so they are about 2 % of each split; the other rows are half two-digit, half three-digit.

    Args:
        seed: of the drawn prompts, of their hidden digits and of the order.
        sizes: rows per split, at least as many as the one-digit prompts of the split (540, 270 and 90 or so).
    """

    name = "sums"
    symbols = ("+", *(f"{digit}{mark}" for mark in MARKS for digit in range(10)))
    max_prompt_words = 2 * MAX_DIGITS + 1
    max_answer_words = MAX_DIGITS + 1

    def __init__(self, seed: int = 0, sizes: Mapping[Split, int] | None = None) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an int, got {seed!r}")
        self.seed = seed
        self.sizes: dict[Split, int] = {**SIZES, **(sizes or {})}
        if unknown := set(self.sizes) - set(SIZES):
            raise ValueError(f"sizes must have keys among {list(SIZES)}, got {sorted(unknown)}")

    def _build(self, split: Split) -> Sequence[Row]:
        # Seeding with a string is stable over processes and Python versions: random.Random hashes it with SHA-512.
        rng = random.Random(f"sums/{split}/{self.seed}")
        prompts = dict.fromkeys(prompt for prompt in _single_digit_prompts() if split_of(prompt) == split)
        if len(prompts) > self.sizes[split]:
            raise ValueError(f"sizes[{split!r}] must be at least {len(prompts)}, got {self.sizes[split]}")
        while len(prompts) < self.sizes[split]:
            prompt = _draw_prompt(rng)
            if split_of(prompt) == split:
                prompts[prompt] = None
        rows = [self._row(prompt, rng) for prompt in prompts]
        rng.shuffle(rows)
        return rows

    @staticmethod
    def _row(prompt: str, rng: random.Random) -> Row:
        answer = write_number(_realise(prompt, rng))
        return {"id": f"sums/{prompt.replace(' ', '')}", "prompt": prompt, "answer": [answer], "demonstration": answer}

    def posterior(self, row: Row) -> dict[str, float]:
        """P(sum | prompt), by enumeration of the smudged digits: ``{answer text: probability}``, sums to 1.

        Uses nothing of the row but its prompt.
        """
        powers, tokens = zip(*parse_prompt(row["prompt"]), strict=True)
        found: dict[str, float] = {}
        for reading in itertools.product(*map(digit_readings, tokens)):
            total, probability = 0, 1.0
            for power, (digit, likelihood) in zip(powers, reading, strict=True):
                total += power * digit
                probability *= likelihood
            answer = write_number(total)
            found[answer] = found.get(answer, 0.0) + probability
        return found

    def success_probability(self, response: str, row: Row) -> float:
        """The probability, over the hidden digits, that the verifier calls this response right.

        This is the confidence an ideal reader of the prompt would state with that answer; 0 for an impossible answer.
        """
        # One verifier decides what counts as giving an answer; asked about each possible truth in turn.
        return sum(
            probability * self.verifier(response, {**row, "answer": [answer]}).correct
            for answer, probability in self.posterior(row).items()
        )
