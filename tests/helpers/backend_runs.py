"""Both backends on the same inputs: run as a script under TRITON_INTERPRET=1 it prints every result as JSON.

Imported, it gives the inputs, so that a test can hold the results to its own truth.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("torch", "triton")
BETAS = (0.0, 0.5, 1.0)
OFFSETS = (0.0, 30.0, 1e4)
NEAR = (1e-2, 0.3)
MASK = torch.finfo(torch.float32).min
EXCLUDED_PAIRS = {  # what two sides hold in one column of an otherwise ordinary row
    **{f"gap {gap:g}": (-math.inf, -gap) for gap in (0.0, 69.0, 100.0, 110.0, 300.0, 1e25)},
    "mask, ordinary": (MASK, 0.0),
    "mask, underflow": (MASK, -300.0),
    "mask, other mask": (MASK, MASK / 2),
    "mask, mask": (MASK, MASK),
    "mask, -inf": (MASK, -math.inf),
    "-inf, -inf": (-math.inf, -math.inf),
    "-1e15, ordinary": (-1e15, 0.0),
}


def near_rows(offset: float, near: float) -> tuple[Tensor, Tensor]:
    """Two nearly equal sides, float32, around ``offset``."""
    g = torch.Generator().manual_seed(0)
    student = torch.randn(2, 2000, generator=g) * 2
    return student + offset, student + near * torch.randn(2, 2000, generator=g) + offset


def excluded_rows(name: str, swap: bool) -> tuple[Tensor, Tensor]:
    """One row of three columns; the middle one holds the pair."""
    first, second = EXCLUDED_PAIRS[name]
    sides = torch.tensor([[0.0, first, 1.0]]), torch.tensor([[0.0, second, 1.2]])
    return sides[::-1] if swap else sides


def labelled_rows() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(4, 32, generator=g), torch.randn(4, 32, generator=g)


def strided_labels() -> dict[str, Tensor]:
    return {
        "column": torch.tensor([[3, 9], [4, 9], [5, 9], [6, 9]])[:, 0],
        "expanded": torch.tensor([7]).expand(4),
    }


def results(output: str, student: Tensor, teacher: Tensor, labels: Tensor | None = None, **options: Any) -> dict:
    """{backend: {field: values, "gradient": of the sum of ``output``}}."""
    from caop_fast import distillation_loss

    found = {}
    for backend in BACKENDS:
        leaf = student.clone().requires_grad_()
        out = distillation_loss(leaf, teacher, labels, backend=backend, **options)
        getattr(out, output).sum().backward()
        fields = {name: value.tolist() for name, value in out._asdict().items() if value is not None}
        found[backend] = {**fields, "gradient": leaf.grad.tolist()}
    return found


def everything() -> dict[str, dict]:
    """Results by the kind of input, then by its parameters as text."""
    found: dict[str, dict] = {"near": {}, "entropy": {}, "excluded": {}, "labels": {}, "beta": {}}
    for offset in OFFSETS:
        for near in NEAR:
            for beta in BETAS:
                found["near"][str((offset, near, beta))] = results("loss", *near_rows(offset, near), beta=beta)
        found["entropy"][str(offset)] = results("student_entropy", *near_rows(offset, 0.3))
    for name in EXCLUDED_PAIRS:
        for swap in (False, True):
            for beta in BETAS:
                rows = excluded_rows(name, swap)
                found["excluded"][str((name, swap, beta))] = results("divergence", *rows, beta=beta)
    for name, labels in strided_labels().items():
        found["labels"][name] = results("student_logprob", *labelled_rows(), labels)
    beta = torch.tensor([0.0, 0.5, 1.0, -1.0])
    found["beta"]["unvalidated"] = results("divergence", *labelled_rows(), beta=beta, validate=False)
    return found


if __name__ == "__main__":
    from helpers import gpu_arithmetic

    gpu_arithmetic.install()
    print(json.dumps(everything()))
