"""The linear losses as ``nn.Module``s: options when made, tensors when called.

They hold no parameters: heads are passed to the call, so that one module serves heads that are trained, frozen, tied or
sharded. What each option and tensor means is said by the function of the same name; an option that cannot be right
whatever the tensors is an error when the module is made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from caop_fast.losses import checks
from caop_fast.losses.backend import BACKENDS
from caop_fast.losses.confidence import KINDS, check_eps, check_outside_weight, confidence_candidates
from caop_fast.losses.linear.arguments import check_logits_dtype
from caop_fast.losses.linear.confidence import linear_confidence_loss
from caop_fast.losses.linear.distillation import (
    MEMORY,
    check_reduction,
    linear_distillation_loss,
    linear_distillation_rows,
)
from caop_fast.losses.linear.shards import VocabularyShards, check_process_group
from caop_fast.losses.linear.tokens import linear_token_statistics
from caop_fast.losses.linear.topk import linear_topk_distillation_loss
from caop_fast.losses.ops.confidence import check_candidates
from caop_fast.losses.outputs import ConfidenceOutput, DistillationOutput, TokenStatistics
from caop_fast.losses.reference.topk import TAILS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_CHECKS: dict[str, Callable[[str, Any], object]] = {
    **{f"{side}scale": checks.finite for side in ("", "student_", "teacher_")},
    **{
        f"{side}softcap": lambda name, value: checks.positive(name, value, optional=True)
        for side in ("", "student_", "teacher_")
    },
    "beta": lambda _, value: checks.divergence_beta(
        checks.finite("beta", value, takes="a number in [0, 1] (one per token goes to the call)"),
        torch.Size(()),
        torch.float32,
        values=False,
    ),
    "temperature": checks.positive,
    "vocab_size": checks.positive_integer,
    "logits_dtype": lambda _, value: check_logits_dtype(value),
    "chunk_size": checks.positive_integer,
    "memory": lambda name, value: checks.choice(name, value, MEMORY),
    "process_group": lambda _, value: check_process_group(value),
    "backend": lambda name, value: checks.choice(name, value, BACKENDS),
    "validate": lambda _, value: checks.checks_values(value, torch.device("cpu")),
    "tail": lambda name, value: checks.choice(name, value, TAILS),
    "kind": lambda name, value: checks.choice(name, value, KINDS),
    "outside_weight": lambda _, value: check_outside_weight(value),
    "eps": lambda _, value: check_eps(value),
}


class _LinearLoss(nn.Module):
    """Keeps the options of a function, and shows those that are not its defaults."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        for name, value in options.items():
            if name in _CHECKS:
                _CHECKS[name](name, value)
        self.options = options

    def extra_repr(self) -> str:
        defaults = {n: p.default for n, p in inspect.signature(type(self).__init__).parameters.items()}
        changed = {n: v for n, v in self.options.items() if v is not defaults[n] and v != defaults[n]}
        return ", ".join(f"{name}={value!r}" for name, value in changed.items())


class LinearDistillationLoss(_LinearLoss):
    """``linear_distillation_loss`` with its options fixed; ``beta`` may be given per token at the call."""

    def __init__(
        self,
        *,
        student_scale: float = 1.0,
        teacher_scale: float = 1.0,
        student_softcap: float | None = None,
        teacher_softcap: float | None = None,
        beta: float = 0.0,
        temperature: float = 1.0,
        vocab_size: int | None = None,
        reduction: str = "mean",
        logits_dtype: torch.dtype | None = None,
        chunk_size: int | None = None,
        memory: str = "balanced",
        process_group: ProcessGroup | VocabularyShards | None = None,
        backend: str = "auto",
        validate: bool | None = None,
    ) -> None:
        check_reduction(reduction, "linear_distillation_loss", "linear_distillation_rows")
        super().__init__(
            student_scale=student_scale, teacher_scale=teacher_scale, student_softcap=student_softcap,
            teacher_softcap=teacher_softcap, beta=beta, temperature=temperature, vocab_size=vocab_size,
            reduction=reduction, logits_dtype=logits_dtype, chunk_size=chunk_size, memory=memory,
            process_group=process_group, backend=backend, validate=validate,
        )  # fmt: skip

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        weights: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> DistillationOutput:
        """Arguments as of ``linear_distillation_loss``."""
        return linear_distillation_loss(
            student_hidden, student_weight, teacher_hidden, teacher_weight, labels, student_bias=student_bias,
            teacher_bias=teacher_bias, weights=weights, **_with_beta(self.options, beta),
        )  # fmt: skip


class LinearDistillationRows(_LinearLoss):
    """``linear_distillation_rows`` with its options fixed; ``beta`` may be given per token at the call."""

    def __init__(
        self,
        *,
        student_scale: float = 1.0,
        teacher_scale: float = 1.0,
        student_softcap: float | None = None,
        teacher_softcap: float | None = None,
        beta: float = 0.0,
        temperature: float = 1.0,
        vocab_size: int | None = None,
        logits_dtype: torch.dtype | None = None,
        chunk_size: int | None = None,
        process_group: ProcessGroup | VocabularyShards | None = None,
        backend: str = "auto",
        validate: bool | None = None,
    ) -> None:
        super().__init__(
            student_scale=student_scale, teacher_scale=teacher_scale, student_softcap=student_softcap,
            teacher_softcap=teacher_softcap, beta=beta, temperature=temperature, vocab_size=vocab_size,
            logits_dtype=logits_dtype, chunk_size=chunk_size, process_group=process_group, backend=backend,
            validate=validate,
        )  # fmt: skip

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        weights: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> DistillationOutput:
        """Arguments as of ``linear_distillation_rows``."""
        return linear_distillation_rows(
            student_hidden, student_weight, teacher_hidden, teacher_weight, labels, student_bias=student_bias,
            teacher_bias=teacher_bias, weights=weights, **_with_beta(self.options, beta),
        )  # fmt: skip


class LinearTopKDistillationLoss(_LinearLoss):
    """``linear_topk_distillation_loss`` with its options fixed; ``beta`` may be given per token at the call."""

    def __init__(
        self,
        *,
        student_scale: float = 1.0,
        student_softcap: float | None = None,
        tail: str = "bucket",
        beta: float = 0.0,
        temperature: float = 1.0,
        vocab_size: int | None = None,
        reduction: str = "mean",
        logits_dtype: torch.dtype | None = None,
        chunk_size: int | None = None,
        process_group: ProcessGroup | VocabularyShards | None = None,
        backend: str = "auto",
        validate: bool | None = None,
    ) -> None:
        check_reduction(reduction, "linear_topk_distillation_loss", "topk_distillation_loss on logits")
        super().__init__(
            student_scale=student_scale, student_softcap=student_softcap, tail=tail, beta=beta,
            temperature=temperature, vocab_size=vocab_size, reduction=reduction, logits_dtype=logits_dtype,
            chunk_size=chunk_size, process_group=process_group, backend=backend, validate=validate,
        )  # fmt: skip

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_ids: Tensor,
        teacher_logprobs: Tensor,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        weights: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> DistillationOutput:
        """Arguments as of ``linear_topk_distillation_loss``."""
        return linear_topk_distillation_loss(
            student_hidden, student_weight, teacher_ids, teacher_logprobs, labels, student_bias=student_bias,
            weights=weights, **_with_beta(self.options, beta),
        )  # fmt: skip


class LinearTokenStatistics(_LinearLoss):
    """``linear_token_statistics`` with its options fixed."""

    def __init__(
        self,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        vocab_size: int | None = None,
        logits_dtype: torch.dtype | None = None,
        chunk_size: int | None = None,
        process_group: ProcessGroup | VocabularyShards | None = None,
        backend: str = "auto",
        validate: bool | None = None,
    ) -> None:
        super().__init__(
            scale=scale, softcap=softcap, temperature=temperature, vocab_size=vocab_size, logits_dtype=logits_dtype,
            chunk_size=chunk_size, process_group=process_group, backend=backend, validate=validate,
        )  # fmt: skip

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor | None,
        *,
        bias: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> TokenStatistics:
        """Arguments as of ``linear_token_statistics``."""
        return linear_token_statistics(hidden, weight, labels, bias=bias, weights=weights, **self.options)


class LinearConfidenceLoss(_LinearLoss):
    """``linear_confidence_loss`` with its candidates and options fixed.

    ``candidate_ids`` and ``candidate_values`` become buffers, which move with the module and are not saved with it.
    """

    candidate_ids: Tensor
    candidate_values: Tensor

    def __init__(
        self,
        candidate_ids: Tensor | Sequence[int],
        candidate_values: Tensor | Sequence[float],
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        kind: str = "cross_entropy",
        outside_weight: float = 1.0,
        reduction: str = "mean",
        temperature: float = 1.0,
        vocab_size: int | None = None,
        eps: float = 1e-6,
        logits_dtype: torch.dtype | None = None,
        chunk_size: int | None = None,
        process_group: ProcessGroup | VocabularyShards | None = None,
        backend: str = "auto",
        validate: bool | None = None,
    ) -> None:
        checks.choice("reduction", reduction, checks.REDUCTIONS)
        super().__init__(
            scale=scale, softcap=softcap, kind=kind, outside_weight=outside_weight, reduction=reduction,
            temperature=temperature, vocab_size=vocab_size, eps=eps, logits_dtype=logits_dtype, chunk_size=chunk_size,
            process_group=process_group, backend=backend, validate=validate,
        )  # fmt: skip
        where = candidate_ids.device if isinstance(candidate_ids, Tensor) else torch.device("cpu")
        ids, values = confidence_candidates(candidate_ids, candidate_values, where, torch.float64)
        check_candidates(ids, values, vocab_size)
        self._values = values.cpu()
        self.register_buffer("candidate_ids", ids, persistent=False)
        self.register_buffer("candidate_values", values, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LinearConfidenceLoss:
        super()._apply(fn, recurse)
        # ``.to(torch.bfloat16)`` rounds a model; 0.85 stays 0.85.
        self.candidate_values = self._values.to(self.candidate_ids.device)
        return self

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        *,
        bias: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> ConfidenceOutput:
        """Arguments as of ``linear_confidence_loss``."""
        return linear_confidence_loss(
            hidden,
            weight,
            self.candidate_ids,
            self.candidate_values,
            target,
            bias=bias,
            weights=weights,
            **self.options,
        )


def _with_beta(options: dict[str, Any], beta: Tensor | None) -> dict[str, Any]:
    return options if beta is None else {**options, "beta": beta}
