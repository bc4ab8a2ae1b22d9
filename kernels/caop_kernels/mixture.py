"""The divergence through a mixture (generalised Jensen-Shannon), by a second read of both logits.

With m = beta p_t + (1 - beta) p_s and 0 < beta < 1 (GKD, arXiv 2306.13649):

    D = beta sum p_t (log p_t - log m) + (1 - beta) sum p_s (log p_s - log m)

Every column's m needs both partition sums, which is why one read cannot do it. In log2 units and relative to the
student's partition sum, w_s = u_s and w_t = u_t + log2(z_s / z_t) are the two log-probabilities; r = w_s - w_t their
difference, P = 2^max(w_s, w_t) the larger probability, P t with t = 2^-|r| the smaller, and share its weight in m:

    log2 m = max(w_s, w_t) + log2 g      g = (1 - share) + share t = 1 - share (1 - t)

No underflow and no division: m formed from probabilities would be 0, and its logarithm NaN, below log p of about -104.
Where the sides are close, the terms are of first order in r and add up to D, of second order: no error that is not
relative to r itself will do. In float32 a polynomial in r, fitted for the beta at hand, takes the place of the
exponential and the logarithm there, whose units err by 2^-22 of 1. A column that both sides exclude adds 0; one that
only one side excludes a finite term.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from caop_kernels.checks import assert_fields, assert_logits, assert_rows, contiguous
from caop_kernels.constants import SAVED_FIELDS
from caop_kernels.launch import (
    CHUNK,
    MERGE_ROWS,
    RowLaunch,
    backend_of,
    compiled_with,
    compute_type,
    current_device,
    fast_log2,
    is_aligned,
    merge_warps,
    mixture_launch,
    scalings,
)
from caop_kernels.masked_rows import live_row, live_rows, store_live
from caop_kernels.math import LN2, log2_below_one
from caop_kernels.state import EXCLUDED
from caop_kernels.tile import Tile, by_thread, exponents, load_logits, row_logits, thread_sum, tile_columns
from caop_kernels.tuning import chosen

MIXTURE_FIELDS = tl.constexpr(2)  # sums of p (log2 p - log2 m) under the student and under the teacher, times z_s


# |r| up to which the polynomial serves; of its degree it is off by less than 5e-7 (4 beta (1 - beta)) at the ends.
NEAR_MIXTURE = tl.constexpr(1.0)
TERMS = 5


class NearMixture(NamedTuple):
    """log2 p_s - log2 m = r (beta + r Q(r)) for |r| <= NEAR_MIXTURE, with Q(r) = q0 + q1 r + ..."""

    q0: tl.tensor
    q1: tl.tensor
    q2: tl.tensor
    q3: tl.tensor
    q4: tl.tensor


@functools.lru_cache(maxsize=64)
def near_mixture(beta: float) -> dict[str, float]:
    """Q's coefficients, as arguments of kernels: interpolation in Chebyshev's nodes, of which 0 is one."""

    def q(r: float) -> float:
        if abs(r) < 1e-9:
            return -beta * (1.0 - beta) * LN2.value / 2.0
        return (-math.log1p(beta * math.expm1(-r * LN2.value)) / LN2.value - beta * r) / (r * r)

    nodes = [NEAR_MIXTURE.value * math.cos(math.pi * (i + 0.5) / TERMS) for i in range(TERMS)]
    values = [q(node) for node in nodes]
    for order in range(1, TERMS):  # divided differences
        for i in reversed(range(order, TERMS)):
            values[i] = (values[i] - values[i - 1]) / (nodes[i] - nodes[i - order])
    powers = [0.0] * TERMS
    for value, node in zip(reversed(values), reversed(nodes), strict=True):  # from Newton's form to powers of r
        powers = [value - node * powers[0], *(powers[k - 1] - node * powers[k] for k in range(1, TERMS))]
    return {f"q{k}": coefficient for k, coefficient in enumerate(powers)}


@triton.jit
def mixture_over_larger(r, gap, beta, near, FAST_LOG2: tl.constexpr):
    """(log2 of m over the larger of p_s, p_t, 2^-gap); gap = |r|."""
    t = tl.exp2(-gap)
    share = tl.where(r >= 0, beta, 1.0 - beta)
    above = log2_below_one(1.0 - share * (1.0 - t), FAST_LOG2)
    if r.dtype != tl.float64:
        q = near.q4 * r + near.q3
        q = q * r + near.q2
        q = q * r + near.q1
        q = q * r + near.q0
        # Where p_t is the larger, log2 p_t = log2 p_s - r, and beta r - r = (1 - beta) gap.
        above = tl.where(gap <= NEAR_MIXTURE, -gap * (share + gap * q), above)
    return above, t


class MixtureRow(NamedTuple):
    """What a row needs to form its mixture, COMPUTE."""

    m_s: tl.tensor
    m_t: tl.tensor
    log_ratio: tl.tensor  # log2(z_s / z_t)
    beta: tl.tensor
    near: NearMixture


@triton.jit
def accumulate_mixture(
    sum_s, sum_t, student, teacher, mixture, columns, n_cols,
    TILE: tl.constexpr, MASKED: tl.constexpr, SOFTCAPS: tl.constexpr, FAST_LOG2: tl.constexpr,
):  # fmt: skip
    """Add one tile of columns to the two sums [threads], one per thread."""
    v_s = load_logits(student, columns, n_cols, MASKED, SOFTCAPS[0])
    v_t = load_logits(teacher, columns, n_cols, MASKED, SOFTCAPS[1])
    w_s = exponents(v_s, student.scale, mixture.m_s)
    w_t = exponents(v_t, teacher.scale, mixture.m_t)
    w_s = tl.maximum(w_s, EXCLUDED)
    w_t = tl.maximum(w_t, EXCLUDED) + mixture.log_ratio
    r = w_s - w_t
    gap = tl.abs(r)
    larger = tl.exp2(tl.maximum(w_s, w_t))
    above, t = mixture_over_larger(r, gap, mixture.beta, mixture.near, FAST_LOG2)
    of_larger = larger * above
    of_smaller = larger * t * (above + gap)
    to_s = tl.where(r >= 0, of_larger, of_smaller)
    to_t = tl.where(r >= 0, of_smaller, of_larger)
    return sum_s - thread_sum(by_thread(to_s, TILE)), sum_t - thread_sum(by_thread(to_t, TILE))


@triton.jit(do_not_specialize=["n_rows"])
def mixture_kernel(
    student_ptr,  # [n_rows, >= n_cols], unit column stride
    teacher_ptr,
    saved_statistics_ptr,  # [SAVED_FIELDS, n_rows] of row_stats.py, COMPUTE
    weights_ptr,  # [n_rows], or None: a row of weight 0 is not read
    sums_ptr,  # [chunks, MIXTURE_FIELDS, n_rows], COMPUTE
    student_stride,
    teacher_stride,
    n_rows,
    n_cols,
    scale_s: tl.float64,
    scale_t: tl.float64,
    inverse_cap_s: tl.float64,
    inverse_cap_t: tl.float64,
    beta: tl.float64,
    q0: tl.float32,  # of near_mixture
    q1: tl.float32,
    q2: tl.float32,
    q3: tl.float32,
    q4: tl.float32,
    CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
    SOFTCAP_S: tl.constexpr,
    SOFTCAP_T: tl.constexpr,
    FAST_LOG2: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Program (row, chunk): the two sums over one chunk of columns of one row."""
    TILE: tl.constexpr = Tile(GROUPS, THREADS, VECTOR)
    COLUMNS: tl.constexpr = GROUPS * THREADS * VECTOR
    SOFTCAPS: tl.constexpr = (SOFTCAP_S, SOFTCAP_T)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    if live_row(weights_ptr, row):
        rows = n_rows.to(tl.int64)
        student = row_logits(student_ptr + row * student_stride, scale_s, inverse_cap_s, COMPUTE)
        teacher = row_logits(teacher_ptr + row * teacher_stride, scale_t, inverse_cap_t, COMPUTE)
        mixture = MixtureRow(
            tl.load(saved_statistics_ptr + row),
            tl.load(saved_statistics_ptr + rows + row),
            tl.load(saved_statistics_ptr + 4 * rows + row) / LN2,
            tl.full((), beta, COMPUTE),
            NearMixture(q0, q1, q2, q3, q4),
        )
        sum_s = tl.zeros([THREADS], COMPUTE)
        sum_t = sum_s

        begin = chunk * CHUNK
        offsets = begin + tile_columns(TILE)
        width = tl.minimum(n_cols - begin, CHUNK)
        whole = width // COLUMNS * COLUMNS
        for start in tl.range(0, whole, COLUMNS, loop_unroll_factor=UNROLL):
            sum_s, sum_t = accumulate_mixture(
                sum_s, sum_t, student, teacher, mixture, start + offsets, n_cols, TILE, False, SOFTCAPS, FAST_LOG2
            )
        if whole < width:
            sum_s, sum_t = accumulate_mixture(
                sum_s, sum_t, student, teacher, mixture, whole + offsets, n_cols, TILE, True, SOFTCAPS, FAST_LOG2
            )
        pointer = sums_ptr + chunk.to(tl.int64) * MIXTURE_FIELDS * rows + row
        tl.store(pointer, tl.sum(sum_s, axis=0))
        tl.store(pointer + rows, tl.sum(sum_t, axis=0))


@triton.jit(do_not_specialize=["n_rows", "n_chunks"])
def finish_mixture_kernel(
    sums_ptr,  # [n_chunks, MIXTURE_FIELDS, n_rows]
    saved_statistics_ptr,  # [SAVED_FIELDS, n_rows]; its last field becomes the mean ratio
    weights_ptr,
    divergence_ptr,  # [n_rows]
    n_rows,
    n_chunks,
    beta: tl.float64,
    ROWS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One thread per row: add the chunks in order; divergence and E_s[log p_s - log m] in nats."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = rows < n_rows
    n_rows = n_rows.to(tl.int64)
    live = live_rows(weights_ptr, rows, mask)
    beta = tl.full((), beta, COMPUTE)
    sum_s = tl.zeros([ROWS], COMPUTE)
    sum_t = sum_s
    for i in tl.range(0, n_chunks):
        pointer = sums_ptr + i * (MIXTURE_FIELDS * n_rows) + rows
        sum_s += tl.load(pointer, mask=live, other=0.0)
        sum_t += tl.load(pointer + n_rows, mask=live, other=0.0)
    z_s = tl.load(saved_statistics_ptr + 2 * n_rows + rows, mask=live, other=1.0)
    z_t = tl.load(saved_statistics_ptr + 3 * n_rows + rows, mask=live, other=1.0)
    # The clamps of the second read may drop a NaN; the partition sums hold it.
    nan = tl.where((z_s == z_s) & (z_t == z_t), 0.0, float("nan"))
    mean_ratio = sum_s / z_s * LN2 + nan
    divergence = (1.0 - beta) * mean_ratio + beta * (sum_t / z_s * LN2)
    divergence = tl.where(divergence < 0, 0.0, divergence)
    store_live(divergence_ptr, rows, divergence, live, mask)
    store_live(saved_statistics_ptr + 5 * n_rows, rows, mean_ratio, live, mask)


def mixture_divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    saved_statistics: torch.Tensor,
    *,
    beta: float,
    n_cols: int,
    weights: torch.Tensor | None = None,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> torch.Tensor:
    """D(beta) of each row, [N] in nats, for 0 < beta < 1. Not differentiable.

    Args:
        student_logits, teacher_logits, weights, temperature, student_softcap, teacher_softcap: as given to
            `row_statistics`.
        saved_statistics: [SAVED_FIELDS, N] from there; its last field is overwritten with E_s[log p_s - log m].
        beta: weight of the teacher in the mixture.
        n_cols: how many columns to compare.
    """
    sums = mixture_sums(
        student_logits,
        teacher_logits,
        saved_statistics,
        beta=beta,
        n_cols=n_cols,
        weights=weights,
        temperature=temperature,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
    )
    return finish_mixture(sums, saved_statistics, beta=beta, weights=weights)


def mixture_sums(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    saved_statistics: torch.Tensor,
    *,
    beta: float,
    n_cols: int,
    weights: torch.Tensor | None = None,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> torch.Tensor:
    """The sums [chunks, MIXTURE_FIELDS, N] over some columns of rows whose statistics are saved; as above.

    Sums of disjoint sets of columns are put together along the first axis, or added.
    """
    n_rows = student_logits.shape[0]
    assert_logits(n_rows, n_cols, student_logits, teacher_logits)
    assert_fields(saved_statistics, SAVED_FIELDS, n_rows)
    assert_rows(n_rows, student_logits.device, weights)
    weights = contiguous(weights)
    dtype = saved_statistics.dtype
    backend = backend_of(student_logits.device)
    double = dtype == torch.float64
    softcap = student_softcap is not None or teacher_softcap is not None
    table = mixture_launch(
        backend,
        min(student_logits.element_size(), teacher_logits.element_size()),
        aligned=is_aligned(student_logits, teacher_logits),
        lean=not (softcap or double),
    )
    chunks = triton.cdiv(n_cols, CHUNK)
    sums = saved_statistics.new_empty((chunks, MIXTURE_FIELDS.value, n_rows))
    if n_rows == 0:
        return sums

    def run(config: RowLaunch) -> None:
        mixture_kernel[(n_rows, chunks)](
            student_logits,
            teacher_logits,
            saved_statistics,
            weights,
            sums,
            student_logits.stride(0),
            teacher_logits.stride(0),
            n_rows,
            n_cols,
            **scalings(temperature, student_softcap, teacher_softcap),
            beta=beta,
            **near_mixture(beta),
            SOFTCAP_S=student_softcap is not None,
            SOFTCAP_T=teacher_softcap is not None,
            FAST_LOG2=fast_log2(backend, double),
            COMPUTE=compute_type(dtype),
            **config.constants(),
            **compiled_with(config.num_warps, config.num_stages),
        )

    key = ("mixture", n_cols, student_logits.dtype, teacher_logits.dtype, student_softcap, teacher_softcap)
    with current_device(student_logits.device):
        run(chosen(key, student_logits.device, table, run))
    return sums


def finish_mixture(
    sums: torch.Tensor, saved_statistics: torch.Tensor, *, beta: float, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """D(beta) [N] of the sums [K, MIXTURE_FIELDS, N] of all columns; overwrites the last of the saved statistics."""
    n_rows = saved_statistics.shape[1]
    assert_fields(saved_statistics, SAVED_FIELDS, n_rows)
    sums = sums.contiguous()
    assert_fields(sums, sums.shape[0], MIXTURE_FIELDS.value, n_rows)
    divergence = saved_statistics.new_empty(n_rows)
    if n_rows == 0:
        return divergence
    with current_device(saved_statistics.device):
        finish_mixture_kernel[(triton.cdiv(n_rows, MERGE_ROWS),)](
            sums,
            saved_statistics,
            contiguous(weights),
            divergence,
            n_rows,
            sums.shape[0],
            beta=beta,
            ROWS=MERGE_ROWS,
            COMPUTE=compute_type(saved_statistics.dtype),
            **compiled_with(merge_warps(backend_of(saved_statistics.device))),
        )
    return divergence
