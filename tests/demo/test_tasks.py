"""What both tasks promise: splits, budgets, a closed vocabulary, and privileged text that stays with the teacher."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from caop_fast.caop.teacher_context import student_messages
from caop_fast.demo.task import SPLITS, Task, split_of, stable_fraction
from caop_fast.demo.tasks import TASK_NAMES, load_task
from caop_fast.demo.tokenizer import encode_chats, encode_texts
from helpers.task_digest import digest

TASKS = {name: load_task(name) for name in TASK_NAMES}


@pytest.fixture(params=TASK_NAMES)
def task(request) -> Task:
    return TASKS[request.param]


def every_row(task: Task):
    return [row for split in SPLITS for row in task.rows(split)]


def telling_rows(task: Task):
    """Some rows of every split, and the longest of all: those that meet a budget's edge."""

    def length(row):
        return len(row["prompt"].split()) + len(row["demonstration"].split())

    longest = sorted(every_row(task), key=length, reverse=True)[:300]
    return longest + [row for split in SPLITS for row in task.rows(split)[:1000]]


def test_the_hash_is_stable_across_processes_and_releases():
    # Recorded once: a change would move held-out prompts into the training of models already saved.
    assert stable_fraction("cat") == 0.4675211634764047
    assert [split_of(key) for key in ("cat", "aalto", "zebra", "3 4' + 7 1~")] == [
        "pretrain",
        "train",
        "pretrain",
        "pretrain",
    ]


def test_split_shares_are_60_30_10():
    counts = dict.fromkeys(SPLITS, 0)
    for i in range(20_000):
        counts[split_of(f"key {i}")] += 1
    assert all(0 <= stable_fraction(f"key {i}") < 1 for i in range(1000))
    for split, share in zip(SPLITS, (0.6, 0.3, 0.1), strict=True):
        assert abs(counts[split] / 20_000 - share) < 4 * (share * (1 - share) / 20_000) ** 0.5


def test_rows_are_the_same_in_a_process_with_another_hash_seed(task):
    code = "import sys; from helpers.task_digest import digest; print(digest(sys.argv[1]))"
    folders = [path for path in sys.path if path]  # as pytest was given them
    out = subprocess.run(
        [sys.executable, "-c", code, task.name],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(folders)},
    ).stdout.split()[-1]
    assert out == digest(task.name)


def test_ids_and_prompts_are_unique_and_splits_share_none(task):
    rows = every_row(task)
    assert len({row["id"] for row in rows}) == len({row["prompt"] for row in rows}) == len(rows)
    for split in SPLITS:
        assert {split} == {split_of(row["prompt" if task.name == "sums" else "word"]) for row in task.rows(split)}


def test_a_row_has_the_documented_fields(task):
    for row in every_row(task):
        assert row["demonstration"] in row["answer"]
        assert all(isinstance(row[key], str) and row[key] for key in ("id", "prompt", "demonstration"))
        assert len(set(row["answer"])) == len(row["answer"]) >= 1


def test_an_unknown_split_is_an_error(task):
    with pytest.raises(ValueError, match="split must be one of pretrain, train, heldout, got 'test'"):
        task.rows("test")


def test_an_unknown_task_is_an_error():
    with pytest.raises(ValueError, match="name must be one of pronounce, sums, got 'product'"):
        load_task("product")


def test_every_text_is_in_the_vocabulary_and_the_budgets_are_tight(task):
    tokenizer, rows = task.tokenizer(), telling_rows(task)
    student = encode_chats(tokenizer, [student_messages(row) for row in rows])
    assert max(map(len, student)) == task.max_prompt_tokens
    statement = task.style.statement(0.7)
    teacher = encode_chats(tokenizer, [task.teacher.messages(row, confidence="0.70") for row in rows])
    assert task.teacher.max_tokens - 3 <= max(map(len, teacher)) <= task.teacher.max_tokens
    right = encode_texts(tokenizer, [f"{row['demonstration']} {statement} <eos>" for row in rows])
    assert max(map(len, right)) == task.max_new_tokens - 1
    used = {word for row in every_row(task) for text in (row["prompt"], *row["answer"]) for word in text.split()}
    assert used == set(task.symbols)
    assert max(len(row["prompt"].split()) for row in every_row(task)) == task.max_prompt_words
    assert max(len(row["demonstration"].split()) for row in every_row(task)) == task.max_answer_words


def test_the_teacher_sees_the_example_and_the_note(task):
    row = task.rows("train")[0]
    ids = encode_chats(task.tokenizer(), [task.teacher.messages(row, confidence="0.60")])[0]
    prompt, answer = row["prompt"], row["demonstration"]
    assert task.tokenizer().decode(ids) == f"<bos> {prompt} <example> {answer} <note> 0.60 <answer>"
    ids = encode_chats(task.tokenizer(), [task.teacher.messages(row, confidence=None)])[0]
    assert task.tokenizer().decode(ids) == f"<bos> {prompt} <example> {answer} <answer>"


def test_the_student_sees_the_prompt_and_nothing_else(task):
    rows, tokenizer = telling_rows(task), task.tokenizer()
    student = encode_chats(tokenizer, [student_messages(row) for row in rows])
    assert student == encode_texts(tokenizer, [f"<bos> {row['prompt']} <answer>" for row in rows])


def test_the_verifier_reads_the_answer_before_the_statement(task):
    for row in task.rows("heldout")[:300]:
        for answer in row["answer"]:
            for response in (answer, f"{answer} Confidence: 0.70", f"  {answer}  Confidence: 0.00 "):
                assert task.verifier(response, row).correct == 1.0, (response, row)
        answer = row["demonstration"]
        wrong = [
            "",
            "Confidence: 1.00",
            f"{answer} {answer} Confidence: 1.00",
            f"{answer} <answer> Confidence: 1.00",
            f"<answer> {answer} Confidence: 1.00",
            f"{answer} 0.70 Confidence: 1.00",
            " ".join(answer.split()[:-1]),
        ]
        for response in wrong:
            assert task.verifier(response, row).correct == 0.0, (response, row)


def test_every_call_gives_an_equal_but_separate_tokenizer(task):
    first, second = task.tokenizer(), task.tokenizer()
    assert first.get_vocab() == second.get_vocab()
    first.padding_side = "right"
    assert second.padding_side == "left"


def test_the_vocabulary_sizes_are_the_documented_ones():
    assert {name: len(task.tokenizer()) for name, task in TASKS.items()} == {"pronounce": 93, "sums": 59}
