"""Argument checks shared by the losses.

Each raises a TypeError (wrong kind) or ValueError (wrong value) that names the argument, what it got and what it takes.
Checks of tensor *values* read them on the host, so they synchronise with an accelerator; ``checks_values`` decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from caop_kernels.constants import IGNORE_INDEX

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")


def floating_tensor(name: str, value: Any, *, ndim: int | None = None, min_ndim: int = 0) -> Tensor:
    """``value`` if it is a float32, bfloat16, float16 or float64 tensor of ``ndim`` (or at least ``min_ndim``) axes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    if (ndim is not None and value.ndim != ndim) or value.ndim < min_ndim:
        wanted = f"{ndim}" if ndim is not None else f"at least {min_ndim}"
        raise ValueError(f"{name} must have {wanted} dimensions, got shape {tuple(value.shape)}")
    return value


def one_device(tensors: dict[str, Any]) -> torch.device:
    """The device all tensors share; entries that are no tensors are skipped."""
    present = {name: t for name, t in tensors.items() if isinstance(t, Tensor)}
    first, *others = present
    device = present[first].device
    for name in others:
        if present[name].device != device:
            raise ValueError(f"{name} is on {present[name].device}, but {first} is on {device}: use one device")
    return device


def statistics_dtype(tensors: Iterable[Tensor | None]) -> torch.dtype:
    """float64 when any tensor is, else float32."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def positive(name: str, value: Any, *, takes: str = "a number > 0") -> float:
    """``value`` as a finite float > 0."""
    number = finite(name, value, takes=takes)
    if number <= 0:
        raise ValueError(f"{name} must be > 0, got {value!r}")
    return number


def optional_positive(name: str, value: Any) -> float | None:
    """``value`` as a finite float > 0, or None."""
    return None if value is None else positive(name, value, takes="a number > 0 or None")


def positive_integer(name: str, value: Any) -> int | None:
    """``value`` if it is an integer >= 1 or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer or None, got {type(value).__name__}")
    if int(value) < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")
    return int(value)


def finite(name: str, value: Any, *, takes: str = "a finite number") -> float:
    """``value`` as a finite float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {takes}, got {type(value).__name__}")
    number = float(value)
    if not -math.inf < number < math.inf:  # math.isfinite cannot be traced
        raise ValueError(f"{name} must be {takes}, got {value!r}")
    return number


def choice(name: str, value: Any, options: tuple[str, ...]) -> str:
    """``value`` if it is one of ``options``."""
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")
    return value


def flag(name: str, value: Any) -> bool:
    """``value`` if it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def overwritable(name: str, logits: Tensor, inplace: Any) -> None:
    """With ``inplace``, the logits must be nobody's parameter: autograd would not notice that they were overwritten."""
    if not flag("inplace", inplace) or not logits.requires_grad:
        return
    reach = 1
    for stride, size in sorted((t, n) for t, n in zip(logits.stride(), logits.shape, strict=True) if n > 1):
        if stride < reach:
            raise ValueError(
                f"inplace=True needs rows of their own, but {name} is expanded or overlaps; use inplace=False"
            )
        reach = stride * size
    owner = logits if logits._base is None else logits._base
    if owner.is_leaf and owner.requires_grad:
        what = "a leaf" if owner is logits else "a view of a leaf"
        raise ValueError(f"inplace=True would overwrite {name}, {what} that requires grad; pass inplace=False")


def checks_values(validate: Any, device: torch.device) -> bool:
    """Whether tensor values are checked: ``validate`` itself, or with None only on the CPU, where it costs no sync."""
    if validate is None:
        return device.type == "cpu"
    return flag("validate", validate)


def vocabulary(vocab_size: Any, **sizes: int) -> int:
    """The number of ids to compare, given the vocabulary size of each side by argument name."""
    smallest = min(sizes.values())
    if smallest < 1:
        raise ValueError(f"the vocabulary must not be empty, got {describe_sizes(sizes)}")
    if vocab_size is None:
        if len(set(sizes.values())) > 1:
            raise ValueError(
                f"vocabulary sizes differ: {describe_sizes(sizes)}; pass vocab_size={smallest} (or fewer) "
                "to compare only the first ids, which both sides share"
            )
        return smallest
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, Integral):
        raise TypeError(f"vocab_size must be an integer or None, got {type(vocab_size).__name__}")
    if not 1 <= int(vocab_size) <= smallest:
        raise ValueError(f"vocab_size must be in [1, {smallest}] ({describe_sizes(sizes)}), got {vocab_size}")
    return int(vocab_size)


def describe_sizes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} has {size}" for name, size in sizes.items())


def shaped(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """``value`` flattened to [N] if it has the leading shape ``shape``."""
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, one entry per token, got {tuple(value.shape)}")
    return value.reshape(-1)


def label_ids(labels: Any, shape: torch.Size) -> Tensor | None:
    """Labels as int64 [N]."""
    if labels is None:
        return None
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor of integers or None, got {type(labels).__name__}")
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
        raise TypeError(f"labels must be integers (int64), got {labels.dtype}")
    return shaped("labels", labels, shape).to(torch.int64)


def check_labels(ids: Tensor | None, vocab: int) -> None:
    """Every label is -100 or in [0, vocab). Reads values."""
    if ids is None:
        return
    bad = ((ids < 0) | (ids >= vocab)) & (ids != IGNORE_INDEX)
    if bool(bad.any()):
        raise ValueError(f"labels must be {IGNORE_INDEX} or in [0, {vocab}), got {int(ids[bad][0])}")


def row_weights(weights: Any, labels: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
    """Weights as ``dtype`` [N]; None for all ones. Without any, the label -100 means weight 0."""
    if weights is None:
        return None if labels is None else (labels != IGNORE_INDEX).to(dtype)
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights must be a torch.Tensor or None, got {type(weights).__name__}")
    if weights.is_complex():
        raise TypeError(f"weights must be real numbers, got {weights.dtype}")
    return shaped("weights", weights.detach(), shape).to(dtype)


def check_weights(weights: Tensor | None) -> None:
    """Every weight is finite and >= 0. Reads values."""
    if weights is None:
        return
    bad = ~(weights.isfinite() & (weights >= 0))
    if bool(bad.any()):
        raise ValueError(f"weights must be finite and >= 0, got {float(weights[bad][0])}")


def divergence_beta(beta: Any, shape: torch.Size, dtype: torch.dtype) -> float | Tensor:
    """A float in [0, 1], or a tensor as ``dtype`` [N]."""
    if isinstance(beta, Tensor):
        if beta.is_complex():
            raise TypeError(f"beta must be real numbers, got {beta.dtype}")
        return shaped("beta", beta.detach(), shape).to(dtype)
    number = finite("beta", beta, takes="a number in [0, 1] or a tensor of zeros and ones")
    if not 0 <= number <= 1:
        raise ValueError(f"beta must be in [0, 1], got {beta!r}")
    return number


def check_beta(beta: float | Tensor) -> None:
    """Every entry of a tensor is 0 or 1. Reads values."""
    if not isinstance(beta, Tensor):
        return
    bad = (beta != 0) & (beta != 1)
    if bool(bad.any()):
        raise ValueError(f"a beta tensor chooses 0 or 1 per token, got {float(beta[bad][0])}")
