"""The whole demo: base model, methods in parallel, page. A stopped run is resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import platform
import queue
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from filelock import FileLock, Timeout

from caop_fast.calibration import parse_confidence
from caop_fast.calibration.files import write_atomic
from caop_fast.caop import answer_text
from caop_fast.demo.base import BaseConfig, pretrain
from caop_fast.demo.methods import MethodJob, read_answers, run_method
from caop_fast.demo.page import demo_page
from caop_fast.demo.progress import Progress
from caop_fast.demo.recipes import RECIPES
from caop_fast.demo.task import Task
from caop_fast.demo.tasks import TASK_NAMES, load_task
from caop_fast.training import ARMS, TrainConfig

ALL_METHODS = ("base", *ARMS)
PHASES = {"train": "distil", "evaluate": "held-out answers"}
N_EXAMPLES = 8
METHOD_LOCK = ".lock"  # in a method's folder, held by its process
STOP_SECONDS = 20  # for the methods to finish their step and save, once the run is being stopped


class MethodFailed(RuntimeError):
    """A method's process failed; the message has its traceback, or its exit code where it left none."""


@dataclass(frozen=True)
class DemoConfig:
    """Options of a demo run. The defaults are the published run.

    Attributes:
        task: ``pronounce`` or ``sums``.
        seed: of data order, weights and rollouts.
        methods: a subset of base, opd, caop, direct, masked.
        out: the run's folder.
        base: the base model's recipe, None for the task's own; its seed is replaced by `seed`.
        train: what all trained methods share, None for the task's own; arm, seed and the task's budgets are filled in.
        heldout: how many held-out prompts to answer; None is all.
    """

    task: str = "pronounce"
    seed: int = 0
    methods: tuple[str, ...] = ALL_METHODS
    out: Path = Path("runs/demo")
    base: BaseConfig | None = None
    train: TrainConfig | None = None
    heldout: int | None = None

    def __post_init__(self) -> None:
        if self.task not in TASK_NAMES:
            raise ValueError(f"task must be one of {', '.join(TASK_NAMES)}, got {self.task!r}")
        unknown = [m for m in self.methods if m not in ALL_METHODS]
        if unknown or not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(
                f"methods must be distinct and among {', '.join(ALL_METHODS)}, got {', '.join(self.methods) or 'none'}"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2**32), got {self.seed!r}")

    @property
    def base_config(self) -> BaseConfig:
        """How the base model is pretrained."""
        return dataclasses.replace(self.base or RECIPES[self.task].base, seed=self.seed)

    @property
    def train_config(self) -> TrainConfig:
        """What all trained methods share."""
        return self.train or RECIPES[self.task].train

    def recipe(self) -> dict[str, Any]:
        """All that the results depend on, as plain values: two runs may share work only if these are equal."""
        return {
            "task": self.task,
            "seed": self.seed,
            "heldout": self.heldout,
            "base": dataclasses.asdict(self.base_config),
            "train": self.train_config.to_dict(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Run what is not yet done in ``config.out``; return the summary, which is also written to ``summary.json``.

    A finished run, or one with another recipe, is moved aside first, never overwritten. On Ctrl-C every method finishes
    its step and saves; the same call then resumes.

    Raises:
        ValueError: ``config.out`` is in use by another demo, is no folder, or holds other things.
        MethodFailed: the process of a method failed; the others were stopped.
    """
    # The folder itself is what is locked and moved, not a link to it, and "." has no place beside it.
    config = dataclasses.replace(config, out=config.out.resolve())
    with _only_demo_in(config.out):
        return _run_demo(config)


def _run_demo(config: DemoConfig) -> dict[str, Any]:
    begin = time.monotonic()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()  # the demo shows its own
    task = load_task(config.task, seed=config.seed)
    moved = prepare_folder(config)
    with Progress() as progress:
        if moved is not None:
            progress.say(f"The earlier run was moved to {moved}")
        _train_base(config, task, progress)
        _run_methods(config, task, progress)
        progress.say("Writing the page")
        summary = _summarise(config, time.monotonic() - begin)
        demo_page(summary, _answers(config), config.out, examples=_examples(config, task), command=_command(config))
    return summary


@contextlib.contextmanager
def _only_demo_in(out: Path) -> Iterator[None]:
    """Holds `out` for this run alone. The lock lies beside the folder, which is moved; a file left behind is harmless.

    A method outlives a killed parent by the step it is in, so the methods' own locks are waited for, too.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={str(out)!r} is not a folder; name an empty or a new one")
    try:
        out.mkdir(parents=True, exist_ok=True)  # an unwritable place must not look like one that is in use
        lock = FileLock(out.parent / f".{out.name}.lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise _in_use(out) from None
    try:
        for left in out.glob(f"methods/*/{METHOD_LOCK}"):
            try:
                with FileLock(left, timeout=STOP_SECONDS):
                    pass
            except Timeout:
                raise _in_use(out) from None
        yield
    finally:
        lock.release()


def _in_use(out: Path) -> ValueError:
    return ValueError(f"out={str(out)!r} is in use by another demo; name another folder")


def prepare_folder(config: DemoConfig) -> Path | None:
    """Make ``config.out`` ready to be worked in; returns where an earlier run was moved to, if it had to be."""
    out, recipe = config.out, json.loads(json.dumps(config.recipe()))
    moved = None
    recorded = out / "run.json"
    if out.exists() and any(out.iterdir()):
        try:
            same = recorded.exists() and json.loads(recorded.read_text(encoding="utf-8")) == recipe
        except ValueError as error:  # of JSON or of UTF-8
            raise ValueError(
                f"{recorded} is broken ({error}): not known what run out={str(out)!r} holds; name another folder"
            ) from None
        if not same or (out / "summary.json").exists():
            if not recorded.exists():
                raise ValueError(f"out={str(out)!r} is a folder with other things in it; name an empty or a new one")
            moved = next(p for n in range(1, 10_000) if not (p := out.with_name(f"{out.name}.{n}")).exists())
            out.rename(moved)
    write_atomic(recorded, json.dumps(recipe, indent=1) + "\n")
    return moved


def _train_base(config: DemoConfig, task: Task, progress: Progress) -> None:
    final, building = config.out / "base", config.out / ".base"
    if final.exists():
        progress.say("Base model: done before, reused")
        return
    base = config.base_config
    tokenizer = task.tokenizer()
    bar = progress.bar("Base model, from scratch", base.steps)
    model = pretrain(task, tokenizer, base, on_step=lambda step, loss: bar.advance_to(step))
    shutil.rmtree(building, ignore_errors=True)
    model.save_pretrained(building)
    tokenizer.save_pretrained(building)
    os.replace(building, final)


def _jobs(config: DemoConfig, task: Task) -> list[MethodJob]:
    train = dataclasses.replace(
        config.train_config,
        seed=config.seed,
        max_new_tokens=task.max_new_tokens,
        max_prompt_tokens=task.max_prompt_tokens,
        max_teacher_prompt_tokens=task.max_teacher_prompt_tokens,
    )
    return [
        MethodJob(
            name=name,
            task=config.task,
            seed=config.seed,
            folder=config.out,
            train=None if name == "base" else TrainConfig.from_dict({**train.to_dict(), "arm": name}),
            heldout=config.heldout,
        )
        for name in config.methods
    ]


def _run_methods(config: DemoConfig, task: Task, progress: Progress) -> None:
    """Run the methods that are not done, as many at a time as there are cores."""
    context = _process_context()
    waiting = []
    totals = {"train": config.train_config.steps, "evaluate": 2 * len(task.rows("heldout")[: config.heldout])}
    for job in _jobs(config, task):
        if job.result_path.exists():
            progress.say(f"Method {job.name}: done before, reused")
        else:
            waiting.append(job)
    waiting.sort(key=lambda job: job.train is None)  # the short one last: it fills the gap at the end
    messages, stop = context.Queue(), context.Event()
    running: dict[str, multiprocessing.process.BaseProcess] = {}
    bars: dict[tuple[str, str], Any] = {}
    limit = max(1, min(len(waiting), os.cpu_count() or 1))
    with _stopped_together(running, stop):
        while waiting or running:
            while waiting and len(running) < limit:
                job = waiting.pop(0)
                process = context.Process(target=_method_process, args=(job, messages, stop), name=f"method {job.name}")
                process.start()
                running[job.name] = process
            try:
                name, kind, value = messages.get(timeout=0.2)
            except queue.Empty:
                died = [name for name, process in running.items() if process.exitcode not in (None, 0)]
                if died:
                    raise MethodFailed(f"method {died[0]} ended with exit code {running[died[0]].exitcode}") from None
                continue
            if kind == "failed":
                raise MethodFailed(f"method {name} failed:\n{value}")
            if kind == "done":
                running.pop(name).join()
                continue
            if (name, kind) not in bars:  # the time left is estimated from a phase's first report on
                bars[name, kind] = progress.bar(f"Method {name}: {PHASES[kind]}", totals[kind])
            bars[name, kind].advance_to(value)


def _process_context() -> SpawnContext | ForkServerContext:
    """Start processes from one that has torch and transformers imported, where the system can (fork server)."""
    if "forkserver" not in multiprocessing.get_all_start_methods():  # on Windows
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["caop_fast.demo.base", "caop_fast.demo.methods"])
    return context


@contextlib.contextmanager
def _stopped_together(running: dict[str, Any], stop: Any) -> Iterator[None]:
    """On exit no method is left running: they are asked to save and stop, then terminated."""
    try:
        yield
    finally:
        stop.set()
        deadline = time.monotonic() + STOP_SECONDS
        for process in running.values():
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.terminate()
                process.join()


def _method_process(job: MethodJob, messages: Any, stop: Any) -> None:
    # The terminal's Ctrl-C reaches every process of its group; the parent alone decides, and says so through `stop`.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_if_told() -> None:
        parent = multiprocessing.parent_process()
        if stop.is_set() or (parent is not None and not parent.is_alive()):
            raise KeyboardInterrupt

    def report(kind: str, value: int) -> None:
        end_if_told()
        messages.put((job.name, kind, value))

    lock = job.result_path.with_name(METHOD_LOCK)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=STOP_SECONDS):
            end_if_told()  # a parent that died before the lock was taken may have a successor by now
            run_method(job, report)
        messages.put((job.name, "done", None))
    except KeyboardInterrupt:
        messages.cancel_join_thread()  # nobody may be reading any more
        sys.exit(128 + signal.SIGINT)
    except BaseException:
        messages.put((job.name, "failed", traceback.format_exc()))


def _summarise(config: DemoConfig, seconds: float) -> dict[str, Any]:
    results = {}
    for name in config.methods:
        results[name] = json.loads((config.out / "methods" / name / "result.json").read_text(encoding="utf-8"))
    methods = [results[name]["method"] for name in config.methods]
    start = []
    if "base" in results:
        base = results["base"]["method"]
        start = [
            {**{k: base[k] for k in ("accuracy", "mean_confidence", "ece", "answer_entropy", "confidence_entropy")}}
        ]
        start[0] |= {"step": 0, "gap": base["overconfidence_gap"]}
    summary = {
        "task": config.task,
        "seed": config.seed,
        "seconds": round(seconds, 1),
        "n_heldout": methods[0]["n"] if methods else 0,
        "rollouts_per_prompt": config.train_config.rollouts_per_prompt,
        "methods": methods,
        "history": [
            {"method": name, **record}
            for name in config.methods
            if name != "base"
            for record in (*start, *results[name]["history"])
        ],
        "recipe": config.recipe(),
        "machine": {"python": platform.python_version(), "processor": platform.machine(), "cores": os.cpu_count()},
    }
    write_atomic(config.out / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    return summary


def _answers(config: DemoConfig) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    answers = {}
    for name in config.methods:
        records = read_answers(config.out, name)
        columns = ([r[k] for r in records] for k in ("correct", "confidence", "expected"))
        correct, confidence, expected = (np.array(c, dtype=np.float64) for c in columns)
        answers[name] = (correct, confidence, expected)
    return answers


def _examples(config: DemoConfig, task: Task) -> list[dict[str, Any]]:
    """The first held-out prompts (their order is random), as every method answered them."""
    rows = task.rows("heldout")[: config.heldout][:N_EXAMPLES]
    examples = [
        {"prompt": row.get("word", row["prompt"]), "reference": row["demonstration"], "answers": {}} for row in rows
    ]
    for name in config.methods:
        for example, record in zip(examples, read_answers(config.out, name), strict=False):
            parsed = parse_confidence(record["response"])
            example["answers"][name] = {
                "answer": answer_text(record["response"]),
                "correct": bool(record["correct"]),
                "confidence": parsed.value,
            }
    return examples


def _command(config: DemoConfig) -> str:
    parts: Sequence[str] = ("caop-fast", "demo", "--task", config.task, "--seed", str(config.seed))
    if config.methods != ALL_METHODS:
        parts = (*parts, "--methods", *config.methods)
    return " ".join(parts)
