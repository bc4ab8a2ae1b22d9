"""The gradient of the student's logits in float64, by autograd through the oracle, and how near it others must be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from helpers.oracle import log_probs, statistics

OUTPUTS = ("divergence", "logprob", "entropy", "lse")


def exact_gradient(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    flows: dict[str, Tensor],
    beta: float | Tensor = 0.0,
    **scalars: Any,
) -> tuple[Tensor, Tensor]:
    """(gradient, divergence) for what flows into some of OUTPUTS, [N] each.

    -inf and masks are taken as a number so low that its exponential is 0.
    """
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


def assert_gradient(
    got: Tensor,
    want: Tensor,
    student: Tensor,
    *,
    relative: float = 4e-6,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> None:
    """Within the rounding of the dtype, plus ``relative`` of the probability, plus that of what cancels in the row."""
    dtype = got.dtype
    unit = 0.0 if dtype == torch.float64 else {4: 2.0**-23, 2: torch.finfo(dtype).eps / 2}[got.element_size()]
    relative = 1e-11 if dtype == torch.float64 else relative
    p = log_probs(student.detach().cpu().double().clamp(min=-1e300), temperature, softcap).exp()
    scale = want.abs() + 0.05 * want.abs().amax(-1, keepdim=True) + p
    allowed = unit * want.abs() + relative * scale + (2.0**-25 if dtype == torch.float16 else 0.0)
    error = (got.detach().cpu().double() - want).abs()
    assert torch.all(error <= allowed), f"off by {float((error / allowed).max())} times what is allowed"


def upstream(n: int, *names: str, device: Any = "cpu") -> dict[str, Tensor]:
    """Different from 1, from 0, from row to row and from output to output; of both signs."""
    base = torch.linspace(1.25, 2.75, n) * (-1.0) ** torch.arange(n)
    return {name: (base * (1.0, -0.6, 0.4, 1.7)[OUTPUTS.index(name)]).to(device) for name in names or OUTPUTS[:3]}
