"""The linear losses as ``nn.Module``s: options when made, tensors when called.

They hold no parameters: heads are passed to the call, so that one module serves heads that are trained, frozen, tied or
sharded. What each option and tensor means is said by the function of the same name; an option that cannot be right
whatever the tensors is an error when the module is made.

A class takes its signatures from its function: tensors and ``labels`` go to the call, whatever else is an option.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from caop_fast.losses import checks
from caop_fast.losses.backends.resolve import BACKENDS
from caop_fast.losses.confidence import (
    check_candidates,
    check_eps,
    check_outside_weight,
    confidence_candidates,
)
from caop_fast.losses.linear.confidence import linear_confidence_loss
from caop_fast.losses.linear.config import check_logits_dtype, check_reduction
from caop_fast.losses.linear.distillation import MEMORY, linear_distillation_loss
from caop_fast.losses.linear.distillation_rows import linear_distillation_rows
from caop_fast.losses.linear.distributed import check_process_group
from caop_fast.losses.linear.tokens import linear_token_statistics
from caop_fast.losses.linear.topk import linear_topk_distillation_loss
from caop_kernels.constants import CONFIDENCE_KINDS, TAILS

_CHECKS: dict[str, Callable[[str, Any], object]] = {
    **{f"{side}scale": checks.finite for side in ("", "student_", "teacher_")},
    **{f"{side}softcap": checks.optional_positive for side in ("", "student_", "teacher_")},
    "beta": lambda _, value: checks.divergence_beta(
        checks.finite("beta", value, takes="a number in [0, 1] (one per token goes to the call)"),
        torch.Size(()),
        torch.float32,
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
    "kind": lambda name, value: checks.choice(name, value, CONFIDENCE_KINDS),
    "outside_weight": lambda _, value: check_outside_weight(value),
    "eps": lambda _, value: check_eps(value),
}
_AT_CALL = ("weights", "bias", "student_bias", "teacher_bias")  # keyword arguments of the call
_AT_INIT = ("candidate_ids", "candidate_values")  # positional arguments that are fixed
_SELF = Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)


class _LinearLoss(nn.Module):
    """Keeps the options of a function, and shows those that are not its defaults.

    A subclass gives the function, and what checks its ``reduction`` where it has one.
    """

    options: dict[str, Any]
    _defaults: ClassVar[dict[str, Any]]
    _checks: ClassVar[dict[str, Callable[[str, Any], object]]]

    def __init_subclass__(
        cls,
        function: Callable[..., Any] | None = None,
        reduction: Callable[[str, Any], object] = lambda name, value: None,
    ) -> None:
        super().__init_subclass__()
        if function is None:  # a caller's own subclass
            return
        signature = inspect.signature(function)
        fixed: list[Parameter] = []
        called: list[Parameter] = []
        for p in signature.parameters.values():
            keyword = p.kind is Parameter.KEYWORD_ONLY
            (fixed if p.name in _AT_INIT or (keyword and p.name not in _AT_CALL) else called).append(p)
        if "beta" in signature.parameters:  # one number is an option, one per token goes to the call
            fixed = [p.replace(annotation="float") if p.name == "beta" else p for p in fixed]
            called.append(Parameter("beta", Parameter.KEYWORD_ONLY, default=None, annotation="Tensor | None"))
        cls._defaults = {p.name: p.default for p in fixed}
        cls._checks = {**_CHECKS, "reduction": reduction}
        init = _init(Signature([_SELF, *fixed], return_annotation="None"))
        cls.__init__ = init  # type: ignore[method-assign]  # a class has the signature of its own function
        cls.forward = _forward(function, Signature([_SELF, *called], return_annotation=signature.return_annotation))

    def _set_options(self, options: dict[str, Any]) -> None:
        """Check and keep the arguments of ``__init__``, defaults among them."""
        for name, value in options.items():
            self._checks[name](name, value)
        self.options = options

    def _fixed_arguments(self) -> dict[str, Any]:
        """Arguments of the function that a call does not give."""
        return dict(self.options)

    def extra_repr(self) -> str:
        defaults = self._defaults
        changed = {n: v for n, v in self.options.items() if v is not defaults[n] and v != defaults[n]}
        return ", ".join(f"{name}={value!r}" for name, value in changed.items())


def _init(signature: Signature) -> Callable[..., None]:
    def __init__(self: _LinearLoss, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        super(_LinearLoss, self).__init__()
        self._set_options({name: value for name, value in bound.arguments.items() if name != "self"})

    __init__.__signature__ = signature  # type: ignore[attr-defined]  # what inspect.signature shows
    return __init__


def _forward(function: Callable[..., Any], signature: Signature) -> Callable[..., Any]:
    names = [p.name for p in signature.parameters.values() if p.kind is Parameter.POSITIONAL_OR_KEYWORD][1:]

    def forward(self: _LinearLoss, *tensors: Any, **named: Any) -> Any:
        if len(tensors) > len(names):
            raise TypeError(f"{type(self).__name__} takes {len(names)} positional arguments, got {len(tensors)}")
        arguments = self._fixed_arguments()
        if named.get("beta") is None:
            named.pop("beta", None)
        else:
            arguments.pop("beta", None)
        return function(**dict(zip(names, tensors, strict=False)), **named, **arguments)

    forward.__signature__ = signature  # type: ignore[attr-defined]  # what inspect.signature shows
    forward.__doc__ = f"Arguments as of ``{function.__name__}``."
    return forward


class LinearDistillationLoss(
    _LinearLoss,
    function=linear_distillation_loss,
    reduction=lambda _, value: check_reduction(value, "linear_distillation_loss", "linear_distillation_rows"),
):
    """``linear_distillation_loss`` with its options fixed; ``beta`` may be given per token at the call."""


class LinearDistillationRows(_LinearLoss, function=linear_distillation_rows):
    """``linear_distillation_rows`` with its options fixed; ``beta`` may be given per token at the call."""


class LinearTopKDistillationLoss(
    _LinearLoss,
    function=linear_topk_distillation_loss,
    reduction=lambda _, value: check_reduction(
        value, "linear_topk_distillation_loss", "topk_distillation_loss on logits"
    ),
):
    """``linear_topk_distillation_loss`` with its options fixed; ``beta`` may be given per token at the call."""


class LinearTokenStatistics(_LinearLoss, function=linear_token_statistics):
    """``linear_token_statistics`` with its options fixed."""


class LinearConfidenceLoss(
    _LinearLoss,
    function=linear_confidence_loss,
    reduction=lambda name, value: checks.choice(name, value, checks.REDUCTIONS),
):
    """``linear_confidence_loss`` with its candidates and options fixed.

    ``candidate_ids`` and ``candidate_values`` become buffers, which move with the module and are not saved with it.
    """

    candidate_ids: Tensor
    candidate_values: Tensor

    def _set_options(self, options: dict[str, Any]) -> None:
        candidate_ids, candidate_values = options.pop("candidate_ids"), options.pop("candidate_values")
        super()._set_options(options)
        device = candidate_ids.device if isinstance(candidate_ids, Tensor) else torch.device("cpu")
        ids, values = confidence_candidates(candidate_ids, candidate_values, device, torch.float64)
        check_candidates(ids, values, options["vocab_size"])
        self._values = values.cpu()
        self.register_buffer("candidate_ids", ids, persistent=False)
        self.register_buffer("candidate_values", values, persistent=False)

    def _fixed_arguments(self) -> dict[str, Any]:
        return {**self.options, "candidate_ids": self.candidate_ids, "candidate_values": self.candidate_values}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LinearConfidenceLoss:
        super()._apply(fn, recurse)
        # ``.to(torch.bfloat16)`` rounds a model; 0.85 stays 0.85.
        self.candidate_values = self._values.to(self.candidate_ids.device)
        return self
