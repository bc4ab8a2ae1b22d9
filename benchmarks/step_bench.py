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
FIRST_SEED = 1000  # of the rollouts whose loss and gradients are checked; the timed rounds take those that follow
AT_ONCE = 4  # rollouts whose logits the reference holds
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
    from caop_fast.training.model import language_head
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
    """A step that was taken.

    Attributes:
        loss: scalar on the device.
        batch: its rollouts.
        clock: when its stages ended.
        gradients: of some weights by their names, where they were to be kept.
    """

    loss: Tensor
    batch: Batch
    clock: Clock
    gradients: dict[str, Tensor | None]


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
        for weight in self.student.parameters():  # the optimiser's state is held before a step: have it made
            weight.grad = torch.zeros_like(weight)
        self.optimizer.step()
        self.reset()

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

    def step(self, contender: Contender, seed: int, *, keep: bool = False) -> Taken:
        """One step, whole; ``keep`` the gradients that are compared."""
        clock = Clock(self.device)
        batch = self.sample(seed)
        clock.mark()
        with torch.no_grad():
            teacher = contender.forward(self.teacher, batch.teacher_prompts, batch)
        clock.mark()
        student = contender.forward(self.student, batch.prompts, batch)
        clock.mark()
        loss = contender.loss(student, teacher, batch)
        loss.backward()
        clock.mark()
        gradients = {name: weight.grad for name, weight in self.compared().items()} if keep else {}
        self.optimizer.step()
        self.clear()
        clock.mark()
        return Taken(loss.detach(), batch, clock, gradients)

    @cached_property
    def truth(self) -> Truth:
        """Of the rollouts of ``FIRST_SEED``, by ``reference``; made once for all contenders."""
        self.reset()
        batch = self.sample(FIRST_SEED)
        weights = self.compared()
        loss, gradients = reference(self.student, self.teacher, batch, list(weights.values()))
        return Truth(batch.completions.ids, loss, dict(zip(weights, gradients, strict=True)))

    def compared(self) -> dict[str, Tensor]:
        """Weights whose gradients are compared: one that the prompt's tokens act on, the body's last, the head."""
        from caop_fast.training.model import backbone, language_head

        layers = backbone(self.student).layers
        return {
            "values of the first layer": layers[0].self_attn.v_proj.weight,
            "output of the last layer": layers[-1].mlp.down_proj.weight,
            "head": language_head(self.student).weight,
        }


@dataclass(frozen=True)
class Truth:
    """Sampled ids [R, L], the loss on them, and its gradients in float32 by the names of the weights."""

    ids: Tensor
    loss: float
    gradients: dict[str, Tensor]

    def loss_error(self, taken: Taken) -> float:
        """Relative."""
        return abs(float(taken.loss) - self.loss) / abs(self.loss)

    def gradient_errors(self, taken: Taken) -> dict[str, float]:
        """Of Euclidean norms, relative."""
        found = {}
        for name, right in self.gradients.items():
            mine = taken.gradients[name]
            mine = torch.zeros_like(right) if mine is None else mine.float()
            found[name] = float((mine - right).norm() / right.norm())
        return found


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
    with torch.device("meta"):  # transformers would draw large matrices twice, and the tied head besides
        model = Qwen3ForCausalLM._from_config(config, dtype=getattr(torch, case.dtype))
    model.to_empty(device=device).tie_weights()
    with torch.device(device):  # its buffers are computed, not drawn
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    draw = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, config.initializer_range, generator=draw) if weight.ndim == 2 else weight.fill_(1.0)
    return model.train()


def _prompts(case: StepCase, longest: int, draw: random.Random) -> list[list[int]]:
    """Random ids, neither padding nor the end, from three quarters of ``longest`` to all of it."""
    a = case.architecture
    able = [i for i in range(a.vocab) if i not in (a.pad, a.eos)]
    steps = max(1, case.prompts - 1)
    lengths = [longest - (longest // 4) * (steps - i) // steps for i in range(case.prompts)]
    return [draw.choices(able, k=length) for length in lengths]


def reference(
    student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, weights: Sequence[Tensor]
) -> tuple[float, list[Tensor]]:
    """The loss as it is defined and its gradients by ``weights``, in float32.

    Each rollout runs by itself: nothing is padded or shared, and logits are float32 products.
    """
    from caop_fast.training.model import backbone, language_head

    def logits(model: PreTrainedModel, prompts: list[list[int]], rollouts: list[tuple[int, Tensor]]) -> Tensor:
        hidden = []
        for i, ids in rollouts:
            whole = torch.cat([torch.tensor(prompts[i], device=ids.device), ids[:-1]])
            out = backbone(model)(input_ids=whole[None], use_cache=False).last_hidden_state
            hidden.append(out[0, len(prompts[i]) - 1 :])
        return F.linear(torch.cat(hidden).float(), language_head(model).weight.float())

    done = batch.completions
    cut = [ids[:length] for ids, length in zip(done.ids, batch.lengths, strict=True)]
    rollouts = list(zip(done.prompt_index.tolist(), cut, strict=True))
    loss, gradients = 0.0, []
    for start in range(0, len(rollouts), AT_ONCE):
        some = rollouts[start : start + AT_ONCE]
        with torch.no_grad():
            theirs = logits(teacher, batch.teacher_prompts, some)
        mine = logits(student, batch.prompts, some)
        labels = torch.cat([ids for _, ids in some])
        part = plain.divergence(mine, theirs, labels, batch.beta)[1].sum() / batch.tokens
        more = torch.autograd.grad(part, weights)
        if gradients:
            torch._foreach_add_(gradients, more)
        else:
            gradients = [g.float() for g in more]
        loss += float(part.detach())
    return loss, gradients
