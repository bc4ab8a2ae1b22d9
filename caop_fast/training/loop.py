"""The training loop: sample, verify, distil, update the teacher, log. Resumable; deterministic given its seed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from caop_fast.calibration.files import write_atomic
from caop_fast.training.checkpoint import guard_interrupt, load_checkpoint, save_atomically
from caop_fast.training.config import TrainConfig
from caop_fast.training.history import RolloutWindow
from caop_fast.training.model import check_logits
from caop_fast.training.reading import ValueGrid
from caop_fast.training.rollouts import seeded
from caop_fast.training.step import Method, accumulate_gradients, build_groups, sample_and_verify, student_prompts
from caop_fast.training.teacher_weights import EmaTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainResult:
    """The result of a run: the trained `student` (the object passed in) and a `history` record per logging window."""

    student: PreTrainedModel
    history: list[dict[str, Any]]


def train(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    method: Method,
    config: TrainConfig,
    *,
    out: str | Path | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> TrainResult:
    """Train `student` in place by on-policy self-distillation on `rows`.

    Args:
        student: a causal LM with float32 parameters. To compute in bfloat16 call this within
            ``torch.autocast(device_type, dtype=torch.bfloat16)``; one such region around the whole run is right, since
            the casts it caches are dropped whenever the weights have changed.
        rows: each a mapping with ``id``, ``prompt``, ``answer`` as the verifier wants it and ``demonstration``, which
            only the teacher sees.
        out: folder for ``checkpoint.pt`` and ``history.jsonl``. A run found there is resumed if its configuration and
            rows are the same. Ctrl-C finishes the step, saves, and raises KeyboardInterrupt.
        on_step: called after every step with its number (from 1) and loss; if it raises, the step is saved first.

    Raises:
        TypeError: parameters in other dtypes than float32, or a model whose logits the linear losses cannot give (see
            `check_logits`).
        ValueError: too few rows, a prompt over its budget, or a folder of another run.
        FloatingPointError: a loss or gradient norm that is not finite. Student, teacher, optimizer and the last
            checkpoint are then those of the step before.
    """
    wrong = sorted({str(p.dtype) for p in student.parameters()} - {"torch.float32"})
    if wrong:
        raise TypeError(
            f"student must have float32 parameters, got {', '.join(wrong)}: AdamW and the averaged teacher lose small "
            "updates in 16 bits. Load it in float32 and call train within torch.autocast, which computes in 16 bits"
        )
    if len(rows) < config.prompts_per_step:
        raise ValueError(f"rows must hold at least prompts_per_step={config.prompts_per_step} rows, got {len(rows)}")
    run = _Run(student, config, [str(r["id"]) for r in rows], Path(out) if out is not None else None)
    run.resume()
    prompts = student_prompts(rows, tokenizer, config.max_prompt_tokens)
    check_logits(student, prompts[0])
    grid = ValueGrid.of(tokenizer, method.style, student.device, single_tokens=config.arm == "direct")
    student.train()
    with guard_interrupt() as guard:
        while run.step < config.steps:
            chosen = batch_indices(len(rows), config.prompts_per_step, run.step, config.seed)
            batch_rows, batch_prompts = [rows[i] for i in chosen], [prompts[i] for i in chosen]

            sampled = sample_and_verify(
                student, tokenizer, batch_rows, batch_prompts, method, config, seed=step_seed(config.seed, run.step)
            )
            groups = build_groups(sampled, batch_rows, batch_prompts, tokenizer, method, config)
            run.optimizer.zero_grad(set_to_none=True)
            with seeded(step_seed(config.seed, run.step) ^ 1, student.device):  # dropout, where the model has any
                output = accumulate_gradients(student, run.teacher.model, groups, tokenizer, grid, config)
            loss = clip_gradients(student, output.loss, config.max_grad_norm, step=run.step + 1)
            run.optimizer.step()
            run.schedule.step()
            run.teacher.update(student)

            run.window.add(sampled, output)
            run.finish_step()
            try:
                if on_step:
                    on_step(run.step, loss)
                guard.check()
            except BaseException:
                run.save()
                raise
    run.save()
    return TrainResult(student, run.history)


def clip_gradients(student: nn.Module, loss: Tensor, max_norm: float, *, step: int) -> float:
    """Scale the gradients of `student` to a norm of at most `max_norm`; returns the loss as a number.

    Raises:
        FloatingPointError: the loss or the norm is not finite. The gradients are dropped, so that nothing can apply
            them.
    """
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    # The only device synchronization of a step besides sampling.
    loss_value, norm_value = torch.stack([loss.detach().float(), norm.to(loss.device, torch.float32)]).tolist()
    if math.isfinite(loss_value) and math.isfinite(norm_value):
        torch.nn.utils.clip_grads_with_norm_(student.parameters(), max_norm, norm)
        return loss_value
    wrong = [n for n, p in student.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    student.zero_grad(set_to_none=True)
    raise FloatingPointError(
        f"step {step}: loss {loss_value} or gradient norm {norm_value} is not finite (parameters with such gradients: "
        f"{', '.join(wrong[:5]) or 'none'}{more}); the step was not applied. Usual causes: a learning rate that is too "
        "high, or float16, whose range is too small without loss scaling (compute in bfloat16)"
    )


def batch_indices(n_rows: int, batch: int, step: int, seed: int) -> list[int]:
    """Row indices of a step: reshuffled from `seed` every epoch; the last incomplete batch of an epoch is dropped."""
    per_epoch = n_rows // batch
    epoch, position = divmod(step, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(n_rows)
    return order[position * batch : (position + 1) * batch].tolist()


def step_seed(seed: int, step: int) -> int:
    """The sampling seed of a step: steps and runs draw independent numbers."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)


class _Run:
    """The state of a run: all that a checkpoint holds."""

    def __init__(self, student: PreTrainedModel, config: TrainConfig, row_ids: Sequence[str], out: Path | None) -> None:
        self.student, self.config, self.out = student, config, out
        self.data = hashlib.sha256(json.dumps(row_ids).encode()).hexdigest()
        self.teacher = EmaTeacher(student, config.ema_rate)
        self.optimizer = torch.optim.AdamW(
            student.parameters(),
            lr=config.learning_rate,
            betas=config.adam_betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, config.warmup_steps, config.steps)
        self.window = RolloutWindow()
        self.history: list[dict[str, Any]] = []
        self.step = 0

    def finish_step(self) -> None:
        """Count the step; append a history record and save a checkpoint where they are due."""
        self.step += 1
        if self.step % self.config.log_every == 0 or self.step == self.config.steps:
            self.history.append(self.window.record(self.step))
        every = self.config.checkpoint_every
        if every and self.step % every == 0:
            self.save()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, as tensors and plain values."""
        return {
            "config": self.config.to_dict(),
            "data": self.data,
            "step": self.step,
            "history": self.history,
            "window": self.window.state(),
            "student": self.student.state_dict(),
            "teacher": self.teacher.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def save(self) -> None:
        """Write `state` and the history to the run's folder, if it has one."""
        if self.out is None:
            return
        save_atomically(self.state(), self.out / "checkpoint.pt")
        write_atomic(self.out / "history.jsonl", "".join(json.dumps(r) + "\n" for r in self.history))

    def resume(self) -> None:
        path = self.out / "checkpoint.pt" if self.out is not None else None
        if path is None or not path.exists():
            return
        state = load_checkpoint(path)
        if state["config"] != self.config.to_dict():
            changed = sorted(k for k, v in self.config.to_dict().items() if state["config"].get(k) != v)
            raise ValueError(
                f"out={str(self.out)!r} holds a run with another configuration (differs in {changed}); "
                "name another folder"
            )
        if state["data"] != self.data:
            raise ValueError(f"out={str(self.out)!r} holds a run on other rows; name another folder")
        self.student.load_state_dict(state["student"])
        self.teacher.model.load_state_dict(state["teacher"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.window.load(state["window"])
        self.history, self.step = state["history"], state["step"]
