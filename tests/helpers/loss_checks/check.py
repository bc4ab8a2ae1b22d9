"""One check of a loss, and the options and inputs that the checks vary."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, TypedDict
from unittest import mock

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """Shapes of one run of the checks.

    Attributes:
        n: tokens.
        odd, even: vocabulary sizes; ``even`` is a multiple of 16, ``odd`` breaks every alignment.
        large: a vocabulary size of a real model, or what is bearable in Triton's interpreter.
        few: tokens for ``large``.
        hidden: features.
        listed: k of a sparse teacher.
    """

    n: int
    odd: int
    even: int
    large: int
    few: int
    hidden: int
    listed: int


SIZES = {
    "small": Sizes(
        n=6, odd=301, even=304, large=16401, few=2, hidden=16, listed=7
    ),  # large: a kernel's chunk and a bit
    "full": Sizes(n=36, odd=5003, even=5008, large=151936, few=5, hidden=128, listed=64),
}


@dataclass(frozen=True)
class Setting:
    """Device, backend and shapes of the checks."""

    device: torch.device
    backend: str
    sizes: Sizes


@dataclass(frozen=True)
class Check:
    """One check; ``run`` raises if it fails. ``rare`` ones run in full size only."""

    name: str
    run: Callable[[Setting], None]
    rare: bool = False


@dataclass(frozen=True)
class Spec:
    """Options and inputs of a loss; the name of the check lists those that are not the default.

    Attributes:
        dtype: of logits, or of hidden states and heads.
        beta: a number, or "per token" for a tensor of zeros and ones.
        logits: "normal"; "peaked": one likely id; "near": a teacher a thousandth away from the student.
        labels: given, some of them -100.
        weights: None; "nan": rows of weight 0 contain NaN; "zero": all are 0.
        vocab: "odd", "even" or "large" (few tokens).
        extra: columns that the student has more than the teacher, so that ``vocab_size`` is passed.
        excluded: whose logits contain -inf: "both", "student", "teacher".
        n: number of tokens, where not that of ``Sizes``.
        strided: rows that are not contiguous and break every alignment.
        leading: [2, N / 2, V] instead of [N, V].
        tail, padded: of a sparse teacher; ``padded`` rows list fewer ids.
        memory: "balanced" or "min"; None for ``linear_distillation_rows``.
        shared: both models have the same head.
        frozen: the head gets no gradient.
        blocks: logits are computed in the smallest chunks and vocabulary blocks, as for many tokens.
        flows: outputs with an upstream gradient.
        rare: in full size only.
    """

    dtype: str = "float32"
    beta: float | Literal["per token"] = 0.0
    temperature: float = 1.0
    softcap: float | None = None
    logits: Literal["normal", "peaked", "near"] = "normal"
    labels: bool = False
    weights: Literal["nan", "zero"] | None = None
    vocab: Literal["odd", "even", "large"] = "odd"
    extra: int = 0
    excluded: Literal["both", "student", "teacher"] | None = None
    n: int | None = None
    strided: bool = False
    reduction: str = "mean"
    inplace: bool = False
    leading: bool = False
    tail: str = "bucket"
    padded: bool = False
    memory: str | None = None
    shared: bool = False
    frozen: bool = False
    blocks: bool = False
    bias: bool = False
    scale: float = 1.0
    chunk_size: int | None = None
    flows: tuple[str, ...] = ("loss",)
    rare: bool = False

    def __str__(self) -> str:  # also the seed of the inputs
        return self.named()

    def named(self, *always: str) -> str:
        """The dtype, the fields ``always``, and all that are not the default."""
        parts = [self.dtype]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("dtype", "rare") or (value == field.default and field.name not in always):
                continue
            text = " + ".join(value) or "none" if isinstance(value, tuple) else "" if value is True else str(value)
            parts.append(f"{field.name} {text}".strip())
        return ", ".join(parts)

    def block_sizes(self) -> AbstractContextManager[object]:
        """Within it the losses choose the smallest chunks and vocabulary blocks, if ``blocks``."""
        if not self.blocks:
            return nullcontext()
        sizes = dict.fromkeys(("CPU_BLOCK_BYTES", "DEVICE_BLOCK_BYTES", "CPU_CHUNK_BYTES", "DEVICE_CHUNK_BYTES"), 1)
        return mock.patch.multiple("caop_fast.losses.linear.chunking", **sizes)

    def shaped(self, rows: Tensor) -> Tensor:
        """[N, ...], or [2, N / 2, ...] if ``leading``."""
        return rows.unflatten(0, (2, -1)) if self.leading else rows

    def flattened(self, outputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        """Outputs with one leading dimension again."""
        if not self.leading:
            return outputs
        return {name: value.flatten() if value is not None and value.ndim else value for name, value in outputs.items()}

    def tokens(self, sizes: Sizes) -> int:
        if self.n is not None:
            return self.n
        return sizes.few if self.vocab == "large" else sizes.n

    def columns(self, sizes: Sizes) -> int:
        return {"odd": sizes.odd, "even": sizes.even, "large": sizes.large}[self.vocab]


class TokenOptions(TypedDict):
    """Of the losses of one model."""

    temperature: float
    softcap: float | None


class TopkOptions(TypedDict):
    """Of the top-k losses."""

    tail: str
    beta: float | Tensor
    temperature: float
    student_softcap: float | None
    reduction: str


class DenseOptions(TypedDict):
    """Of the distillation losses."""

    beta: float | Tensor
    temperature: float
    student_softcap: float | None
    teacher_softcap: float | None


class ScoreOptions(TypedDict):
    """Of the confidence losses."""

    kind: str
    outside_weight: float
    eps: float
    reduction: str
