"""One check of a loss: a name, and what to run; and the options that the distillation losses' checks share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal
from unittest import mock

import torch


@dataclass(frozen=True)
class Sizes:
    """Shapes of one run of the checks.

    Attributes:
        n: tokens.
        odd, even: vocabularies; ``even`` is a multiple of 16, ``odd`` lies off every alignment.
        large: a vocabulary of a real model (or what the interpreter can bear), of which few tokens are taken.
        few: that many.
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
    "small": Sizes(n=6, odd=301, even=304, large=16401, few=2, hidden=16, listed=7),  # large: two chunks of a kernel
    "full": Sizes(n=36, odd=5003, even=5008, large=151936, few=5, hidden=128, listed=64),
}


@dataclass(frozen=True)
class Setting:
    """Where checks run, by what, on which shapes."""

    device: torch.device
    backend: str
    sizes: Sizes


@dataclass(frozen=True)
class Trial:
    """One check; ``run`` raises where it fails. ``rare`` ones are left out of the small selection."""

    name: str
    run: Callable[[Setting], None]
    rare: bool = False


@dataclass(frozen=True)
class Spec:
    """Options and inputs of a distillation loss; what is not the default is in the name of the check.

    Attributes:
        dtype: of logits, or of hidden states and heads.
        beta: a number, or "per token" for a tensor of zeros and ones.
        logits: "normal"; "peaked": one likely id; "near": a teacher a thousandth away from the student.
        labels: some of them -100.
        weights: None, "nan": rows of weight 0 hold NaN, or "zero": all are 0.
        vocab: "odd", "even" or "large" (few tokens).
        extra: columns that the student has more than the teacher, so ``vocab_size`` is given.
        excluded: which side holds -inf: "both", "student", "teacher".
        n: tokens, where another number than usual.
        strided: rows that lie apart and start off every alignment.
        leading: [2, N / 2, V] instead of [N, V].
        tail, padded: of a sparse teacher; ``padded`` rows list fewer ids.
        memory: "balanced" or "min"; None for the rows' function.
        shared: one head serves both models.
        frozen: the head gets no gradient.
        blocks: gradients are made in blocks of the fewest ids, as it is with many tokens.
        flows: outputs that a gradient flows into.
        rare: left out of the small selection.
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

    def __str__(self) -> str:
        return self.named()

    def named(self, *always: str) -> str:
        """The dtype, the fields ``always``, and whatever is not the default."""
        parts = [self.dtype]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("dtype", "rare") or (value == field.default and field.name not in always):
                continue
            text = " + ".join(value) or "none" if isinstance(value, tuple) else "" if value is True else str(value)
            parts.append(f"{field.name} {text}".strip())
        return ", ".join(parts)

    def block_sizes(self) -> AbstractContextManager[object]:
        """What sees to ``blocks`` inside."""
        if not self.blocks:
            return nullcontext()
        return mock.patch.multiple("caop_fast.losses.linear.chunking", CPU_BLOCK_BYTES=1, DEVICE_BLOCK_BYTES=1)

    def tokens(self, sizes: Sizes) -> int:
        if self.n is not None:
            return self.n
        return sizes.few if self.vocab == "large" else sizes.n

    def columns(self, sizes: Sizes) -> int:
        return {"odd": sizes.odd, "even": sizes.even, "large": sizes.large}[self.vocab]
