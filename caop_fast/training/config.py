"""The configuration of a training run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Arm = Literal["opd", "caop", "direct", "masked"]
ARMS: tuple[str, ...] = get_args(Arm)
DirectKind = Literal["brier", "expected_brier", "cross_entropy", "bernoulli_nll"]


@dataclass(frozen=True)
class TrainConfig:
    """On-policy distillation of one student.

    Attributes:
        arm: the method, which is where the confidence target comes from. ``opd``: the teacher, as for all other tokens.
            ``caop``: the success rate of the rollout's group, written into the rollout and into the teacher's note.
            ``direct``: the success rate, through `confidence_loss` at the value instead of the teacher (needs a
            tokenizer that writes each value as one token). ``masked``: none, the value has weight 0.
        steps: optimizer steps.
        prompts_per_step: prompts per step.
        rollouts_per_prompt: K. The success rate is a mean over K, so its sampling noise is sqrt(p (1 - p) / K).
        micro_batch_prompts: prompts per forward and backward; None takes all at once. Does not change the gradient.
        max_new_tokens: a rollout that reaches it without ending has weight 0.
        max_prompt_tokens, max_teacher_prompt_tokens: budgets; a longer prompt is an error that names its row.
        temperature: of the rollouts and of both models in the loss.
        answer_beta, confidence_beta: the divergence on the answer's tokens and on the confidence value; 0 is forward KL
            (teacher || student), 1 reverse KL (student || teacher). Reverse KL sharpens the answer; forward KL keeps
            the value's whole distribution.
        direct_kind, direct_weight: kind of the `confidence_loss` of the ``direct`` method, and its weight relative to
            the divergence.
        learning_rate, warmup_steps, weight_decay, adam_betas, max_grad_norm: AdamW, with linear warmup and cosine decay
            to 0.
        ema_rate: 1 - decay of the teacher, an exponential moving average of the student; 0 freezes it.
        share_prompt: compute each prompt once for its K rollouts (needs a key-value cache).
        log_every: steps per history record, which averages over their rollouts.
        checkpoint_every: steps between checkpoints, where a run folder is given; 0 keeps only the last.
        seed: of the prompts' order and of the rollouts.
    """

    arm: Arm = "caop"
    steps: int = 100
    prompts_per_step: int = 32
    rollouts_per_prompt: int = 8
    micro_batch_prompts: int | None = None
    max_new_tokens: int = 16
    max_prompt_tokens: int = 64
    max_teacher_prompt_tokens: int = 128
    temperature: float = 1.0
    answer_beta: float = 1.0
    confidence_beta: float = 0.0
    direct_kind: DirectKind = "expected_brier"
    direct_weight: float = 4.0
    learning_rate: float = 5e-4
    warmup_steps: int = 15
    weight_decay: float = 0.0
    adam_betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    ema_rate: float = 0.01
    share_prompt: bool = True
    log_every: int = 4
    checkpoint_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.arm not in ARMS:
            raise ValueError(f"arm must be one of {', '.join(ARMS)}, got {self.arm!r}")
        if self.direct_kind not in get_args(DirectKind):
            raise ValueError(f"direct_kind must be one of {', '.join(get_args(DirectKind))}, got {self.direct_kind!r}")
        for name in (
            *("steps", "prompts_per_step", "rollouts_per_prompt", "max_new_tokens", "max_prompt_tokens"),
            *("max_teacher_prompt_tokens", "log_every"),
        ):
            self._require(
                name, isinstance(getattr(self, name), int) and getattr(self, name) >= 1, "a whole number >= 1"
            )
        micro = self.micro_batch_prompts
        self._require("micro_batch_prompts", micro is None or micro >= 1, "None or a whole number >= 1")
        for name in ("warmup_steps", "checkpoint_every", "weight_decay", "direct_weight"):
            self._require(name, getattr(self, name) >= 0, ">= 0")
        for name in ("temperature", "learning_rate", "max_grad_norm"):
            self._require(name, getattr(self, name) > 0, "> 0")
        for name in ("answer_beta", "confidence_beta"):
            self._require(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        # Two divergences in one step take a beta per token, for which the losses allow 0 and 1 only.
        mixed = self.answer_beta != self.confidence_beta
        if mixed and not {self.answer_beta, self.confidence_beta} <= {0.0, 1.0}:
            raise ValueError(
                "answer_beta and confidence_beta may differ only when both are 0 or 1, "
                f"got {self.answer_beta!r} and {self.confidence_beta!r}"
            )
        self._require("ema_rate", 0 <= self.ema_rate < 1, "in [0, 1)")

    def _require(self, name: str, good: bool, takes: str) -> None:
        if not good:
            raise ValueError(f"{name} must be {takes}, got {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`; an unknown name is a ValueError that lists it."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown training options {unknown}; known: {sorted(known)}")
        converted: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**converted)
