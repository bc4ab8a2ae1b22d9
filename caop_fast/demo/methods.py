"""One method of the demo: train from the common base, answer every held-out prompt twice, save the results.

Each method runs in its own process with one torch thread: with a model this small two processes beat two threads.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from caop_fast.calibration.files import write_atomic
from caop_fast.demo.closed_form import KnowsPosterior, success_probabilities
from caop_fast.demo.task import Row
from caop_fast.demo.tasks import load_task
from caop_fast.training import Evaluation, Method, TrainConfig, evaluate, student_prompts, train

EVALUATION_SEED = 1_000_003  # not the seed of any training step


@dataclasses.dataclass(frozen=True)
class MethodJob:
    """The arguments of a method's process.

    Attributes:
        name: ``base`` (no training) or a method of `TrainConfig`.
        folder: the run's folder: it has base/; methods/NAME/ and answers/NAME*.jsonl are written.
        train: the training configuration; None for ``base``.
        heldout: how many held-out prompts to answer; None is all.
    """

    name: str
    task: str
    seed: int
    folder: Path
    train: TrainConfig | None
    heldout: int | None = None

    @property
    def result_path(self) -> Path:
        """Exists once the method is done."""
        return self.folder / "methods" / self.name / "result.json"


def run_method(job: MethodJob, report: Callable[[str, int], None]) -> None:
    """Train and evaluate, calling `report(phase, done)`: phase ``train`` (steps) or ``evaluate`` (prompts answered)."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
    task = load_task(job.task, seed=job.seed)
    tokenizer = AutoTokenizer.from_pretrained(job.folder / "base")
    model = AutoModelForCausalLM.from_pretrained(job.folder / "base", dtype=torch.float32)
    method = Method(task.verifier, task.teacher, task.style)
    history: list[dict[str, Any]] = []
    if job.train is not None:
        result = train(
            model,
            tokenizer,
            task.rows("train"),
            method,
            job.train,
            out=job.folder / "methods" / job.name,
            on_step=lambda step, loss: report("train", step),
        )
        history = result.history
        model.save_pretrained(job.folder / "methods" / job.name / "model")
    rows = task.rows("heldout")[: job.heldout]
    prompts = student_prompts(rows, tokenizer, task.max_prompt_tokens)
    done = 0

    def answered(n: int) -> None:
        nonlocal done
        done += n
        report("evaluate", done)

    readings = {
        is_greedy: evaluate(
            model,
            tokenizer,
            rows,
            prompts,
            verifier=task.verifier,
            style=task.style,
            max_new_tokens=task.max_new_tokens,
            greedy=is_greedy,
            seed=job.seed + EVALUATION_SEED,
            on_progress=answered,
        )
        for is_greedy in (False, True)
    }
    for is_greedy, evaluation in readings.items():
        write_answers(job, rows, evaluation, greedy=is_greedy)
    sampled, greedy = readings[False].summary(), readings[True].summary()
    if isinstance(task, KnowsPosterior):  # the truth is known: how far is the expected confidence from it?
        ideal = success_probabilities(model, tokenizer, task, rows, prompts)
        sampled["expected"]["closed_form_mae"] = _mean_distance(readings[False].expected, ideal)
        ideal = np.array([task.success_probability(t, r) for t, r in zip(readings[True].text, rows, strict=True)])
        greedy["expected"]["closed_form_mae"] = _mean_distance(readings[True].expected, ideal)
    entry = {"name": job.name, **sampled, "greedy": greedy}
    write_atomic(job.result_path, json.dumps({"method": entry, "history": history}, indent=1, allow_nan=False) + "\n")


def _mean_distance(expected: np.ndarray, ideal: np.ndarray) -> float | None:
    distance = np.abs(expected - ideal)
    return None if np.isnan(distance).all() else float(np.nanmean(distance))


def answers_path(folder: Path, name: str, *, greedy: bool) -> Path:
    """Where a method's held-out answers are: one JSON object per line, as ``caop-fast audit`` reads them."""
    return folder / "answers" / f"{name}{'-greedy' if greedy else ''}.jsonl"


def write_answers(job: MethodJob, rows: Sequence[Row], evaluation: Evaluation, *, greedy: bool) -> None:
    """Every answer with its verdict, its stated confidence (null where unreadable) and its expected value."""
    lines = []
    for row, text, correct, confidence, expected in zip(
        rows, evaluation.text, evaluation.correct, evaluation.confidence, evaluation.expected, strict=True
    ):
        record = {
            "model": job.name,  # as the audit calls it
            "prompt_id": row["id"],
            "prompt": row["prompt"],
            "response": text,
            "correct": correct,
            "confidence": None if math.isnan(confidence) else confidence,
            "expected": None if math.isnan(expected) else round(expected, 6),
        }
        lines.append(json.dumps(record, ensure_ascii=False))
    write_atomic(answers_path(job.folder, job.name, greedy=greedy), "\n".join(lines) + "\n")


def read_answers(folder: Path, name: str, *, greedy: bool = False) -> list[Mapping[str, Any]]:
    """The records that `write_answers` wrote."""
    lines = answers_path(folder, name, greedy=greedy).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
