"""One step of on-policy distillation, whole and stage by stage: caop_fast beside the loop of the released trainer.

A step samples rollouts, runs the teacher on them after its longer prompt, then the student, computes the loss and its
gradient, and updates by AdamW. Where the loss takes logits, the projections belong to the forwards; where it takes
hidden states, to the loss, like the whole backward: of teacher, student and loss only the sum is comparable. The models
have published shapes and random weights.
"""

from __future__ import annotations

import copy
import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import Wrong, peak, synchronize
from benchmarks.peers import official_loss, plain_loss
from benchmarks.records import Record, Shape, quantiles
from caop_fast import linear_distillation_loss

STAGES = ("rollout", "teacher", "student", "loss", "optimiser")
FIRST_SEED = 1000  # of the rollouts whose loss and gradients are checked; the timed rounds use the next ones
ROUNDS = {"cuda": 5, "cpu": 3}  # a step takes so long that their number is fixed
LIMITS = {"float32": (1e-4, 1e-3), "bfloat16": (2e-2, 0.2)}  # relative errors of loss and gradients of what is timed
FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
          "head_dim", "vocab_size", "tie_word_embeddings", "eos_token_id", "pad_token_id")  # fmt: skip
MODELS: dict[str, dict[str, int]] = {  # published configurations, and one for tests
    "Qwen3-0.6B": dict(zip(FIELDS, (1024, 3072, 28, 16, 8, 128, 151936, True, 151645, 151643), strict=True)),
    "Qwen3-8B": dict(zip(FIELDS, (4096, 12288, 36, 32, 8, 128, 151936, False, 151645, 151643), strict=True)),
    "small": dict(zip(FIELDS, (32, 48, 2, 4, 2, 8, 211, True, 210, 209), strict=True)),
}


@dataclass(frozen=True)
class StepCase:
    """One step: ``prompts`` prompts with ``rollouts`` rollouts each, by one of ``MODELS`` cut to ``layers`` layers.

    ``prompt_tokens`` and ``teacher_prompt_tokens`` are those of the longest prompt, ``new_tokens`` those of a rollout.
    ``dtype``, "float32" or "bfloat16", is that of weights, gradients and optimizer state; ``beta`` of the divergence.
    """

    model: str
    layers: int
    prompts: int
    rollouts: int
    prompt_tokens: int
    teacher_prompt_tokens: int
    new_tokens: int
    dtype: str
    beta: float = 0.0

    @property
    def name(self) -> str:
        """Unique within the suite."""
        sizes = f"layers={self.layers} rollouts={self.prompts}x{self.rollouts}x{self.new_tokens}"
        sizes += f" prompts={self.prompt_tokens}/{self.teacher_prompt_tokens} {self.dtype}"
        return f"{self.model} {sizes}" + (f" beta={self.beta:g}" if self.beta else "")

    def record(self, impl: str) -> Record:
        """The record of an implementation, nothing measured yet."""
        c, n = MODELS[self.model], self.prompts * self.rollouts * self.new_tokens
        shape = Shape(self.model, self.dtype, n, c["vocab_size"], c["hidden_size"], self.beta, head_trained=True)
        extra = asdict(self) | {"layers_published": c["num_hidden_layers"]}
        return Record("step", self.name, impl, shape=shape, extra=extra)


SELECTIONS: dict[str, tuple[StepCase, ...]] = {
    "cuda": (
        StepCase("Qwen3-0.6B", 28, 4, 8, 256, 512, 128, "bfloat16"),
        StepCase("Qwen3-8B", 4, 4, 8, 256, 512, 128, "bfloat16"),
        StepCase("Qwen3-0.6B", 28, 8, 8, 128, 256, 64, "bfloat16"),
        StepCase("Qwen3-8B", 4, 8, 8, 256, 512, 128, "bfloat16"),
    ),
    "cpu": (StepCase("Qwen3-0.6B", 2, 4, 4, 64, 128, 16, "float32"),),
    "quick": (StepCase("Qwen3-0.6B", 1, 2, 4, 24, 48, 4, "float32"),),
    "tiny": (StepCase("small", 2, 3, 2, 8, 16, 6, "float32"),),
}


class Batch(NamedTuple):
    """Sampled rollouts: ``Completions``, and int64 [N], the positions of the loss tokens when they are flattened."""

    completions: Any
    rows: Tensor
    beta: float


def _hidden(model: Any, prompts: list[list[int]], batch: Batch) -> tuple[Tensor, Tensor]:
    """Hidden states [N, H] of the loss tokens, each prompt run once for all of its rollouts; and the head [V, H]."""
    from caop_fast.training.scoring import completion_hidden

    hidden = completion_hidden(model, prompts, batch.completions, pad_id=model.config.pad_token_id)
    return hidden.flatten(0, 1)[batch.rows], model.lm_head.weight


def _linear_loss(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
    labels = batch.completions.ids.flatten()[batch.rows]  # for the log-probabilities that the official loop reports
    loss = linear_distillation_loss(*student, *teacher, labels, beta=batch.beta).loss
    assert loss is not None
    return loss


def _logits(model: Any, prompts: list[list[int]], batch: Batch) -> Tensor:
    """Float32 logits [R, L, V]: prompt and completion as one sequence for every rollout, without a cache."""
    done, pad, longest = batch.completions, model.config.pad_token_id, max(map(len, prompts))
    left = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=done.ids.device)
    ids = torch.cat([left[done.prompt_index], done.ids], dim=1)
    mask = torch.cat([(ids[:, :longest] != pad).to(done.mask.dtype), done.mask], dim=1)
    out = model(input_ids=ids, attention_mask=mask, logits_to_keep=done.ids.shape[1] + 1, use_cache=False)
    return out.logits[:, :-1].float()  # type: ignore[no-any-return]


def _logits_loss(student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
    labels = batch.completions.ids.masked_fill(batch.completions.mask == 0, -100)
    return official_loss(student, teacher, labels, batch.beta)[0]


# (model, its prompts, batch) -> what the loss takes of a model; (student's, teacher's, batch) -> mean over loss tokens
Implementation = tuple[Callable[[Any, list[list[int]], Batch], Any], Callable[[Any, Any, Batch], Tensor]]
IMPLEMENTATIONS: dict[str, Implementation] = {"caop_fast": (_hidden, _linear_loss), "official": (_logits, _logits_loss)}


def needed_bytes(case: StepCase, impl: str) -> int:
    """Device memory that a ``StepBench`` of ``case`` needs, estimated from above."""
    c, size, rollouts = MODELS[case.model], getattr(torch, case.dtype).itemsize, case.prompts * case.rollouts
    h, v, i = c["hidden_size"], c["vocab_size"], c["intermediate_size"]
    q, kv = (c["head_dim"] * c[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    # Student, teacher, gradients and both moments of AdamW; gradients of the reference in float32.
    weights = (2 - c["tie_word_embeddings"]) * v * h + case.layers * h * (2 * q + 2 * kv + 3 * i)
    # Saved by a layer: its inputs and results for each token that runs, and keys and values repeated for all heads.
    whole = rollouts * (case.prompt_tokens + case.new_tokens)
    run = whole if impl == "official" else case.prompts * case.prompt_tokens + rollouts * case.new_tokens
    saved = size * case.layers * (run * (10 * h + 4 * i + 6 * q + 6 * kv) + whole * 2 * q)
    # Float32 logits and arrays as large, of all rollouts or the chunks of caop_fast; the reference's heads in float32.
    logits = 4 * v * rollouts * case.new_tokens * (8 if case.beta in (0, 1) else 16)
    beside = max(12 * h * v, logits) if impl == "official" else 12 * h * v + min(logits, 3 << 30)
    return 5 * size * weights + 4 * h * (v + kv + i) + saved + beside


class StepBench:
    """A case on a device: a student, its frozen copy as the teacher, an optimizer, and the reference.

    ``compared`` are weights whose gradients are compared: one that prompts contribute to, one of the last layer, and
    the head. ``ids`` are the rollouts of ``FIRST_SEED``, and ``exact`` the reference's loss and gradients on them.
    """

    def __init__(self, case: StepCase, device: torch.device) -> None:
        from transformers import Qwen3Config, Qwen3ForCausalLM

        c, draw, steps = MODELS[case.model], random.Random(0), max(1, case.prompts - 1)
        self.case, self.device = case, device
        self.prompts, self.teacher_prompts = (  # text: the ids before those of padding and end
            [draw.choices(range(c["pad_token_id"]), k=n - n // 4 * (steps - i) // steps) for i in range(case.prompts)]
            for n in (case.prompt_tokens, case.teacher_prompt_tokens)
        )
        config = Qwen3Config.from_dict(c | {"num_hidden_layers": case.layers, "rope_theta": 1e6})
        torch.manual_seed(0)
        with torch.device(device):
            self.student: Any = Qwen3ForCausalLM._from_config(config, dtype=getattr(torch, case.dtype)).train()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-5, fused=True)
        for weight in self.student.parameters():  # allocate the optimizer's state before any step is measured
            weight.grad = torch.zeros_like(weight)
        self.optimizer.step()
        self.reset()
        names = ("model.layers.0.self_attn.v_proj", f"model.layers.{case.layers - 1}.mlp.down_proj", "lm_head")
        self.compared: dict[str, Tensor] = {name: self.student.get_submodule(name).weight for name in names}
        batch = self.sample(FIRST_SEED)
        self.ids, self.exact = batch.completions.ids, self.refer(batch, [*self.compared.values()])

    def reset(self) -> None:
        """Drop gradients, restore the weights and the optimizer's state: no step depends on those before it."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for mine, first in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                mine.copy_(first)
                for held in self.optimizer.state[mine].values():
                    held.zero_()
        gc.collect()

    def sample(self, seed: int) -> Batch:
        """Rollouts of the student."""
        from caop_fast.training import sample_rollouts, scoring

        each, new, pad = self.case.rollouts, self.case.new_tokens, self.student.config.pad_token_id
        tokenizer: Any = SimpleNamespace(pad_token_id=pad, batch_decode=lambda ids, **_: [""] * len(ids))
        drawn = sample_rollouts(self.student, tokenizer, self.prompts, per_prompt=each, max_new_tokens=new, seed=seed)
        done = scoring.Completions.pack([r.ids for r in drawn], [r.prompt_index for r in drawn], pad, self.device)
        return Batch(done, done.mask.flatten().nonzero().squeeze(1), self.case.beta)

    def refer(self, batch: Batch, weights: Sequence[Tensor]) -> list[Tensor]:
        """The loss from its definition, then its gradients by ``weights``, in float32, without padding or sharing."""

        def logits(model: Any, prompt: list[int], ids: Tensor) -> Tensor:
            whole = torch.cat([torch.tensor(prompt, device=ids.device), ids[:-1]])
            hidden = model.model(input_ids=whole[None], use_cache=False).last_hidden_state[0, len(prompt) - 1 :]
            return hidden.float() @ model.lm_head.weight.float().t()

        done, found = batch.completions, [torch.zeros(s, device=self.device) for s in ((), *(w.shape for w in weights))]
        for i, padded, length in zip(done.prompt_index.tolist(), done.ids, done.mask.sum(1).tolist(), strict=True):
            ids = padded[:length]
            mine = logits(self.student, self.prompts[i], ids)
            theirs = logits(self.teacher, self.teacher_prompts[i], ids)
            part = plain_loss(mine, theirs, ids, batch.beta)[1].sum() / batch.rows.numel()
            for total, more in zip(found, (part.detach(), *torch.autograd.grad(part, weights)), strict=True):
                total += more
        return found

    def step(self, impl: str, seed: int) -> tuple[Batch, dict[str, float], list[Tensor | None]]:
        """A step from the first weights: rollouts, milliseconds by stage, and the loss and the gradients to compare."""
        (forward, loss_of), ends = IMPLEMENTATIONS[impl], list[float]()

        def end() -> None:
            synchronize(self.device)
            ends.append(1e3 * time.perf_counter())

        self.reset()
        end()
        batch = self.sample(seed)
        end()
        with torch.no_grad():
            teacher = forward(self.teacher, self.teacher_prompts, batch)
        end()
        student = forward(self.student, self.prompts, batch)
        end()
        loss = loss_of(student, teacher, batch)
        loss.backward()
        end()
        found = [loss.detach(), *(weight.grad for weight in self.compared.values())]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        end()
        return batch, {stage: b - a for stage, a, b in zip(STAGES, ends, ends[1:], strict=False)}, found

    def errors(self, batch: Batch, found: list[Tensor | None]) -> dict[str, float]:
        """Relative errors of the loss and of each gradient, in Euclidean norms; ``Wrong`` if one is too large."""
        if not torch.equal(batch.completions.ids, self.ids):
            raise Wrong("other rollouts were sampled from the same seed")
        errors = {}
        for name, mine, right in zip(("loss", *self.compared), found, self.exact, strict=True):
            errors[name] = 1.0 if mine is None else float((mine.float() - right).norm() / right.norm())
            if not errors[name] <= LIMITS[self.case.dtype][name != "loss"]:
                raise Wrong(f"{'' if name == 'loss' else 'gradient '}error {errors[name]:.2g} of {name}")
        return errors

    def measure(self, impl: str) -> Record:
        """Compare with the reference (``Wrong`` if it is too far off), then time."""
        first, tokens, splits, sampled = list[Any](), list[int](), list[dict[str, float]](), 0
        try:
            if self.device.type == "cuda":  # compile kernels and allocate workspaces before memory is measured
                self.step(impl, FIRST_SEED)
            self.reset()  # garbage that is freed while memory is measured would hide as much
            used = peak(lambda: first.extend(self.step(impl, FIRST_SEED)), self.device)
            loss, errors = float(first[2][0]), self.errors(first[0], first.pop())
            for seed in range(FIRST_SEED + 1, FIRST_SEED + 1 + ROUNDS[self.device.type]):
                batch, split = self.step(impl, seed)[:2]
                tokens.append(batch.rows.numel())
                splits.append(split)
                sampled = hash((sampled, *batch.completions.ids.flatten().tolist()))
        finally:
            self.clear()
        ms, record = [sum(split.values()) for split in splits], self.case.record(impl)
        rates = [(t / m, t / (m - split["rollout"])) for t, m, split in zip(tokens, ms, splits, strict=True)]
        whole, later = (1e3 * median(rate) for rate in zip(*rates, strict=True))
        extra = record.extra | {
            "optimiser": "AdamW, fused", "tokens": round(median(tokens)), "tokens_per_s": whole, "errors": errors,
            "tokens_per_s_without_rollout": later, "split_ms": {s: median(x[s] for x in splits) for s in STAGES},
            "loss": loss, "sampled": sampled,
        }  # fmt: skip
        shape = replace(record.shape, n=extra["tokens"])
        found: dict[str, Any] = {
            "peak_bytes": used,
            "loss_error": errors.pop("loss"),
            "grad_error": max(errors.values()),
        }
        return replace(record, shape=shape, **quantiles(ms), **found, gives="an updated student", extra=extra)

    def clear(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)
