"""Gradient with respect to the student's logits: one elementwise kernel for every loss that reads whole rows.

With u_s = z_s k - shift_s, u_t = z_t k - shift_t, k = log2(e)/T (z after the softcap), and coefficients per row, times
the derivative of the student's softcap:

    dz = 2^u_s (constant + ratio * R + log * u_s) + teacher * (2^u_s - 2^(u_t + log_ratio)) + label * [column == label]

    R = u_s - u_t    or, for an interior beta,    R = log2 p_s - log2 m    with m = beta p_t + (1 - beta) p_s

R of the mixture comes from r = u_s - u_t - log_ratio alone: the larger of p_s, p_t exceeds m by the factor
g = 1 - share (1 - 2^-|r|), where share is the weight of the smaller one. No underflow, no division. Where the two sides
are close, r decides p_s - p_t, too, as p_s (1 - 2^-r): exponentials err by 2^-22 of their value each.

The shift is any number near the row's maximum in log2 units and the partition sums are part of the coefficients: were
lse itself the shift, its rounding at large logits (5e-4 at 1e4) would scale the whole row. Coefficients of the
distillation losses follow from the upstream gradients of divergence, log-probability, entropy and lse (nats), with z
the sums of 2^u over the row and A the coefficients of p_s, p_s R, p_s log p_s and p_s - p_t:

    forward KL   A_t = 1                   log p_s(y)   A_p = -1, label = 1
    reverse KL   A_r = 1, A_p = -E_s R     H_s          A_l = -1, A_p = -H_s
    interior     (1 - beta) of the same    lse_s        A_p = 1

    constant = (A_p - A_r lr - A_l ln z_s) / z_s    ratio = ln2 A_r / z_s    log = ln2 A_l / z_s    teacher = A_t / z_s

(lr = ln z_s - ln z_t, log_ratio the same in log2 units; for an interior beta R holds it already). All times 1/T.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from caop_kernels.checks import assert_fields, assert_labels, assert_logits, assert_rows, contiguous
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
    gradient_launch,
    is_aligned,
    merge_warps,
    scalings,
)
from caop_kernels.masked_rows import live_row
from caop_kernels.math import LN2, NEAR_EXP2, chain, one_minus_exp2
from caop_kernels.mixture import NearMixture, mixture_over_larger, near_mixture
from caop_kernels.state import LOWEST
from caop_kernels.tile import (
    IGNORE_INDEX,
    Tile,
    exponents,
    load_logits,
    row_logits,
    store_gradient,
    store_zeros,
    tile_columns,
)
from caop_kernels.tuning import chosen


class GradientRow(NamedTuple):
    """What a row's gradient needs beside the logits: coefficients, COMPUTE, in the order of their fields."""

    shift_s: tl.tensor
    shift_t: tl.tensor
    constant: tl.tensor
    ratio: tl.tensor
    log: tl.tensor
    teacher: tl.tensor
    label: tl.tensor
    log_ratio: tl.tensor  # log2 units


COEFFICIENT_FIELDS = len(GradientRow._fields)


class Terms(NamedTuple):
    """Which terms the gradient has, and of which logits: compile-time values of device code."""

    softcap_s: tl.constexpr
    softcap_t: tl.constexpr
    ratio: tl.constexpr
    log: tl.constexpr
    teacher: tl.constexpr
    label: tl.constexpr
    interior: tl.constexpr
    fast_log2: tl.constexpr


@triton.jit
def gradient_tile(
    student, teacher, out, row, label, beta, near, columns, n_cols, n_out, TERMS: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """The gradient of one tile of columns of one row, stored in the dtype of `out`."""
    v_s = load_logits(student, columns, n_cols, MASKED, TERMS.softcap_s)
    u_s = exponents(v_s, student.scale, row.shift_s)
    e_s = tl.exp2(u_s)  # before the clamps, which may drop a NaN
    if TERMS.ratio or TERMS.teacher:
        v_t = load_logits(teacher, columns, n_cols, MASKED, TERMS.softcap_t)
        u_t = exponents(v_t, teacher.scale, row.shift_t)
    if TERMS.teacher:
        u = u_t + row.log_ratio  # relative to the student's partition sum
        r = u_s - u
        difference = e_s - tl.exp2(u)
        if r.dtype != tl.float64:
            difference = tl.where(tl.abs(r) <= NEAR_EXP2, e_s * one_minus_exp2(r), difference)
    bracket = tl.zeros_like(u_s) + row.constant
    if TERMS.ratio or TERMS.log:
        u_s = tl.maximum(u_s, LOWEST)
    if TERMS.ratio:
        r = u_s - tl.maximum(u_t, LOWEST)
        if TERMS.interior:
            r -= row.log_ratio
            above, _ = mixture_over_larger(r, tl.abs(r), beta, near, TERMS.fast_log2)
            r = tl.minimum(r, 0.0) - above
        bracket += row.ratio * r
    if TERMS.log:
        bracket += row.log * u_s
    gradient = e_s * bracket
    if TERMS.teacher:
        gradient += row.teacher * difference
    if TERMS.label:
        gradient = tl.where(columns == label, gradient + row.label, gradient)
    if TERMS.softcap_s:
        gradient *= 1.0 - v_s * v_s
    store_gradient(out, gradient, columns, n_cols, n_out, MASKED)


@triton.jit(do_not_specialize=["n_rows"])
def gradient_kernel(
    student_ptr,  # [n_rows, >= n_cols], unit column stride
    teacher_ptr,  # likewise, or None
    out_ptr,  # [n_rows, n_out]; may be the student's logits
    coefficients_ptr,  # [COEFFICIENT_FIELDS, n_rows], COMPUTE
    labels_ptr,  # [n_rows] int64, or None
    weights_ptr,  # [n_rows], or None: rows of weight 0 are not read and get 0
    student_stride,
    teacher_stride,
    out_stride,
    n_rows,
    n_cols,
    n_out,
    scale_s: tl.float64,  # log2(e) / T, times the cap where there is one
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
    RATIO: tl.constexpr,
    LOG: tl.constexpr,
    TEACHER: tl.constexpr,
    LABEL: tl.constexpr,
    INTERIOR: tl.constexpr,
    FAST_LOG2: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Program (row, chunk): the gradient of one chunk of columns of one row."""
    TILE: tl.constexpr = Tile(GROUPS, THREADS, VECTOR)
    COLUMNS: tl.constexpr = GROUPS * THREADS * VECTOR
    TERMS: tl.constexpr = Terms(SOFTCAP_S, SOFTCAP_T, RATIO, LOG, TEACHER, LABEL, INTERIOR, FAST_LOG2)
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * CHUNK
    out = out_ptr + row * out_stride
    offsets = begin + tile_columns(TILE)
    stop = tl.minimum(n_out - begin, CHUNK)
    if live_row(weights_ptr, row):
        student = row_logits(student_ptr + row * student_stride, scale_s, inverse_cap_s, COMPUTE)
        if teacher_ptr is not None:
            teacher = row_logits(teacher_ptr + row * teacher_stride, scale_t, inverse_cap_t, COMPUTE)
        else:
            teacher = student  # not read
        share = tl.full((), beta, COMPUTE)
        near = NearMixture(q0, q1, q2, q3, q4)
        field = coefficients_ptr + row
        rows = n_rows.to(tl.int64)
        coefficients = GradientRow(
            tl.load(field), tl.load(field + rows), tl.load(field + 2 * rows), tl.load(field + 3 * rows),
            tl.load(field + 4 * rows), tl.load(field + 5 * rows), tl.load(field + 6 * rows), tl.load(field + 7 * rows),
        )  # fmt: skip
        label = tl.full((), -1, tl.int32)
        if LABEL:
            label = tl.load(labels_ptr + row)
            # As narrow as the columns it is compared with; -1 meets none of them.
            label = tl.where((label >= 0) & (label < n_cols), label, -1).to(tl.int32)
        whole = tl.maximum(tl.minimum(n_cols - begin, stop), 0) // COLUMNS * COLUMNS
        for start in tl.range(0, whole, COLUMNS, loop_unroll_factor=UNROLL):
            gradient_tile(
                student, teacher, out, coefficients, label, share, near, start + offsets, n_cols, n_out, TERMS, False
            )
        for start in tl.range(whole, stop, COLUMNS):
            gradient_tile(
                student, teacher, out, coefficients, label, share, near, start + offsets, n_cols, n_out, TERMS, True
            )
    else:
        store_zeros(out, offsets, n_out, stop, TILE)


@triton.jit(do_not_specialize=["n_rows"])
def coefficients_kernel(
    saved_statistics_ptr,  # [SAVED_FIELDS, n_rows] of row_stats.py, COMPUTE
    entropy_ptr,  # [n_rows] student's entropy; read where grad_entropy is given
    grad_divergence_ptr,  # [n_rows] each, COMPUTE, or None
    grad_logprob_ptr,
    grad_entropy_ptr,
    grad_lse_ptr,
    beta_ptr,  # [n_rows] zeros and ones, or None
    labels_ptr,  # [n_rows] int64, or None
    out_ptr,  # [COEFFICIENT_FIELDS, n_rows], COMPUTE
    n_rows,
    n_cols,
    beta: tl.float64,
    inverse_temperature: tl.float64,
    ROWS: tl.constexpr,
    FORWARD: tl.constexpr,
    INTERIOR: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One thread per row: from upstream gradients to coefficients of the gradient."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = rows < n_rows
    step = n_rows.to(tl.int64)
    factor = tl.full((), inverse_temperature, COMPUTE)
    shift_s = tl.load(saved_statistics_ptr + rows, mask=mask, other=0.0)
    shift_t = tl.load(saved_statistics_ptr + step + rows, mask=mask, other=0.0)
    z_s = tl.load(saved_statistics_ptr + 2 * step + rows, mask=mask, other=1.0)
    lr = tl.load(saved_statistics_ptr + 4 * step + rows, mask=mask, other=0.0)

    zero = tl.zeros([ROWS], COMPUTE)
    a_p, a_r, a_l, a_t, label = zero, zero, zero, zero, zero
    if grad_divergence_ptr is not None:
        d = tl.load(grad_divergence_ptr + rows, mask=mask, other=0.0) * factor
        forward, reverse = d, d
        if beta_ptr is not None:
            chosen = tl.load(beta_ptr + rows, mask=mask, other=0.0)
            bad = (chosen != 0) & (chosen != 1)  # NaN too
            forward = tl.where(bad, float("nan"), tl.where(chosen == 0, d, 0.0))
            reverse = tl.where(bad, float("nan"), tl.where(chosen == 1, d, 0.0))
        elif INTERIOR:
            reverse = d * (1.0 - tl.full((), beta, COMPUTE))
        if FORWARD or beta_ptr is not None:
            a_t += forward
        if (not FORWARD) or beta_ptr is not None:
            mean_ratio = tl.load(saved_statistics_ptr + 5 * step + rows, mask=mask, other=0.0)
            a_r += reverse
            # A reverse KL of +inf has no gradient.
            a_p -= chain(reverse, tl.where(mean_ratio == float("inf"), float("nan"), mean_ratio))
    if grad_logprob_ptr is not None:
        y = tl.load(labels_ptr + rows, mask=mask, other=IGNORE_INDEX)
        label = tl.load(grad_logprob_ptr + rows, mask=mask, other=0.0) * factor
        label = tl.where((y >= 0) & (y < n_cols), label, tl.where(y == IGNORE_INDEX, 0.0, float("nan")))
        a_p -= label
    if grad_entropy_ptr is not None:
        d = tl.load(grad_entropy_ptr + rows, mask=mask, other=0.0) * factor
        a_l -= d
        a_p -= chain(d, tl.load(entropy_ptr + rows, mask=mask, other=0.0))
    if grad_lse_ptr is not None:
        a_p += tl.load(grad_lse_ptr + rows, mask=mask, other=0.0) * factor

    constant = a_p - chain(a_l, tl.log(z_s))
    if not INTERIOR:
        constant -= chain(a_r, lr)
    tl.store(out_ptr + rows, shift_s, mask=mask)
    tl.store(out_ptr + step + rows, shift_t, mask=mask)
    tl.store(out_ptr + 2 * step + rows, constant / z_s, mask=mask)
    tl.store(out_ptr + 3 * step + rows, a_r * LN2 / z_s, mask=mask)
    tl.store(out_ptr + 4 * step + rows, a_l * LN2 / z_s, mask=mask)
    tl.store(out_ptr + 5 * step + rows, a_t / z_s, mask=mask)
    tl.store(out_ptr + 6 * step + rows, label, mask=mask)
    tl.store(out_ptr + 7 * step + rows, lr / LN2, mask=mask)


def split_beta(beta: float | torch.Tensor) -> tuple[float, torch.Tensor | None]:
    """(beta, None) of one beta for all rows, (0, betas contiguous) of one for each row."""
    if isinstance(beta, torch.Tensor):
        return 0.0, beta.contiguous()
    return float(beta), None


def distillation_coefficients(
    saved_statistics: torch.Tensor,
    *,
    n_cols: int,
    labels: torch.Tensor | None = None,
    beta: float | torch.Tensor = 0.0,
    temperature: float = 1.0,
    student_entropy: torch.Tensor | None = None,
    grad_divergence: torch.Tensor | None = None,
    grad_logprob: torch.Tensor | None = None,
    grad_entropy: torch.Tensor | None = None,
    grad_lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """Coefficients [COEFFICIENT_FIELDS, N] of `logit_gradient` for upstream gradients of the statistics of each row.

    Args:
        saved_statistics: as `row_statistics` returned it; for an interior beta with the mixture's mean ratio.
        n_cols: number of columns compared; a label at or beyond it gives NaN.
        labels: [N] int64; needed with `grad_logprob`.
        beta, temperature: as in the forward; beta a float, or [N] of zeros and ones.
        student_entropy: [N]; needed with `grad_entropy`.
        grad_divergence, grad_logprob, grad_entropy, grad_lse: upstream gradients, [N] each, contiguous, in the
            dtype of `saved_statistics`; None for none.
    """
    n_rows = saved_statistics.shape[1]
    assert_fields(saved_statistics, SAVED_FIELDS, n_rows)
    assert_labels(labels, n_rows, saved_statistics.device)
    assert labels is not None or grad_logprob is None
    for column in (student_entropy, grad_divergence, grad_logprob, grad_entropy, grad_lse):
        if column is not None:
            assert_fields(column, n_rows)
    out = saved_statistics.new_empty((COEFFICIENT_FIELDS, n_rows))
    if n_rows == 0:
        return out
    beta, beta_per_row = split_beta(beta)
    assert_rows(n_rows, saved_statistics.device, beta_per_row)
    with current_device(saved_statistics.device):
        coefficients_kernel[(triton.cdiv(n_rows, MERGE_ROWS),)](
            saved_statistics,
            student_entropy,
            grad_divergence,
            grad_logprob,
            grad_entropy,
            grad_lse,
            beta_per_row,
            contiguous(labels),
            out,
            n_rows,
            n_cols,
            beta=beta,
            inverse_temperature=1.0 / temperature,
            ROWS=MERGE_ROWS,
            FORWARD=beta_per_row is None and beta == 0,
            INTERIOR=0 < beta < 1,
            COMPUTE=compute_type(saved_statistics.dtype),
            **compiled_with(merge_warps(backend_of(saved_statistics.device))),
        )
    return out


def logit_gradient(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    coefficients: torch.Tensor,
    *,
    labels: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    vocab_size: int | None = None,
    beta: float | None = None,
    ratio: bool = False,
    log: bool = False,
    teacher: bool = False,
    label: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient [N, V_s] of the student's logits; columns from `vocab_size` on get 0.

    Args:
        student_logits: [N, V_s], unit column stride, any row stride.
        teacher_logits: [N, V_t], likewise; may be None where neither `ratio` nor `teacher` is asked for.
        coefficients: [COEFFICIENT_FIELDS, N] contiguous, in the dtype of computation (float32, or float64).
        labels: [N] int64, read with `label`; one that is not among the columns meets none.
        weights: [N], or None. Rows of weight 0 are not read; their gradient is 0.
        temperature, student_softcap, teacher_softcap, vocab_size: as in the forward.
        beta: the interior beta whose mixture `ratio` refers to; None for the plain log-ratio.
        ratio, log, teacher, label: which terms of the gradient are there; the others are compiled out.
        out: [N, V_s] with unit column stride, of any floating dtype: what is written and returned. May be
            `student_logits` itself, but share no memory with them otherwise. None for a new tensor in their dtype.
    """
    n_rows, n_out = student_logits.shape
    n_cols = n_out if vocab_size is None else vocab_size
    inplace = out is student_logits
    teacher_read = teacher_logits if ratio or teacher else None
    assert teacher_read is not None or not (ratio or teacher)
    assert_logits(n_rows, n_cols, student_logits, teacher_read)
    assert_fields(coefficients, COEFFICIENT_FIELDS, n_rows)
    assert_labels(labels, n_rows, student_logits.device)
    assert labels is not None or not label
    assert_rows(n_rows, student_logits.device, weights)
    if out is None:
        out = torch.empty_like(student_logits, memory_format=torch.contiguous_format)
    assert_logits(n_rows, n_out, out)
    if n_rows == 0:
        return out
    loaded = [student_logits, *([] if teacher_read is None else [teacher_read])]
    operands = [*loaded, out]
    backend = backend_of(student_logits.device)
    double = coefficients.dtype == torch.float64
    table = gradient_launch(
        backend,
        min(t.element_size() for t in loaded),
        aligned=is_aligned(*operands),
        lean=not (double or beta is not None or student_softcap is not None or teacher_softcap is not None),
    )

    def run(config: RowLaunch, target: torch.Tensor) -> None:
        gradient_kernel[(n_rows, triton.cdiv(n_out, CHUNK))](
            student_logits,
            teacher_read,
            target,
            coefficients,
            contiguous(labels) if label else None,
            contiguous(weights),
            student_logits.stride(0),
            0 if teacher_read is None else teacher_read.stride(0),
            target.stride(0),
            n_rows,
            n_cols,
            n_out,
            **scalings(temperature, student_softcap, teacher_softcap),
            beta=0.0 if beta is None else beta,
            **near_mixture(0.0 if beta is None else beta),
            SOFTCAP_S=student_softcap is not None,
            SOFTCAP_T=teacher_softcap is not None,
            RATIO=ratio,
            LOG=log,
            TEACHER=teacher,
            LABEL=label,
            INTERIOR=beta is not None,
            FAST_LOG2=fast_log2(backend, double),
            COMPUTE=compute_type(coefficients.dtype),
            **config.constants(),
            **compiled_with(config.num_warps, config.num_stages),
        )

    def rehearse(config: RowLaunch) -> None:  # never over the logits
        run(config, torch.empty_like(out, memory_format=torch.contiguous_format) if inplace else out)

    terms = (ratio, log, teacher, label, beta is not None, inplace)
    key = ("gradient", n_out, n_cols, *(t.dtype for t in operands), student_softcap, teacher_softcap, *terms)
    with current_device(student_logits.device):
        run(chosen(key, student_logits.device, table, rehearse), out)
    return out
