"""The gradient of the student's logits: through the kernels as a caller combines them, and in float64 by autograd."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import caop_kernels
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[2] / "losses"))

from oracle import log_probs, statistics

OUTPUTS = ("divergence", "logprob", "entropy", "lse")


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
    **scalars: Any,
) -> tuple[Tensor, Tensor | None]:
    """(gradient, divergence) for what flows into some of OUTPUTS, [N] each."""
    per_row = isinstance(beta, Tensor)
    interior = not per_row and 0 < beta < 1
    n_cols = vocab_size or student.shape[1]
    asked = ["student_entropy"] + ([] if per_row or interior else ["forward_kl" if beta == 0 else "reverse_kl"])
    found = caop_kernels.row_statistics(
        student, teacher, labels, beta=beta if per_row else None, weights=weights, vocab_size=vocab_size,
        statistics=asked, normaliser=True, **scalars,
    )  # fmt: skip
    divergence = found.divergence if per_row else found.forward_kl if beta == 0 else found.reverse_kl
    if interior:
        divergence = caop_kernels.mixture_divergence(
            student, teacher, found.normaliser, beta=beta, n_cols=n_cols, weights=weights, **scalars
        )
    coefficients = caop_kernels.distillation_coefficients(
        found.normaliser, n_cols=n_cols, labels=labels, beta=beta, temperature=scalars.get("temperature", 1.0),
        student_entropy=found.student_entropy,
        **{f"d_{name}": flow.to(found.normaliser) for name, flow in flows.items()},
    )  # fmt: skip
    diverges = "divergence" in flows
    gradient = caop_kernels.logit_gradient(
        student, teacher, coefficients, labels=labels, weights=weights, vocab_size=vocab_size,
        beta=beta if interior and diverges else None, ratio=diverges and (per_row or beta > 0),
        teacher=diverges and (per_row or beta == 0), log="entropy" in flows, label="logprob" in flows,
        out=student if inplace else None,
        **scalars,
    )  # fmt: skip
    return gradient, divergence


def exact_gradient(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    flows: dict[str, Tensor],
    beta: float | Tensor = 0.0,
    **scalars: Any,
) -> tuple[Tensor, Tensor]:
    """The same by autograd in float64; -inf and masks are taken as a number so low that its exponential is 0."""
    a, b = (side.detach().cpu().double().clamp(min=-1e300) for side in (student, teacher))
    a.requires_grad_()
    beta = beta.cpu() if isinstance(beta, Tensor) else beta
    labels = None if labels is None else labels.cpu()
    divergence, logprob, _, entropy, _ = statistics(a, b, labels, beta=beta, **scalars)
    temperature, cap = scalars.get("temperature", 1.0), scalars.get("student_softcap")
    z = a if cap is None else cap * torch.tanh(a / cap)
    values = {"divergence": divergence, "logprob": logprob, "entropy": entropy, "lse": (z / temperature).logsumexp(-1)}
    total = sum((flow.cpu().double() * values[name]).sum() for name, flow in flows.items())
    (gradient,) = torch.autograd.grad(total, a)
    return gradient, divergence.detach()


def assert_gradient(got: Tensor, want: Tensor, student: Tensor, *, relative: float = 4e-6) -> None:
    """Within the rounding of the dtype, plus ``relative`` of the probability, plus that of what cancels in the row."""
    dtype = got.dtype
    unit = 0.0 if dtype == torch.float64 else {4: 2.0**-23, 2: torch.finfo(dtype).eps / 2}[got.element_size()]
    relative = 1e-11 if dtype == torch.float64 else relative
    p = log_probs(student.detach().cpu().double().clamp(min=-1e300), 1.0, None).exp()
    scale = want.abs() + 0.05 * want.abs().amax(-1, keepdim=True) + p
    allowed = unit * want.abs() + relative * scale + (2.0**-25 if dtype == torch.float16 else 0.0)
    error = (got.detach().cpu().double() - want).abs()
    assert torch.all(error <= allowed), f"off by {float((error / allowed).max())} times what is allowed"


def upstream(n: int, *names: str, device: Any = "cpu") -> dict[str, Tensor]:
    """Different from 1, from 0, from row to row and from output to output; of both signs."""
    base = torch.linspace(1.25, 2.75, n) * (-1.0) ** torch.arange(n)
    return {name: (base * (1.0, -0.6, 0.4, 1.7)[OUTPUTS.index(name)]).to(device) for name in names or OUTPUTS[:3]}
