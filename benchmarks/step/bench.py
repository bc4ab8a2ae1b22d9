"""The parts of a training step: models, rollouts, implementations, and the reference loss and gradients."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure
from benchmarks.definitions import IGNORE_INDEX
from benchmarks.peers import official, ours, plain
from benchmarks.step.cases import StepCase

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

    from caop_fast.training.scoring import Completions

Prompts = list[list[int]]
STAGES = ("rollout", "teacher", "student", "loss", "optimiser")
FIRST_SEED = 1000  # of the rollouts whose loss and gradients are checked; the timed rounds use the next ones
AT_ONCE = 4  # rollouts whose logits the reference holds at a time
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Batch:
    """Sampled rollouts on the device: R of them, L tokens in the longest.

    Attributes:
        prompts, teacher_prompts: token ids; ``completions.prompt_index`` gives the prompt of each rollout.
        completions: ids and mask [R, L].
        lengths: tokens of each rollout, known to the host.
        rows: int64 [N], positions of the loss tokens in the flattened [R * L].
        pad: id of the padding token.
        beta: of the divergence.
    """

    prompts: Prompts
    teacher_prompts: Prompts
    completions: Completions
    lengths: list[int]
    rows: Tensor
    pad: int
    beta: float

    @property
    def tokens(self) -> int:
        """Number of loss tokens."""
        return sum(self.lengths)


@dataclass(frozen=True)
class Implementation:
    """How the loss is computed from the rollouts.

    Attributes:
        forward: maps (model, its prompts, batch) to what ``loss`` takes, for teacher and student alike.
        loss: maps (student's, teacher's, batch) to the mean divergence over the loss tokens, differentiable.
    """

    forward: Callable[[Qwen3ForCausalLM, Prompts, Batch], Any]
    loss: Callable[[Any, Any, Batch], Tensor]


def _hidden(model: Qwen3ForCausalLM, prompts: Prompts, batch: Batch) -> tuple[Tensor, Tensor]:
    """Hidden states [N, H] of the loss tokens, each prompt run once for all of its rollouts; and the head [V, H]."""
    from caop_fast.training.scoring import completion_hidden

    hidden = completion_hidden(model, prompts, batch.completions, pad_id=batch.pad)
    return hidden.flatten(0, 1)[batch.rows], model.lm_head.weight


def _linear_loss(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
    from caop_fast import linear_distillation_loss

    labels = batch.completions.ids.flatten()[batch.rows]  # for the log-probabilities that the official loop reports
    return ours.required(linear_distillation_loss(*student, *teacher, labels, beta=batch.beta).loss)


def _logits(model: Qwen3ForCausalLM, prompts: Prompts, batch: Batch) -> Tensor:
    """Float32 logits [R, L, V]: prompt and completion as one sequence for every rollout, without a cache."""
    done, longest = batch.completions, max(map(len, prompts))
    left = [[batch.pad] * (longest - len(ids)) + ids for ids in prompts]
    prompt_ids = torch.tensor(left, device=done.ids.device)[done.prompt_index]
    out = model(
        input_ids=torch.cat([prompt_ids, done.ids], dim=1),
        attention_mask=torch.cat([(prompt_ids != batch.pad).to(done.mask.dtype), done.mask], dim=1),
        logits_to_keep=done.ids.shape[1] + 1,
        use_cache=False,
    )
    return out.logits[:, :-1].float()


def _logits_loss(student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
    labels = batch.completions.ids.masked_fill(batch.completions.mask == 0, IGNORE_INDEX)
    return official.loss(student, teacher, labels, batch.beta)[0]


IMPLEMENTATIONS = {
    "caop_fast": Implementation(_hidden, _linear_loss),
    "official": Implementation(_logits, _logits_loss),
}


class Clock:
    """Marks the ends of stages: by events on a GPU, without synchronization, by wall time on a CPU."""

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
        """Milliseconds of each stage; synchronizes."""
        measure.synchronize(self._device)
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._device.type == "cuda":
            spent = [start.elapsed_time(end) for start, end in pairs]
        else:
            spent = [1e3 * (end - start) for start, end in pairs]
        return dict(zip(STAGES, spent, strict=True))


@dataclass(frozen=True)
class Taken:
    """A step that was taken.

    Attributes:
        loss: scalar on the device.
        batch: its rollouts.
        clock: the ends of its stages.
        gradients: of some weights by name, where they were kept.
    """

    loss: Tensor
    batch: Batch
    clock: Clock
    gradients: dict[str, Tensor | None]


@dataclass(frozen=True)
class Tokenizer:
    """The part of a tokenizer that sampling uses."""

    eos_token_id: int
    pad_token_id: int

    def batch_decode(self, sequences: Sequence[Sequence[int]], **_: Any) -> list[str]:
        return ["" for _ in sequences]


class Bench:
    """A case on a device: a student, its frozen copy as the teacher, and an optimizer, for all implementations."""

    def __init__(self, case: StepCase, device: torch.device) -> None:
        self.case, self.device = case, device
        self.tokenizer = Tokenizer(case.architecture.eos, case.architecture.pad)
        self.student = make_model(case, device)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=LEARNING_RATE, fused=True)
        draw = random.Random(0)
        self.prompts = _prompts(case, case.prompt_tokens, draw)
        self.teacher_prompts = _prompts(case, case.teacher_prompt_tokens, draw)
        for weight in self.student.parameters():  # allocate the optimizer's state before any step is measured
            weight.grad = torch.zeros_like(weight)
        self.optimizer.step()
        self.reset()

    def reset(self) -> None:
        """Restore the weights and the optimizer's state: a step does not depend on those before it."""
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
        from caop_fast.training import sample_rollouts

        drawn = sample_rollouts(
            self.student,
            cast("PreTrainedTokenizerBase", self.tokenizer),
            self.prompts,
            per_prompt=self.case.rollouts,
            max_new_tokens=self.case.new_tokens,
            seed=seed,
        )
        return self.batch([r.ids for r in drawn], [r.prompt_index for r in drawn])

    def batch(self, rollouts: list[list[int]], prompt_index: list[int]) -> Batch:
        """``rollouts`` with their prompts."""
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

    def step(self, implementation: Implementation, seed: int, *, keep: bool = False) -> Taken:
        """One whole step; with ``keep`` also the gradients that are compared."""
        clock = Clock(self.device)
        batch = self.sample(seed)
        clock.mark()
        with torch.no_grad():
            teacher = implementation.forward(self.teacher, batch.teacher_prompts, batch)
        clock.mark()
        student = implementation.forward(self.student, batch.prompts, batch)
        clock.mark()
        loss = implementation.loss(student, teacher, batch)
        loss.backward()
        clock.mark()
        gradients = {name: weight.grad for name, weight in self.compared().items()} if keep else {}
        self.optimizer.step()
        self.clear()
        clock.mark()
        return Taken(loss.detach(), batch, clock, gradients)

    @cached_property
    def reference(self) -> Reference:
        """Of the rollouts of ``FIRST_SEED``."""
        self.reset()
        batch = self.sample(FIRST_SEED)
        weights = self.compared()
        loss, gradients = reference(self.student, self.teacher, batch, list(weights.values()))
        return Reference(batch.completions.ids, loss, dict(zip(weights, gradients, strict=True)))

    def compared(self) -> dict[str, Tensor]:
        """Weights whose gradients are compared: one that prompts contribute to, that of the last layer, the head."""
        names = {
            "values of the first layer": "model.layers.0.self_attn.v_proj.weight",
            "output of the last layer": f"model.layers.{self.case.layers - 1}.mlp.down_proj.weight",
            "head": "lm_head.weight",
        }
        return {name: self.student.get_parameter(path) for name, path in names.items()}


@dataclass(frozen=True)
class Reference:
    """Sampled ids [R, L], the loss on them, and its gradients in float32 by the name of the weight."""

    ids: Tensor
    loss: float
    gradients: dict[str, Tensor]

    def loss_error(self, taken: Taken) -> float:
        """Relative error of the loss."""
        return abs(float(taken.loss) - self.loss) / abs(self.loss)

    def gradient_errors(self, taken: Taken) -> dict[str, float]:
        """Relative errors in Euclidean norms."""
        found = {}
        for name, right in self.gradients.items():
            mine = taken.gradients[name]
            mine = torch.zeros_like(right) if mine is None else mine.float()
            found[name] = float((mine - right).norm() / right.norm())
        return found


def make_model(case: StepCase, device: torch.device) -> Qwen3ForCausalLM:
    """A model with random weights, initialized on ``device`` in the dtype of ``case``."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    a = case.architecture
    config = Qwen3Config.from_dict(
        {
            "vocab_size": a.vocab,
            "hidden_size": a.hidden,
            "intermediate_size": a.intermediate,
            "num_hidden_layers": case.layers,
            "num_attention_heads": a.heads,
            "num_key_value_heads": a.kv_heads,
            "head_dim": a.head_dim,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "tie_word_embeddings": a.tied,
            "eos_token_id": a.eos,
        }
    )
    with torch.device("meta"):  # transformers would initialize large matrices twice, and the tied head as well
        model = Qwen3ForCausalLM._from_config(config, dtype=getattr(torch, case.dtype))
    model.to_empty(device=device).tie_weights()
    with torch.device(device):  # its buffers are computed
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    draw = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, config.initializer_range, generator=draw) if weight.ndim == 2 else weight.fill_(1.0)
    return model.train()


def _prompts(case: StepCase, longest: int, draw: random.Random) -> Prompts:
    """Random ids other than padding and end; lengths from three quarters of ``longest`` to ``longest``."""
    a = case.architecture
    ids = [i for i in range(a.vocab) if i not in (a.pad, a.eos)]
    steps = max(1, case.prompts - 1)
    lengths = [longest - (longest // 4) * (steps - i) // steps for i in range(case.prompts)]
    return [draw.choices(ids, k=length) for length in lengths]


def reference(
    student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, batch: Batch, weights: Sequence[Tensor]
) -> tuple[float, list[Tensor]]:
    """The loss from its definition and its gradients by ``weights``, in float32.

    Each rollout runs by itself without padding or sharing, and logits are float32 products.
    """

    def logits(model: Qwen3ForCausalLM, prompts: Prompts, rollouts: list[tuple[int, Tensor]]) -> Tensor:
        hidden = []
        for i, ids in rollouts:
            whole = torch.cat([torch.tensor(prompts[i], device=ids.device), ids[:-1]])
            out = model.model(input_ids=whole[None], use_cache=False).last_hidden_state
            hidden.append(out[0, len(prompts[i]) - 1 :])
        return F.linear(torch.cat(hidden).float(), model.lm_head.weight.float())

    done = batch.completions
    cut = [ids[:length] for ids, length in zip(done.ids, batch.lengths, strict=True)]
    rollouts = list(zip(done.prompt_index.tolist(), cut, strict=True))
    loss = 0.0
    gradients: list[Tensor] = []
    for start in range(0, len(rollouts), AT_ONCE):
        some = rollouts[start : start + AT_ONCE]
        with torch.no_grad():
            theirs = logits(teacher, batch.teacher_prompts, some)
        mine = logits(student, batch.prompts, some)
        labels = torch.cat([ids for _, ids in some])
        part = plain.divergence(mine, theirs, labels, batch.beta)[1].sum() / batch.tokens
        more = torch.autograd.grad(part, weights)
        if gradients:
            for total, gradient in zip(gradients, more, strict=True):
                total += gradient
        else:
            gradients = [gradient.float() for gradient in more]
        loss += float(part.detach())
    return loss, gradients
