"""Checks of arguments that the linear losses share, and how they become what the operators take."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from caop_fast.losses import checks
from caop_fast.losses.backend import resolve_backend
from caop_fast.losses.linear.call import Setting, Side
from caop_fast.losses.linear.dtensor import check_plain, gathered
from caop_fast.losses.linear.head import projection_dtypes
from caop_fast.losses.linear.shards import resolve_layout


class Model(NamedTuple):
    """One side as the caller passed it; ``prefix`` is what its arguments are called by ("student_", or nothing)."""

    prefix: str
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def tensors(self) -> dict[str, Tensor | None]:  # no property: torch 2.9 cannot trace those of named tuples
        names = (f"{self.prefix}{name}" for name in ("hidden", "weight", "bias"))
        return dict(zip(names, self[1:4], strict=True))


def check_model(model: Model, *, sharded: bool) -> Model:
    """A side whose tensors fit together, with its distributed head gathered."""
    prefix, hidden, weight, bias, scale, softcap = model
    hidden = checks.floating_tensor(f"{prefix}hidden", hidden, min_ndim=2)
    if hidden.shape[-1] == 0:
        raise ValueError(f"{prefix}hidden must have at least one feature, got shape {tuple(hidden.shape)}")
    checks.floating_tensor(f"{prefix}weight", weight, ndim=2)
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{prefix}weight must be [V, {hidden.shape[-1]}] to fit {prefix}hidden {tuple(hidden.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None:
        checks.floating_tensor(f"{prefix}bias", bias, ndim=1)
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(f"{prefix}bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    return Model(
        prefix,
        hidden,
        gathered(f"{prefix}weight", weight, sharded=sharded),
        None if bias is None else gathered(f"{prefix}bias", bias, sharded=sharded),
        checks.finite(f"{prefix}scale", scale),
        checks.positive(f"{prefix}softcap", softcap, optional=True),
    )


def check_pair(student: Model, teacher: Model, *, sharded: bool) -> tuple[Model, Model]:
    """Both sides; a distributed head that serves both is gathered once."""
    same = student.weight is teacher.weight
    student = check_model(student, sharded=sharded)
    teacher = check_model(teacher._replace(weight=student.weight) if same else teacher, sharded=sharded)
    lead = student.hidden.shape[:-1]
    if teacher.hidden.shape[:-1] != lead:
        raise ValueError(
            "teacher_hidden must have the leading shape of student_hidden, "
            f"{tuple(lead)}, got {tuple(teacher.hidden.shape[:-1])}"
        )
    return student, teacher


def check_logits_dtype(logits_dtype: Any) -> torch.dtype | None:
    """A floating dtype, or None."""
    if logits_dtype is not None:
        if not isinstance(logits_dtype, torch.dtype):
            raise TypeError(f"logits_dtype must be a torch.dtype or None, got {type(logits_dtype).__name__}")
        if logits_dtype not in checks.FLOAT_DTYPES:
            raise ValueError(f"logits_dtype must be float32, bfloat16, float16 or float64, got {logits_dtype}")
    return logits_dtype


class Prepared(NamedTuple):
    """What the operators take of one call."""

    lead: torch.Size
    dtype: torch.dtype  # of the statistics
    device: torch.device
    sides: list[Any]  # each ``Side``, flattened
    setting: Setting


def prepare(
    models: tuple[Model, ...],
    others: dict[str, Any],
    *,
    vocab_size: int | None,
    logits_dtype: Any,
    chunk_size: Any,
    small: bool,
    process_group: Any,
    backend: str,
    validate: bool | None,
) -> Prepared:
    """Checked sides, flattened, and the setting. ``others`` are further arguments that may be tensors, by name."""
    student = models[0]
    check_plain({**{f"{m.prefix}hidden": m.hidden for m in models}, **others})
    device = checks.one_device({**{k: v for m in models for k, v in m.tensors().items()}, **others})
    dtype = checks.statistics_dtype(tuple(t for m in models for t in m.tensors().values()))
    rows = {f"{m.prefix}weight": m.weight.shape[0] for m in models}
    layout = resolve_layout(process_group, vocab_size, rows, device)
    vocab = checks.vocabulary(vocab_size, **rows) if layout is None else layout.columns.total
    result = check_logits_dtype(logits_dtype) or dtype
    grad = torch.is_grad_enabled()
    wanted = [grad and t is not None and t.requires_grad for t in student[1:4]]
    sides: list[Any] = []
    for index, m in enumerate(models):
        hidden = m.hidden.reshape(-1, m.hidden.shape[-1])
        operand, _ = projection_dtypes(hidden, m.weight, result)
        tensors = (hidden, m.weight, m.bias)
        if index:  # the teacher is never differentiated
            tensors = tuple(None if t is None else t.detach() for t in tensors)
        sides += Side(*tensors, m.scale, m.softcap, operand)
    setting = Setting(
        result=result,
        vocab=vocab,
        chunk=checks.positive_integer("chunk_size", chunk_size) or 0,
        small=small,
        wanted=wanted,
        group=None if layout is None else layout.group,
        rank=0 if layout is None else layout.rank,
        sizes=[] if layout is None else list(layout.sizes),
        triton=resolve_backend(backend, device) == "triton",
        validate=checks.checks_values(validate, device),
    )
    return Prepared(student.hidden.shape[:-1], dtype, device, sides, setting)
