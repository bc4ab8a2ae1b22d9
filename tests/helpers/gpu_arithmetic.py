"""The arithmetic of GPUs in Triton's interpreter, where that has another.

``install`` gives it what every GPU does: multiply-adds rounded once, bfloat16 rounded to nearest, and the other number
for a maximum or minimum with NaN.
``approximations`` adds the errors of NVIDIA's approximate instructions at the bounds that the PTX ISA states:

    ex2.approx.ftz.f32    relative 2^-22; exact at 0
    lg2.approx.ftz.f32    absolute 2^-22 within (1/2, 2), relative 2^-22 elsewhere
    div.full.f32          2 ulp

``tl.exp2`` and ``tl.exp`` become the first and ``/`` the last; ``tl.log`` and ``tl.log2`` are polynomials of libdevice,
within an ulp. The interpreter has no inline assembly: ``approximations`` serves the one instruction that kernels write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

BOUND = 2.0**-22
HALF_WAY = 1 << 28  # the low 29 bits of a float64 that lies half-way between two float32


def fused(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z rounded once to float32, by way of float64, where the product is exact.

    Rounding the sum to float64 first matters only where that gives a tie: there the sum's own error decides. (Subnormal
    results may be rounded twice.) float64 operands are rounded twice.
    """
    if z.dtype != np.float32:
        return x * y + z
    product, addend = x.astype(np.float64) * y, z.astype(np.float64)
    total = product + addend
    tie = (total.view(np.int64) & (2 * HALF_WAY - 1)) == HALF_WAY
    if tie.any():
        rest = total - product
        error = (product - (total - rest)) + (addend - rest)
        total = np.where(tie & (error != 0), np.nextafter(total, np.copysign(np.inf, error)), total)
    return total.astype(np.float32)


def create_fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """``InterpreterBuilder.create_fma``, rounded once."""
    from triton.runtime.interpreter import TensorHandle

    return TensorHandle(fused(*np.broadcast_arrays(x.data, y.data, z.data)), z.dtype.scalar)


def nearest_bfloat16(cast_impl: Any) -> Any:
    """``InterpreterBuilder.cast_impl``, but float32 to bfloat16 (which it keeps as uint16) rounded instead of cut."""
    from triton import language as tl
    from triton.runtime.interpreter import TensorHandle

    def cast(builder: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cast_impl(builder, source, target)
        rounded = torch.from_numpy(source.data.copy()).bfloat16().view(torch.int16).numpy().view("uint16")
        return TensorHandle(rounded, target.scalar)

    return cast


def install() -> None:
    """For the rest of this process. A second call changes nothing."""
    from triton.runtime.interpreter import InterpreterBuilder

    if InterpreterBuilder.create_fma is not create_fma:
        InterpreterBuilder.create_fma = create_fma
        InterpreterBuilder.cast_impl = nearest_bfloat16(InterpreterBuilder.cast_impl)
        InterpreterBuilder.create_maxnumf = lambda builder, x, y: builder.binary_op(x, y, np.fmax)
        InterpreterBuilder.create_minnumf = lambda builder, x, y: builder.binary_op(x, y, np.fmin)


# Signs of an approximation's error: always +1, always -1, or told from the bits of the argument as if by chance.
SIGNS: dict[str, Callable[[np.ndarray], Any]] = {
    "+": lambda x: 1.0,
    "-": lambda x: -1.0,
    "?": lambda x: 1.0 - 2.0 * ((x.view(np.uint32) * np.uint32(0x9E3779B1) >> np.uint32(16)) & 1),
}


@contextmanager
def contracted() -> Iterator[None]:
    """a * b + c and a * b - c rounded once wherever kernels add to a product itself, as floating-point fusion allows.

    Without this the interpreter computes as GPUs do with fusion off. (Compilers need not contract what they may.)
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def multiply(builder: Any, x: Any, y: Any) -> Any:
        product = builder.binary_op(x, y, np.multiply)
        product.factors = (x.data, y.data)
        return product

    def add(builder: Any, x: Any, y: Any, sign: float = 1.0) -> Any:
        for product, factor, addend in ((x, 1.0, y.data * sign), (y, sign, x.data)):
            if hasattr(product, "factors") and addend.dtype == np.float32:
                a, b = product.factors
                return TensorHandle(fused(*np.broadcast_arrays(a * np.float32(factor), b, addend)), x.dtype.scalar)
        return builder.binary_op(x, y, np.add if sign > 0 else np.subtract)

    made = {
        "create_fmul": multiply,
        "create_fadd": add,
        "create_fsub": lambda builder, x, y: add(builder, x, y, np.float32(-1.0)),
    }
    with patch.multiple(InterpreterBuilder, **made):
        yield


@contextmanager
def approximations(exp2: str, log2: str) -> Iterator[None]:
    """Approximate instructions at their bounds, with the signs that two of ``SIGNS`` give; kernels launched inside take
    the way they take on an NVIDIA GPU. float64 is left as it is."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def single(exact: Callable[..., np.ndarray], approximate: Callable[..., np.ndarray]) -> Callable[..., Any]:
        def create(builder: Any, *arguments: Any) -> Any:
            operands = [a.data for a in arguments]
            op = approximate if operands[0].dtype == np.float32 else exact
            with np.errstate(all="ignore"):
                return TensorHandle(op(*operands).astype(operands[0].dtype), arguments[0].dtype.scalar)

        return create

    def approximate_exp2(x: np.ndarray) -> np.ndarray:
        return np.exp2(x.astype(np.float64)) * (1.0 + BOUND * SIGNS[exp2](x) * (x != 0))

    def approximate_log2(x: np.ndarray) -> np.ndarray:
        exact = np.log2(x.astype(np.float64))
        return exact + SIGNS[log2](x) * BOUND * np.where((x > 0.5) & (x < 2), 1.0, exact)

    def approximate_divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x.astype(np.float64) / y) * (1.0 + 1.5 * 2.0**-23 * SIGNS[exp2](np.float32(x)))  # 2 ulp once rounded

    def inline_asm(builder: Any, text: str, constraints: str, values: Any, *_: Any) -> Any:
        assert text.startswith("lg2.approx.ftz.f32"), text
        handle = single(np.log2, approximate_log2)(builder, *values)
        handle.get_result = lambda i: handle
        return handle

    made = {
        "create_exp2": single(np.exp2, approximate_exp2),
        "create_exp": single(np.exp, lambda x: approximate_exp2(x * np.float32(np.log2(np.e)))),
        "create_fdiv": single(np.divide, approximate_divide),
        "create_inline_asm": inline_asm,
    }
    fast = "caop_kernels.{}.fast_log2"
    with patch.multiple(InterpreterBuilder, **made), ExitStack() as stack:
        for module in ("mixture", "gradient"):
            stack.enter_context(patch(fast.format(module), lambda backend, double: not double))
        yield


def arithmetic(name: str) -> AbstractContextManager[None]:
    """``approximations`` of two signs, or "contracted"."""
    return contracted() if name == "contracted" else approximations(*name)
