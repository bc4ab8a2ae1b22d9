"""The gradient of the student's logits through the kernels, as a caller combines them; the oracle beside it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import caop_kernels
from helpers.gradient_oracle import OUTPUTS, assert_gradient, exact_gradient, upstream

__all__ = ["OUTPUTS", "assert_gradient", "exact_gradient", "kernel_gradient", "upstream"]


def kernel_gradient(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    flows: dict[str, Tensor],
    beta: float | Tensor = 0.0,
    weights: Tensor | None = None,
    vocab_size: int | None = None,
    inplace: bool = False,
    out: Tensor | None = None,
    **scalars: Any,
) -> tuple[Tensor, Tensor | None]:
    """(gradient, divergence) for what flows into some of OUTPUTS, [N] each."""
    per_row = isinstance(beta, Tensor)
    interior = not per_row and 0 < beta < 1
    n_cols = vocab_size or student.shape[1]
    asked = ["student_entropy"] + ([] if per_row or interior else ["forward_kl" if beta == 0 else "reverse_kl"])
    found = caop_kernels.row_statistics(
        student, teacher, labels, beta=beta if per_row else None, weights=weights, vocab_size=vocab_size,
        statistics=asked, saved_statistics=True, **scalars,
    )  # fmt: skip
    divergence = found.divergence if per_row else found.forward_kl if beta == 0 else found.reverse_kl
    if interior:
        divergence = caop_kernels.mixture_divergence(
            student, teacher, found.saved_statistics, beta=beta, n_cols=n_cols, weights=weights, **scalars
        )
    coefficients = caop_kernels.distillation_coefficients(
        found.saved_statistics, n_cols=n_cols, labels=labels, beta=beta, temperature=scalars.get("temperature", 1.0),
        student_entropy=found.student_entropy,
        **{f"grad_{name}": flow.to(found.saved_statistics) for name, flow in flows.items()},
    )  # fmt: skip
    diverges = "divergence" in flows
    gradient = caop_kernels.logit_gradient(
        student, teacher, coefficients, labels=labels, weights=weights, vocab_size=vocab_size,
        beta=beta if interior and diverges else None, ratio=diverges and (per_row or beta > 0),
        teacher=diverges and (per_row or beta == 0), log="entropy" in flows, label="logprob" in flows,
        out=student if inplace else out,
        **scalars,
    )  # fmt: skip
    return gradient, divergence
