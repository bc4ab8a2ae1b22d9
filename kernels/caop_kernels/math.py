"""Elementwise mathematics in plain Triton: the interpreter has neither libdevice nor inline assembly."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from caop_kernels import constants

LN2 = tl.constexpr(math.log(2.0))
LOG2E = tl.constexpr(constants.LOG2E)
# ln 2 in two parts; the first has ten bits, so its product with an integer exponent is exact.
LN2_HIGH = tl.constexpr(0.693359375)
LN2_LOW = tl.constexpr(-2.121944400546905827679e-4)
# (-1)^n / n! from n = 2 on
EXCESS_TERMS = tl.constexpr(tuple((-1) ** n / math.factorial(n) for n in range(2, 18)))

# 1 - 2^-r = r P(r) on |r| <= NEAR_EXP2: interpolation in Chebyshev's nodes, off by 5e-7 of the value.
NEAR_EXP2 = tl.constexpr(0.5)
DECREASE_1 = tl.constexpr(-0.24022349)
DECREASE_2 = tl.constexpr(0.05550381)
DECREASE_3 = tl.constexpr(-0.00966637)
DECREASE_4 = tl.constexpr(0.00133813)

# tanh(y) = y + y^3 P(y^2) on |y| <= 0.625: minimax fit of the relative error (4.5e-9 before rounding). Outside,
# 1 - 2 / (e^2y + 1) loses nothing.
TANH_0 = tl.constexpr(-0.33333281184701896)
TANH_1 = tl.constexpr(0.13331420373451003)
TANH_2 = tl.constexpr(-0.053737797382222056)
TANH_3 = tl.constexpr(0.0206325442560751)
TANH_4 = tl.constexpr(-0.005697381733819217)
SIGN_BIT = tl.constexpr(-(2**31))


@triton.jit
def tanh(y):
    """Hyperbolic tangent to about an ulp, so that 1 - tanh^2 is as accurate as PyTorch's; +-1 at +-inf, NaN at NaN.

    In float32 17 instructions on NVIDIA: 1 / (e^2y + 1) as the inverse root of a square is one, a division eight. The
    sign is that of y because only magnitudes enter, and an overflow of e^2y gives the 1 it should.
    """
    magnitude = tl.abs(y)
    if y.dtype == tl.float64:
        e = expm1(tl.minimum(magnitude, 20.0) * 2.0)  # beyond, 1 to the last bit; minimum() may drop a NaN
        result = e / (e + 2.0)
        result = tl.where(y != y, y, tl.where(y < 0, -result, result))
    else:
        above = tl.exp2(magnitude * (2.0 / LN2)) + 1.0
        large = 1.0 - 2.0 * tl.rsqrt(above * above)
        large = (large.to(tl.int32, bitcast=True) | (y.to(tl.int32, bitcast=True) & SIGN_BIT)).to(
            tl.float32, bitcast=True
        )
        y2 = y * y
        p = y2 * TANH_4 + TANH_3
        p = y2 * p + TANH_2
        p = y2 * p + TANH_1
        p = y2 * p + TANH_0
        result = tl.where(magnitude <= 0.625, y + y * y2 * p, large)
    return result


@triton.jit
def log1p(y):
    """log(1 + y) for |y| <= 1/2: the rounding error of 1 + y is divided out again (Kahan)."""
    w = 1.0 + y
    exact = w == 1.0
    return tl.where(exact, y, tl.log(w) * y / tl.where(exact, 1.0, w - 1.0))


@triton.jit
def excess_series(x):
    """e^-x - 1 + x for |x| <= 1/2 to full relative precision: x^2 (1/2! - x/3! + x^2/4! - ...)."""
    TERMS: tl.constexpr = 16 if x.dtype == tl.float64 else 9
    series = tl.zeros_like(x) + EXCESS_TERMS[TERMS - 1]
    for i in tl.static_range(1, TERMS):
        series = series * x + EXCESS_TERMS[TERMS - 1 - i]
    return series * x * x


@triton.jit
def exp_excess(x):
    """e^-x - 1 + x to full relative precision."""
    near = excess_series(tl.minimum(tl.maximum(x, -0.5), 0.5))
    return tl.where(tl.abs(x) <= 0.5, near, tl.exp(-x) - 1.0 + x)


@triton.jit
def power_of_two(n):
    """2^n of whole numbers n, put together from its bits; 0 where that is subnormal. `exp2` is off by 2^-22."""
    if n.dtype == tl.float64:
        bits = (tl.minimum(tl.maximum(n, -1023.0), 1024.0).to(tl.int64) + 1023) << 52
    else:
        bits = (tl.minimum(tl.maximum(n, -127.0), 128.0).to(tl.int32) + 127) << 23
    return bits.to(n.dtype, bitcast=True)


@triton.jit
def reduced_exp(x):
    """(2^n, e^f - 1) with x = n ln 2 + f and |f| <= ln 2 / 2, each to about an ulp for x <= 88."""
    x = tl.where(x < -1000.0, -1000.0, x)  # e^x is 0; NaN stays
    n = tl.floor(x * LOG2E + 0.5)
    f = (x - n * LN2_HIGH) - n * LN2_LOW
    return power_of_two(n), f + excess_series(-f)


@triton.jit
def accurate_exp(x):
    """e^x to about an ulp for x <= 88: `tl.exp` rounds x log2(e), which costs |x| ulp."""
    power, rest = reduced_exp(x)
    return power + power * rest


@triton.jit
def expm1(x):
    """e^x - 1 to about an ulp for x <= 88."""
    power, rest = reduced_exp(x)
    return power * rest + (power - 1.0)


@triton.jit
def one_minus_exp2(r):
    """1 - 2^-r for |r| <= NEAR_EXP2, float32, to full relative precision: `exp2` is off by up to 2^-22 of its value."""
    p = r * DECREASE_4 + DECREASE_3
    p = r * p + DECREASE_2
    p = r * p + DECREASE_1
    p = r * p + LN2
    return r * p


@triton.jit
def log2_below_one(y, FAST: tl.constexpr):
    """log2(y) for 0 < y <= 1. FAST takes the special-function unit itself: within 2^-22 for y >= 1/2 (CUDA's bound).

    `tl.log2` takes some 25 instructions for an ulp and for subnormal numbers; a mixture's g is never below beta.
    """
    if FAST:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [y], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(y)


@triton.jit
def clip(x, low, high):
    """x within [low, high]; NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def chain(grad, slope):
    """The chain rule's grad * slope; 0 where the upstream gradient is 0, even where the slope is infinite or NaN."""
    return tl.where(grad == 0, 0.0, grad * slope)
