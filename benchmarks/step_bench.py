"""What one step of on-policy distillation is made of: models, rollouts, the contenders, and what is right.

``step.py`` measures it.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure
from benchmarks.peers import official, plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from benchmarks.step import Architecture, StepCase
    from caop_fast.training.scoring import Completions

STAGES = ("rollout", "teacher", "student", "loss", "optimiser")
CHECKED = 2  # prompts, and rollouts of each, whose gradients are compared
FIRST_SEED = 1000  # of the rollouts that are checked; the timed rounds take those that follow
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Batch:
    """Sampled rollouts on the device: R of them, L tokens in the longest.

    Attributes:
        prompts, teacher_prompts: token ids, of which ``completions.prompt_index`` says whose is which.
        completions: ids and mask [R, L].
        lengths: tokens of each rollout, known to the host.
        rows: int64 [N], where the loss tokens lie in the flattened [R * L].
        pad: id of what fills up.
        beta: of the divergence.
    """

    prompts: list[list[int]]
    teacher_prompts: list[list[int]]
    completions: Completions
    lengths: list[int]
    rows: Tensor
    pad: int
    beta: float

    @property
    def tokens(self) -> int:
        """Loss tokens."""
        return sum(self.lengths)


@dataclass(frozen=True)
class Contender:
    """How a step comes from rollouts to a loss.

    Attributes:
        forward: (model, its prompts, batch) to whatever ``loss`` takes, for teacher and student alike.
        loss: (student's, teacher's, batch) to the mean divergence over the loss tokens, differentiable.
    """

    forward: Callable[[PreTrainedModel, list[list[int]], Batch], Any]
    loss: Callable[[Any, Any, Batch], Tensor]


def _hidden(model: PreTrainedModel, prompts: list[list[int]], batch: Batch) -> tuple[Tensor, Tensor]:
    """Hidden states [N, H] of the loss tokens, each prompt run once for all of its rollouts; and the head [V, H]."""
    from caop_fast.training.head import language_head
    from caop_fast.training.scoring import completion_hidden

    hidden = completion_hidden(model, prompts, batch.completions, pad_id=batch.pad)
    return hidden.flatten(0, 1)[batch.rows], language_head(model).weight


def _linear_loss(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
    from caop_fast import linear_distillation_loss

    labels = batch.completions.ids.flatten()[batch.rows]  # for the log-probabilities that the official loop reports
    return linear_distillation_loss(*student, *teacher, labels, beta=batch.beta).loss


def _logits(model: PreTrainedModel, prompts: list[list[int]], batch: Batch) -> Tensor:
    """Float32 logits [R, L, V]: prompt and completion as one sequence for every rollout, without a cache."""
    from caop_fast.training.padding import pad_left

    done = batch.completions
    prompt_ids, prompt_mask = pad_left(prompts, batch.pad, done.ids.device)
    out = model(
        input_ids=torch.cat([prompt_ids[done.prompt_index], done.ids], dim=1),
        attention_mask=torch.cat([prompt_mask[done.prompt_index], done.mask], dim=1),
        logits_to_keep=done.ids.shape[1] + 1,
        use_cache=False,
    )
    return out.logits[:, :-1].float()


def _logits_loss(student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
    labels = batch.completions.ids.masked_fill(batch.completions.mask == 0, -100)
    return official.loss(student, teacher, labels, batch.beta)[0]


CONTENDERS = {"caop_fast": Contender(_hidden, _linear_loss), "official": Contender(_logits, _logits_loss)}


class Clock:
    """Marks the ends of stages: by events on a GPU, for which nobody waits, by wall time on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []
        self.mark()

    def mark(self) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def split(self) -> dict[str, float]:
        """Milliseconds of each stage; waits for the device."""
        measure.synchronize(self._device)
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._device.type == "cuda":
            spent = [start.elapsed_time(end) for start, end in pairs]
        else:
            spent = [1e3 * (end - start) for start, end in pairs]
        return dict(zip(STAGES, spent, strict=True))


@dataclass(frozen=True)
class Taken:
    """A step that was taken: its loss (a scalar on the device), its rollouts, and when its stages ended."""

    loss: Tensor
    batch: Batch
    clock: Clock


class Tokenizer:
    """As much of one as sampling asks for."""

    def __init__(self, architecture: Architecture) -> None:
        self.eos_token_id, self.pad_token_id = architecture.eos, architecture.pad

    def batch_decode(self, sequences: Sequence[Sequence[int]], **_: Any) -> list[str]:
        return ["" for _ in sequences]


class Bench:
    """A case on a device: one student, its frozen copy as the teacher, one optimiser, the same for all contenders."""

    def __init__(self, case: StepCase, device: torch.device) -> None:
        self.case, self.device = case, device
        self.tokenizer = Tokenizer(case.architecture)
        self.student = make_model(case, device)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=LEARNING_RATE, fused=True)
        draw = random.Random(0)
        self.prompts = _prompts(case, case.prompt_tokens, draw)
        self.teacher_prompts = _prompts(case, case.teacher_prompt_tokens, draw)

    def reset(self) -> None:
        """Weights and optimiser as they were made: a step sees nothing of those before it."""
        self.clear()
        with torch.no_grad():
            for mine, first in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                mine.copy_(first)
            for state in self.optimizer.state.values():
                for held in state.values():
                    held.zero_()
        measure.synchronize(self.device)

    def clear(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def sample(self, seed: int) -> Batch:
        """Rollouts of the student, on the device."""
        from caop_fast.training.rollouts import sample_rollouts

        drawn = sample_rollouts(
            self.student,
            self.tokenizer,
            self.prompts,
            per_prompt=self.case.rollouts,
            max_new_tokens=self.case.new_tokens,
            seed=seed,
        )
        return self.batch([r.ids for r in drawn], [r.prompt_index for r in drawn])

    def batch(self, rollouts: list[list[int]], prompt_index: list[int]) -> Batch:
        """``rollouts`` with the prompts that they answer."""
        from caop_fast.training.scoring import Completions

        pad, lengths = self.tokenizer.pad_token_id, [len(r) for r in rollouts]
        rows = [r * max(lengths) + j for r, length in enumerate(lengths) for j in range(length)]
        return Batch(
            self.prompts[: max(prompt_index) + 1],
            self.teacher_prompts[: max(prompt_index) + 1],
            Completions.pack(rollouts, prompt_index, pad, self.device),
            lengths,
            torch.tensor(rows, device=self.device),
            pad,
            self.case.beta,
        )

    def step(self, contender: Contender, seed: int) -> Taken:
        """One step, whole."""
        clock = Clock(self.device)
        batch = self.sample(seed)
        clock.mark()
        loss = self._loss(contender, batch, clock)
        loss.backward()
        clock.mark()
        self.optimizer.step()
        self.clear()
        clock.mark()
        return Taken(loss.detach(), batch, clock)

    def _loss(self, contender: Contender, batch: Batch, clock: Clock | None = None) -> Tensor:
        mark = clock.mark if clock is not None else lambda: None
        with torch.no_grad():
            teacher = contender.forward(self.teacher, batch.teacher_prompts, batch)
        mark()
        student = contender.forward(self.student, batch.prompts, batch)
        mark()
        return contender.loss(student, teacher, batch)

    @cached_property
    def truth(self) -> Truth:
        """By ``reference``, with weights as they were made; made once for all contenders."""
        self.reset()
        whole = self.sample(FIRST_SEED)
        ids = [c[:length].tolist() for c, length in zip(whole.completions.ids, whole.lengths, strict=True)]
        index = whole.completions.prompt_index.tolist()
        # A few rollouts of unequal length, so that what pads them is seen to count for nothing.
        few = [p * self.case.rollouts + k for p in range(min(CHECKED, self.case.prompts)) for k in range(CHECKED)]
        few = [r for r in few if r < len(ids) and index[r] < CHECKED]
        small = self.batch([ids[r][: max(1, len(ids[r]) - i)] for i, r in enumerate(few)], [index[r] for r in few])
        loss = reference(self.student, self.teacher, small)
        gradients = {name: weight.grad for name, weight in self._compared().items()}
        self.clear()
        with torch.no_grad():
            whole_loss = reference(self.student, self.teacher, whole)
        return Truth(small, loss, gradients, whole_loss)

    def errors(self, contender: Contender) -> Errors:
        """How far ``contender`` is from ``truth`` on its few rollouts."""
        truth = self.truth
        self.reset()
        loss = self._loss(contender, truth.batch)
        loss.backward()
        found = {}
        for name, weight in self._compared().items():
            right = truth.gradients[name].float()
            mine = weight.grad.float() if weight.grad is not None else torch.zeros_like(right)
            found[name] = float((mine - right).norm() / right.norm())
        self.optimizer.step()  # here, at the latest, its state is made: it is held before a step
        self.clear()
        return Errors(relative(loss, truth.loss), found)

    def _compared(self) -> dict[str, Tensor]:
        """Weights whose gradients are compared: what the prompt's values flow through, the last of the body, the head.

        With one layer the first two lie in the same.
        """
        from caop_fast.training.head import backbone, language_head

        layers = backbone(self.student).layers
        return {
            "values of the first layer": layers[0].self_attn.v_proj.weight,
            "output of the last layer": layers[-1].mlp.down_proj.weight,
            "head": language_head(self.student).weight,
        }


@dataclass(frozen=True)
class Truth:
    """A few rollouts with their loss and the gradients of some weights, and the loss of a whole step's."""

    batch: Batch
    loss: Tensor
    gradients: dict[str, Tensor]
    whole_loss: Tensor


@dataclass(frozen=True)
class Errors:
    """Relative errors of a loss, and of gradients (of their Euclidean norms) by the name of the weight."""

    loss: float
    gradients: dict[str, float]


def relative(found: Tensor, right: Tensor) -> float:
    """|found - right| / |right| of scalars."""
    return abs(float(found.detach()) - float(right)) / abs(float(right))


def make_model(case: StepCase, device: torch.device) -> PreTrainedModel:
    """Random weights, drawn on ``device`` in the dtype of ``case``."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    a = case.architecture
    config = Qwen3Config(
        vocab_size=a.vocab,
        hidden_size=a.hidden,
        intermediate_size=a.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=a.heads,
        num_key_value_heads=a.kv_heads,
        head_dim=a.head_dim,
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=a.tied,
        eos_token_id=a.eos,
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        return Qwen3ForCausalLM._from_config(config, dtype=getattr(torch, case.dtype)).train()


def _prompts(case: StepCase, longest: int, draw: random.Random) -> list[list[int]]:
    """Random ids, from three quarters of ``longest`` to all of it."""
    a = case.architecture
    steps = max(1, case.prompts - 1)
    lengths = [longest - (longest // 4) * (steps - i) // steps for i in range(case.prompts)]
    return [[draw.choice(range(max(a.eos, a.pad) + 1, a.vocab)) for _ in range(length)] for length in lengths]


def reference(student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch) -> Tensor:
    """The loss as it is defined, rollout by rollout: nothing is padded or shared, logits are float32 products.

    Where gradients are on, those of ``student`` are made.
    """
    from caop_fast.training.head import backbone, language_head

    def logits(model: PreTrainedModel, prompt: list[int], ids: Tensor) -> Tensor:
        whole = torch.cat([torch.tensor(prompt, device=ids.device), ids[:-1]])
        hidden = backbone(model)(input_ids=whole[None], use_cache=False).last_hidden_state[0, len(prompt) - 1 :]
        return F.linear(hidden.float(), language_head(model).weight.float())

    total = torch.zeros((), dtype=torch.float64, device=batch.rows.device)
    done = batch.completions
    for ids, length, i in zip(done.ids, batch.lengths, done.prompt_index.tolist(), strict=True):
        labels = ids[:length]
        with torch.no_grad():
            theirs = logits(teacher, batch.teacher_prompts[i], labels)
        mine = logits(student, batch.prompts[i], labels)
        part = plain.divergence(mine, theirs, labels, batch.beta)[1].sum() / batch.tokens
        if part.requires_grad:
            part.backward()
        total += part.detach()
    return total
