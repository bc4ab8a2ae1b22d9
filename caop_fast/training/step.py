"""The stages of one distillation step: rollouts -> verdicts -> plan -> teacher and student -> loss -> gradient."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from caop_fast.caop import (
    ConfidenceStyle,
    TeacherContext,
    Verdict,
    Verifier,
    encode_prompt,
    student_messages,
    success_rates,
)
from caop_fast.losses import linear_confidence_loss, linear_distillation_loss
from caop_fast.training.autocast import fresh_weight_casts
from caop_fast.training.config import TrainConfig
from caop_fast.training.model import language_head
from caop_fast.training.plan import TokenPlan, plan_tokens
from caop_fast.training.reading import ValueGrid, value_reading
from caop_fast.training.rollouts import Rollout, sample_rollouts, stop_token_ids
from caop_fast.training.scoring import Completions, completion_hidden

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Method:
    """What training needs of a task: the verifier, the teacher's privileged context, how a confidence is written."""

    verifier: Verifier
    context: TeacherContext
    style: ConfidenceStyle


@dataclass(frozen=True)
class Group:
    """The K rollouts of one prompt, ready to train on."""

    student_prompt: list[int]
    teacher_prompt: list[int]
    plans: list[TokenPlan]


@dataclass(frozen=True)
class Sampled:
    """The sampling half of a step: rollouts in prompt order, verdicts, each prompt's success rate, the end tokens."""

    rollouts: list[Rollout]
    verdicts: list[Verdict]
    rates: list[float]
    stop_ids: Collection[int]


def sample_and_verify(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[Sequence[int]],
    method: Method,
    config: TrainConfig,
    *,
    seed: int,
) -> Sampled:
    """K rollouts per row, and the mean verdict of each row's group."""
    rollouts = sample_rollouts(
        student,
        tokenizer,
        prompts,
        per_prompt=config.rollouts_per_prompt,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=seed,
    )
    verdicts = [method.verifier(r.text, rows[r.prompt_index]) for r in rollouts]
    rates = success_rates(verdicts, [r.prompt_index for r in rollouts])
    return Sampled(rollouts, verdicts, [rates[i] for i in range(len(rows))], stop_token_ids(student, tokenizer))


def build_groups(
    sampled: Sampled,
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    config: TrainConfig,
) -> list[Group]:
    """Plan each rollout and write the teacher's prompt (its note states the success rate in ``caop`` only)."""
    per_rollout = [sampled.rates[r.prompt_index] for r in sampled.rollouts]
    plans = plan_tokens(
        sampled.rollouts,
        per_rollout,
        tokenizer,
        arm=config.arm,
        style=method.style,
        stop_ids=sampled.stop_ids,
    )
    groups = []
    for i, row in enumerate(rows):
        stated = method.style.number(sampled.rates[i]) if config.arm == "caop" else None
        teacher_prompt = encode_prompt(
            method.context.messages(row, confidence=stated),
            tokenizer,
            max_tokens=config.max_teacher_prompt_tokens,
            row_id=row["id"],
        )
        mine = [p for p, r in zip(plans, sampled.rollouts, strict=True) if r.prompt_index == i]
        groups.append(Group(list(prompts[i]), teacher_prompt, mine))
    return groups


def student_prompts(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[list[int]]:
    """The student's prompt of each row, without the teacher's privileged context."""
    return [encode_prompt(student_messages(r), tokenizer, max_tokens=max_tokens, row_id=r["id"]) for r in rows]


@dataclass(frozen=True)
class StepOutput:
    """Statistics of a step's forward passes, before the update; detached tensors on the model's device.

    Attributes:
        loss: scalar.
        expected, confidence_entropy: float64 [rollouts], in rollout order; NaN where no value is stated.
        answer_entropy: scalar, mean over the weighted tokens that are not a confidence value.
    """

    loss: Tensor
    expected: Tensor
    confidence_entropy: Tensor
    answer_entropy: Tensor


def accumulate_gradients(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    groups: Sequence[Group],
    tokenizer: PreTrainedTokenizerBase,
    grid: ValueGrid,
    config: TrainConfig,
) -> StepOutput:
    """Add the gradient of the step's loss to the parameters of `student`.

    The loss is the weighted sum of divergences over the tokens of all finished rollouts, divided by the number of those
    tokens in every method, so that an answer token counts the same whether or not the confidence value has weight
    (plus, in ``direct``, the weighted mean confidence loss). Micro-batches sum to it: each has weights that are
    already divided by the step's total.
    """
    totals = _Totals(
        tokens=sum(len(p.ids) for g in groups for p in g.plans if any(p.weights)),
        direct=sum(sum(p.value_mask) for g in groups for p in g.plans if p.target is not None),
        answer=sum(
            w > 0 and not v for g in groups for p in g.plans for w, v in zip(p.weights, p.value_mask, strict=True)
        ),
    )
    size = config.micro_batch_prompts or len(groups)
    outputs = []
    with fresh_weight_casts(cache=False):
        for start in range(0, len(groups), size):
            output = _micro_batch(student, teacher, groups[start : start + size], tokenizer, grid, config, totals)
            if output.loss.requires_grad:
                output.loss.backward()
            outputs.append(output)
    return StepOutput(
        loss=torch.stack([o.loss.detach() for o in outputs]).sum(),
        expected=torch.cat([o.expected for o in outputs]),
        confidence_entropy=torch.cat([o.confidence_entropy for o in outputs]),
        answer_entropy=torch.stack([o.answer_entropy for o in outputs]).sum(),
    )


@dataclass(frozen=True)
class _Totals:
    """The step's divisors: tokens of finished rollouts, values trained directly, answer tokens."""

    tokens: int
    direct: int
    answer: int


def _micro_batch(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    groups: Sequence[Group],
    tokenizer: PreTrainedTokenizerBase,
    grid: ValueGrid,
    config: TrainConfig,
    totals: _Totals,
) -> StepOutput:
    device = student.device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    plans = [p for g in groups for p in g.plans]
    owner = [i for i, g in enumerate(groups) for _ in g.plans]
    completions = Completions.pack([p.ids for p in plans], owner, pad, device)
    width = completions.ids.shape[1]
    # Rows of the loss are selected on the host, where the weights are known: no device synchronization.
    scored = [
        (r * width + j, w, p.value_mask[j]) for r, p in enumerate(plans) for j, w in enumerate(p.weights) if w > 0
    ]
    values = [(r, r * width + p.value_mask.index(True), p.target) for r, p in enumerate(plans) if any(p.value_mask)]

    share = {"pad_id": pad, "share_prompt": config.share_prompt}
    h_student = completion_hidden(student, [g.student_prompt for g in groups], completions, **share).flatten(0, 1)
    head = language_head(student)
    loss, answer_entropy = torch.zeros((), device=device), torch.zeros((), device=device)
    if scored:
        with torch.no_grad():
            h_teacher = completion_hidden(teacher, [g.teacher_prompt for g in groups], completions, **share)
            h_teacher = h_teacher.flatten(0, 1)
        teacher_head = language_head(teacher)
        rows = torch.tensor([i for i, _, _ in scored], device=device)
        is_value = torch.tensor([v for _, _, v in scored], device=device)
        beta: float | Tensor = config.answer_beta
        if config.answer_beta != config.confidence_beta:
            beta = torch.where(is_value, config.confidence_beta, config.answer_beta)
        out = linear_distillation_loss(
            h_student[rows],
            head.weight,
            h_teacher[rows],
            teacher_head.weight,
            student_bias=head.bias,
            teacher_bias=teacher_head.bias,
            student_scale=head.scale,
            teacher_scale=teacher_head.scale,
            student_softcap=head.softcap,
            teacher_softcap=teacher_head.softcap,
            beta=beta,
            temperature=config.temperature,
            weights=torch.tensor([w / totals.tokens for _, w, _ in scored], device=device),
            reduction="sum",
        )
        assert out.loss is not None  # only linear_distillation_rows gives none
        loss = loss + out.loss
        answer_entropy = (out.student_entropy * ~is_value).sum() / max(totals.answer, 1)

    h_value = h_student[torch.tensor([i for _, i, _ in values], dtype=torch.int64, device=device)]
    direct = [(k, t) for k, (_, _, t) in enumerate(values) if t is not None]
    if direct:
        assert grid.tokens is not None  # `train` makes the grid of single tokens for this method
        confidence = linear_confidence_loss(
            h_value[torch.tensor([k for k, _ in direct], device=device)],
            head.weight,
            grid.tokens,
            grid.values.float(),
            torch.tensor([t for _, t in direct], dtype=torch.float32, device=device),
            bias=head.bias,
            scale=head.scale,
            softcap=head.softcap,
            kind=config.direct_kind,
            temperature=config.temperature,
            reduction="sum",
        )
        loss = loss + config.direct_weight / totals.direct * confidence.loss

    expected = torch.full((2, len(plans)), torch.nan, dtype=torch.float64, device=device)
    at = torch.tensor([r for r, _, _ in values], dtype=torch.int64, device=device)
    expected[:, at] = torch.stack(value_reading(h_value, head, grid, config.temperature))
    return StepOutput(loss, expected[0], expected[1], answer_entropy.detach())
