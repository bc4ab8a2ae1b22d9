"""The demo's base model: a small Qwen3 trained from scratch on CPU, in about a minute, to answer in two situations.

Bare prompt: ``<bos> c a t <answer> K AE T Confidence: 0.70 <eos>``. With privileged context: ``<bos> c a t <example>
K AE T <answer> ...``, where it learns to copy the example, and the confidence of a note if there is one. In both, the
confidence it learns to state (where no note gives it) is its own probability of the reference answer in that very
situation: roughly calibrated without the example, and rightly near 1 with it. Plain distillation transfers that second,
well-founded certainty to a student that has no example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Qwen3Config, Qwen3ForCausalLM, get_cosine_schedule_with_warmup

from caop_fast.demo.task import Row, Task
from caop_fast.demo.tokenizer import encode_chats, encode_texts
from caop_fast.training.padding import pad_right

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORED = -100  # torch's ignore_index


@dataclass(frozen=True)
class BaseConfig:
    """Size of the model and recipe of its pretraining.

    Attributes:
        hidden_size, num_layers, num_heads, num_kv_heads, head_dim, intermediate_size: of the Qwen3 architecture.
        steps: optimizer steps.
        bare_per_step, example_per_step: sequences of each situation per step.
        note_share: share of the example sequences whose context ends in a note.
        corruption: probability that an answer token is replaced at the input, its target kept, in example sequences:
            the teacher must go on copying after a wrong token of the student.
        muon_lr, adamw_lr: of the weight matrices and of everything else.
        seed: of weights and data.
    """

    hidden_size: int = 128
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 256
    steps: int = 240
    bare_per_step: int = 80
    example_per_step: int = 80
    note_share: float = 0.5
    corruption: float = 0.15
    muon_lr: float = 0.02
    adamw_lr: float = 5e-3
    warmup_steps: int = 15
    seed: int = 0


def new_model(task: Task, tokenizer: PreTrainedTokenizerFast, config: BaseConfig) -> Qwen3ForCausalLM:
    """A randomly initialised model of the task's vocabulary, with tied embeddings."""
    architecture = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Qwen3ForCausalLM(architecture)


class PretrainingData:
    """Draws sequences of both situations, as inputs and targets [B, T]; targets are `IGNORED` outside the completion.

    At the confidence value the input is a random grid value (what follows never depends on it), and the target is the
    note's value, or `IGNORED` where the model's own probability has to be filled in.
    """

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row], config: BaseConfig) -> None:
        self.config, self.task, self.tokenizer, self.rows = config, task, tokenizer, rows
        self.rng = np.random.default_rng([config.seed, 1])
        self.value_ids = np.array([tokenizer.convert_tokens_to_ids(task.style.number(v)) for v in task.style.values])
        # Prompts by row number, encoded when a row is first drawn.
        self.bare_prompts: dict[int, list[int]] = {}
        self.example_prompts: dict[int, list[int]] = {}
        self.noted_prompts: dict[int, list[int]] = {}
        self.answers = encode_texts(tokenizer, [r["demonstration"] for r in rows])
        self.label = encode_texts(tokenizer, [task.style.label])[0]
        answer_words = sorted({i for a in self.answers for i in a})
        self.answer_words = np.array(answer_words)

    def _encode(self, kind: str, drawn: Sequence[int]) -> None:
        """Encode the prompts of the rows that are drawn for the first time in this situation."""
        known = self.bare_prompts if kind == "bare" else self.example_prompts
        new = sorted(set(drawn) - known.keys())
        rows, teacher = [self.rows[i] for i in new], self.task.teacher
        if kind == "bare":
            chats = encode_chats(self.tokenizer, [[{"role": "user", "content": r["prompt"]}] for r in rows])
            self.bare_prompts.update(zip(new, chats, strict=True))
            return
        plain = encode_chats(self.tokenizer, [teacher.messages(r, confidence=None) for r in rows])
        zero = self.task.style.number(0.0)
        noted = encode_chats(self.tokenizer, [teacher.messages(r, confidence=zero) for r in rows])
        self.example_prompts.update(zip(new, plain, strict=True))
        self.noted_prompts.update(zip(new, noted, strict=True))

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(ids, targets, answer_mask, value_at)``: [B, T] int64, int64, bool and the value's target position [B]."""
        n = len(self.answers)
        config, eos = self.config, self.tokenizer.eos_token_id
        inputs, targets, value_at, answer_spans = [], [], [], []
        for kind, count in (("bare", config.bare_per_step), ("example", config.example_per_step)):
            drawn = self.rng.integers(n, size=count).tolist()
            self._encode(kind, drawn)
            for i in drawn:
                answer, value_target = list(self.answers[i]), IGNORED
                if kind == "example":
                    prompt = self.example_prompts[i]
                    if self.rng.random() < config.note_share:
                        prompt = list(self.noted_prompts[i])
                        value_target = int(self.rng.choice(self.value_ids))
                        prompt[len(prompt) - 1 - prompt[::-1].index(self.value_ids[0])] = value_target
                    shown = [
                        int(self.rng.choice(self.answer_words)) if u < config.corruption else t
                        for t, u in zip(answer, self.rng.random(len(answer)), strict=True)
                    ]
                else:
                    prompt, shown = self.bare_prompts[i], answer
                value = int(self.rng.choice(self.value_ids))
                tail = [*self.label, value, eos]
                sequence = [*prompt, *shown, *tail]
                goal = [IGNORED] * len(prompt) + answer + [*self.label, value_target, eos]
                inputs.append(sequence[:-1])
                targets.append(goal[1:])
                start = len(prompt) - 1
                answer_spans.append((start, start + len(answer) + len(self.label)))
                value_at.append(start + len(answer) + len(self.label))
        ids, _ = pad_right(inputs, self.tokenizer.pad_token_id, "cpu")
        goal_ids, _ = pad_right(targets, IGNORED, "cpu")
        positions = torch.arange(ids.shape[1])
        spans = torch.tensor(answer_spans)
        answer_mask = (positions >= spans[:, :1]) & (positions < spans[:, 1:])
        return ids, goal_ids, answer_mask, torch.tensor(value_at)


def pretrain(
    task: Task,
    tokenizer: PreTrainedTokenizerFast,
    config: BaseConfig,
    *,
    on_step: Callable[[int, float], None] | None = None,
) -> Qwen3ForCausalLM:
    """Train the base model on the task's pretraining split; the same seed gives the same weights on one machine."""
    model = new_model(task, tokenizer, config)
    data = PretrainingData(task, tokenizer, task.rows("pretrain"), config)
    value_ids = torch.tensor(data.value_ids)
    grid = torch.tensor(task.style.values)
    # Muon is defined for hidden weight matrices; embeddings, norms and gains keep AdamW.
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=0.0),
        torch.optim.AdamW(others, lr=config.adamw_lr, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    schedules = [get_cosine_schedule_with_warmup(o, config.warmup_steps, config.steps) for o in optimizers]
    model.train()
    for step in range(1, config.steps + 1):
        ids, targets, answer_mask, value_at = data.batch()
        # Right padding with causal attention: padding after a sequence cannot influence it, so no mask is needed.
        logits = model(ids, use_cache=False).logits
        token_loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
        token_loss = token_loss.view_as(targets)
        with torch.no_grad():
            probability = torch.exp(-(token_loss * answer_mask).sum(1))
            own = value_ids[(probability[:, None] - grid).abs().argmin(1)]
        rows = torch.arange(len(ids))
        unknown = targets[rows, value_at] == IGNORED
        value_loss = cross_entropy(logits[rows, value_at], own, reduction="none") * unknown
        loss = (token_loss.sum() + value_loss.sum()) / ((targets != IGNORED).sum() + unknown.sum())
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if on_step:
            on_step(step, loss.item())
    return model.eval()
