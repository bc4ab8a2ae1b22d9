"""Tolerances: a few times the error of plain PyTorch in float32 on the same inputs, plus rounding.

Values [N] and gradients of logits are compared elementwise; gradients of hidden states and heads, which are sums of
rounded products, by the Euclidean norm of each row. The error of plain PyTorch is its largest in the whole tensor,
since it may be small by chance in a row. What is exactly 0 both in plain PyTorch and in float64 (masked rows, ids past
the vocabulary) must be exactly 0.

Rounding is that of float32, a few ULPs of the terms whose difference a gradient is, and that of the result's dtype:
half an ULP of each element, or 0.75 where the gradient of the logits may be rounded before the products (in the norm of
a row the squares of the two errors add up). In bfloat16 that is 0.4 % and 0.6 %, so a gradient that is wrong by 1 %
fails; a tolerance too large for that is itself an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from helpers.loss_checks.definitions import terms_of_gradients

FACTOR = 4.0  # times the error of plain PyTorch
ULPS = 8 * 2.0**-23  # of float32, in which everything is computed; approximate exponentials are off by 2 ULPs
SUBNORMAL = {torch.float16: 2.0**-25}  # half the distance of subnormal float16 numbers
LARGEST_TOLERANCE = 0.009
DIVERGENCES, DIVERGENCE = ("loss", "divergence"), 0.25  # at most this share of the value, plus two ULPs of 1
PHASES = (1.75, -0.625, 0.4375, 1.125)  # upstream gradients of the outputs: none is 1

Defined = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


class Inaccurate(AssertionError):
    """A result is too far from float64."""


def verify(
    ours: Callable[[dict[str, Tensor]], Mapping[str, Tensor | None]],
    defined: Defined,
    leaves: dict[str, Tensor],
    flows: Sequence[str],
    *,
    rows: bool = False,
    factor: float = FACTOR,
) -> None:
    """Compare the outputs of ``ours`` and the gradients of ``leaves`` with ``defined``, in float64 and in float32.

    Both are called with the leaves by name; the outputs ``flows`` get upstream gradients. ``rows`` compares gradients
    by the norms of their rows. ``factor``: times the error of plain PyTorch that gradients may have.
    """
    with terms_of_gradients() as terms:
        true, true_gradients = evaluate(defined, leaves, flows, torch.float64)
    plain, plain_gradients = evaluate(defined, leaves, flows, torch.float32)
    found, gradients = evaluate(ours, leaves, flows, None)
    if found.keys() != true.keys():
        raise Inaccurate(f"outputs {sorted(found)}, expected {sorted(true)}")
    for name, want in true.items():
        compare_values(name, found[name], want, plain[name])
    for name, want in true_gradients.items():
        got, theirs, dtype = gradients[name], plain_gradients[name], leaves[name].dtype
        if rows:
            compare_rows(f"gradient of {name}", got, want, theirs, dtype)
        else:
            compare_elements(f"gradient of {name}", got, want, theirs, dtype, sum(terms), factor)


def evaluate(
    call: Callable, leaves: dict[str, Tensor], flows: Sequence[str], dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs that are not None and gradients of the leaves, with the leaves in ``dtype`` (None: their own)."""
    own = {name: t.detach().clone().to(dtype or t.dtype).requires_grad_() for name, t in leaves.items()}
    found = {name: value for name, value in call(own).items() if value is not None}
    if not flows:
        return {name: value.detach() for name, value in found.items()}, {}
    missing = [name for name in flows if name not in found or not found[name].requires_grad]
    if missing:
        raise Inaccurate(f"not differentiable: {', '.join(missing)}")
    total = sum((found[name] * upstream(found[name], i)).sum() for i, name in enumerate(flows))
    gradients = torch.autograd.grad(total, list(own.values()))
    return {name: value.detach() for name, value in found.items()}, dict(zip(own, gradients, strict=True))


def upstream(output: Tensor, number: int) -> Tensor:
    """An upstream gradient: not 1, different in each row and output, of both signs, exact in float32."""
    if output.ndim == 0:
        return torch.full_like(output, PHASES[number])
    at = torch.arange(output.numel(), device=output.device)
    ramp = (1 + (at % 13) / 16) * (1 - 2 * (at % 2))
    return (PHASES[number] * ramp).to(output.dtype).view(output.shape).detach()


def compare_values(name: str, got: Tensor, true: Tensor, plain: Tensor) -> None:
    """Elementwise; what is not finite must be equal."""
    if got.shape != true.shape or got.dtype != torch.float32:
        raise Inaccurate(f"{name} is {got.dtype} {tuple(got.shape)}, expected float32 {tuple(true.shape)}")
    if not true.numel():
        return
    finite = true.isfinite()
    same = finite | torch.where(true.isnan(), got.isnan(), got.double() == true)
    if not bool(same.all()):
        raise Inaccurate(f"{name} is {float(got[~same].reshape(-1)[0])}, not {float(true[~same].reshape(-1)[0])}")
    got, true, plain = (torch.where(finite, t.double(), 0.0) for t in (got, true, plain))
    # Logarithms of probabilities are of order 1 and more.
    allowed = FACTOR * (plain - true).abs().amax() + ULPS * true.abs().clamp(min=1)
    if name in DIVERGENCES:  # for near models they are no larger than plain PyTorch's error
        allowed = torch.minimum(allowed, DIVERGENCE * true.abs() + 2 * 2.0**-23)
    _require(name, (got - true).abs(), torch.where((true == 0) & (plain == 0), 0.0, allowed), true)


def compare_elements(
    name: str, got: Tensor, true: Tensor, plain: Tensor, dtype: torch.dtype, terms: Tensor | int, factor: float
) -> None:
    """Elementwise, relative to plain PyTorch's largest error; ``terms`` as in ``terms_of_gradients``."""
    _check_form(name, got, true, dtype)
    if not true.numel():
        return
    allowed = factor * (plain.double() - true).abs().amax() + ULPS * (true.abs().amax(-1, keepdim=True) + terms)
    allowed = allowed + _rounding(dtype, 1) * true.abs() + SUBNORMAL.get(dtype, 0.0)
    allowed = torch.where((true == 0) & (plain == 0), 0.0, allowed)
    _require(name, (got.double() - true).abs(), allowed, true)
    _require_small(name, allowed, true.abs())


def compare_rows(name: str, got: Tensor, true: Tensor, plain: Tensor, dtype: torch.dtype) -> None:
    """The norms of rows, relative to plain PyTorch's largest error; a vector is one row."""
    _check_form(name, got, true, dtype)
    if not true.numel():
        return
    got, true, plain = (torch.atleast_2d(t.double()) for t in (got, true, plain))
    size = true.norm(dim=-1)
    allowed = FACTOR * (plain - true).norm(dim=-1).amax() + ULPS * size.amax() + _rounding(dtype, 1.5) * size
    allowed = allowed + SUBNORMAL.get(dtype, 0.0) * true.shape[-1] ** 0.5
    allowed = torch.where((true == 0).all(-1) & (plain == 0).all(-1), 0.0, allowed)
    _require(name, (got - true).norm(dim=-1), allowed, size)
    _require_small(name, allowed, size)


def _check_form(name: str, got: Tensor, true: Tensor, dtype: torch.dtype) -> None:
    if got.dtype != dtype or got.shape != true.shape:
        raise Inaccurate(f"{name} is {got.dtype} {tuple(got.shape)}, expected {dtype} {tuple(true.shape)}")


def _rounding(dtype: torch.dtype, times: float) -> float:
    if dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET", "0") == "1":
        times = 2  # the interpreter truncates to bfloat16 where GPUs round
    return times * torch.finfo(dtype).eps / 2


def _require(name: str, error: Tensor, allowed: Tensor, true: Tensor) -> None:
    bad = ~(error <= allowed)
    if not bool(bad.any()):
        return
    excess = torch.where(bad, error / allowed, -torch.inf).nan_to_num(nan=torch.inf)
    at = int(excess.argmax())
    place = [int(i) for i in torch.unravel_index(torch.tensor(at), error.shape)] if error.ndim else []
    far, near, size = (float(t.reshape(-1)[at]) for t in (error, allowed, true))
    raise Inaccurate(
        f"{name} is off by {far:.3g} where {near:.3g} is allowed, at {place} of {list(error.shape)} where the "
        f"reference is {size:.6g}; {int(bad.sum())} in total"
    )


def _require_small(name: str, allowed: Tensor, size: Tensor) -> None:
    some = size > 0
    if bool(some.any()):
        sharpest = float((allowed / size)[some].min())
        if not sharpest <= LARGEST_TOLERANCE:
            raise Inaccurate(f"{name}: this tolerance of {100 * sharpest:.2g} % would accept an error of 1 %")
