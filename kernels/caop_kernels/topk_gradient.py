"""Gradient with respect to the student's logits against a sparse teacher.

With h, p of `topk_outcomes.py`, H = sum h, q the softmax within the tail, and d, d_y, d_H the upstream gradients of
divergence, log p_s(y) and entropy, a column's gradient (before 1/T and the softcap's derivative) is

    listed       d (h_i - p_i H) + d_y ([i = y] - p_i) - d_H p_i (log p_i + entropy)
    elsewhere    d (q_j h_tail - p_j H) + d_y ([j = y] - p_j) - d_H p_j (log p_j + entropy)

where tail = "renormalize" has p_i = softmax within the list and 0 elsewhere in the first term, and "ignore" has
h_tail = 0. Three kernels: one program per row forms the k listed values and the coefficients of the other columns,
while the logits are still there; `gradient.py` writes every column by those coefficients, relative to the *tail's*
maximum, so that a tail of e^-200 keeps its digits; the listed values then replace what that left in their columns. The
order also makes it work in place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from caop_kernels.checks import assert_fields, assert_labels, assert_logits, assert_rows, contiguous
from caop_kernels.constants import TOPK_SAVED_FIELDS
from caop_kernels.gradient import COEFFICIENT_FIELDS, logit_gradient
from caop_kernels.launch import backend_of, compiled_with, compute_type, current_device
from caop_kernels.masked_rows import live_row
from caop_kernels.math import LN2, chain
from caop_kernels.tile import IGNORE_INDEX, exponents, narrow, row_logits
from caop_kernels.topk import assert_listed, finish_warps, listed_arguments, load_listed, packed_ids
from caop_kernels.topk_outcomes import divergence_terms, student_outcomes, teacher_outcomes
from caop_kernels.topk_tail import lanes


@triton.jit(do_not_specialize=["n_rows"])
def listed_gradient_kernel(
    student_ptr,  # [n_rows, >= n_cols]
    ids_ptr,  # [n_rows, k]
    logprobs_ptr,  # [n_rows, k]
    labels_ptr,  # [n_rows] int64, or None
    weights_ptr,  # [n_rows], or None: rows of weight 0 get neither values nor coefficients
    beta_ptr,  # [n_rows] zeros and ones, or None
    saved_statistics_ptr,  # [TOPK_SAVED_FIELDS, n_rows] of topk.py; NaN spoils a row
    entropy_ptr,  # [n_rows] the student's
    grad_divergence_ptr,  # [n_rows] each, COMPUTE, or None
    grad_logprob_ptr,
    grad_entropy_ptr,
    values_ptr,  # [n_rows, k], COMPUTE: out
    coefficients_ptr,  # [COEFFICIENT_FIELDS, n_rows], COMPUTE, zeros: out
    student_stride,
    k,
    n_rows,
    n_cols,
    scale: tl.float64,
    inverse_cap: tl.float64,
    resolution: tl.float64,
    beta: tl.float64,
    inverse_temperature: tl.float64,
    K_BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One program per row: the gradient of the listed columns, and the coefficients of the others."""
    row = tl.program_id(0).to(tl.int64)
    beta = tl.full((), beta, COMPUTE)
    if live_row(weights_ptr, row):
        step = n_rows.to(tl.int64)
        m = tl.load(saved_statistics_ptr + row)
        z = tl.load(saved_statistics_ptr + step + row)
        m_tail = tl.load(saved_statistics_ptr + 2 * step + row)
        z_tail = tl.load(saved_statistics_ptr + 3 * step + row)
        factor = tl.full((), inverse_temperature, COMPUTE)
        lane = tl.arange(0, K_BLOCK)
        student = row_logits(student_ptr + row * student_stride, scale, inverse_cap, COMPUTE)
        ids, valid, v, lp = load_listed(student, ids_ptr, logprobs_ptr, row, lane, k, n_cols, SOFTCAP)
        u = tl.where(valid, exponents(v, student.scale, m), float("-inf"))
        p = tl.exp2(u) / z
        unit = tl.exp2(m_tail - m) / z  # p of a tail column is this times 2^(its u relative to m_tail)

        value = tl.zeros([K_BLOCK], COMPUTE)
        constant = tl.zeros((), COMPUTE)
        if grad_divergence_ptr is not None:
            d = tl.load(grad_divergence_ptr + row) * factor
            full = tl.sum(valid.to(tl.int32), axis=0) >= n_cols
            s, p_s = student_outcomes(u, m, z, m_tail, z_tail, lane, k, TAIL)
            t, p_t = teacher_outcomes(lp, s, lane, k, full, tl.full((), resolution, COMPUTE), TAIL)
            if beta_ptr is not None:
                beta = tl.load(beta_ptr + row)
            _, h = divergence_terms(s, t, p_s, p_t, beta, FORWARD, REVERSE, TAIL)
            total = tl.sum(h, axis=0)
            # No gradient of a reverse KL of +inf, nor of a NaN that a comparison has dropped.
            broken = (tl.sum((lp != lp).to(tl.int32), axis=0) > 0) | (total == float("inf")) | (z != z)
            d = tl.where(broken & (d != 0), float("nan"), d)
            value += chain(d, h - p_s * total)
            if TAIL == "bucket":
                h_tail = tl.sum(tl.where(lane == k, h, 0.0), axis=0)
                constant += chain(d, h_tail / z_tail - unit * total)
            elif TAIL == "ignore":
                constant -= chain(d, unit * total)
        if grad_logprob_ptr is not None:
            label = tl.load(labels_ptr + row)
            d = tl.load(grad_logprob_ptr + row) * factor
            d = tl.where((label >= 0) & (label < n_cols), d, tl.where(label == IGNORE_INDEX, 0.0, float("nan")))
            value += tl.where(ids == label, d, 0.0) - chain(d, p)
            constant -= chain(d, unit)
            tl.store(coefficients_ptr + 6 * step + row, d)
        if grad_entropy_ptr is not None:
            entropy = tl.load(entropy_ptr + row)
            d = tl.load(grad_entropy_ptr + row) * factor
            log_p = (u - tl.log2(z)) * LN2
            value -= chain(d, tl.where(p == 0, 0.0, p * (log_p + entropy)))
            constant -= chain(d, unit * ((m_tail - m - tl.log2(z)) * LN2 + entropy))
            tl.store(coefficients_ptr + 4 * step + row, -chain(d, unit) * LN2)

        constant = tl.where(z_tail == 0, 0.0, constant)  # a tail of -inf alone
        if SOFTCAP:
            value *= 1.0 - v * v
        tl.store(coefficients_ptr + row, m_tail)
        tl.store(coefficients_ptr + 2 * step + row, constant)
        tl.store(values_ptr + row * k + lane, value, mask=lane < k)


@triton.jit
def scatter_kernel(
    values_ptr,  # [n_rows, k]
    ids_ptr,  # [n_rows, k]
    weights_ptr,  # [n_rows], or None: rows of weight 0 stay as they are
    out_ptr,  # [n_rows, >= n_cols]
    out_stride,
    k,
    n_cols,
    K_BLOCK: tl.constexpr,
):
    """One program per row: put the listed values in their columns."""
    row = tl.program_id(0).to(tl.int64)
    if live_row(weights_ptr, row):
        lane = tl.arange(0, K_BLOCK)
        ids = tl.load(ids_ptr + row * k + lane, mask=lane < k, other=-1).to(tl.int64)
        valid = (ids >= 0) & (ids < n_cols)
        values = tl.load(values_ptr + row * k + lane, mask=valid, other=0.0)
        tl.store(out_ptr + row * out_stride + ids, narrow(values, out_ptr.dtype.element_ty), mask=valid)


def topk_statistics_gradient(
    student_logits: torch.Tensor,
    teacher_ids: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    labels: torch.Tensor | None,
    saved_statistics: torch.Tensor,
    student_entropy: torch.Tensor,
    *,
    weights: torch.Tensor | None = None,
    tail: str = "bucket",
    beta: float | torch.Tensor = 0.0,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    vocab_size: int | None = None,
    grad_divergence: torch.Tensor | None = None,
    grad_logprob: torch.Tensor | None = None,
    grad_entropy: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient [N, V] of the student's logits; columns from `vocab_size` on get 0.

    Args:
        student_logits ... vocab_size: as given to `topk_statistics`, which also made `saved_statistics` and
            `student_entropy`.
        grad_divergence, grad_logprob, grad_entropy: upstream gradients of those statistics, [N] each; None for none.
        out: as of `gradient.logit_gradient`.
    """
    n_rows, n_out = student_logits.shape
    k = teacher_ids.shape[1]
    n_cols = n_out if vocab_size is None else vocab_size
    backend = backend_of(student_logits.device)
    ids, logprobs = packed_ids(teacher_ids), teacher_logprobs.contiguous()
    assert_logits(n_rows, n_cols, student_logits)
    assert_listed(n_rows, ids, logprobs)
    assert_labels(labels, n_rows, student_logits.device)
    assert labels is not None or grad_logprob is None
    assert_fields(saved_statistics, TOPK_SAVED_FIELDS, n_rows)
    assert_fields(student_entropy, n_rows)
    assert_rows(n_rows, student_logits.device, weights, grad_divergence, grad_logprob, grad_entropy)
    labels, weights = contiguous(labels) if grad_logprob is not None else None, contiguous(weights)
    values = saved_statistics.new_empty((n_rows, k))
    coefficients = saved_statistics.new_zeros((COEFFICIENT_FIELDS, n_rows))
    upstream = [
        None if d is None else d.to(saved_statistics.dtype).contiguous()
        for d in (grad_divergence, grad_logprob, grad_entropy)
    ]
    if n_rows:
        with current_device(student_logits.device):
            listed_gradient_kernel[(n_rows,)](
                student_logits,
                ids,
                logprobs,
                labels,
                weights,
                saved_statistics_ptr=saved_statistics,
                entropy_ptr=student_entropy,
                grad_divergence_ptr=upstream[0],
                grad_logprob_ptr=upstream[1],
                grad_entropy_ptr=upstream[2],
                values_ptr=values,
                coefficients_ptr=coefficients,
                student_stride=student_logits.stride(0),
                k=k,
                n_rows=n_rows,
                n_cols=n_cols,
                inverse_temperature=1.0 / temperature,
                K_BLOCK=lanes(k),
                COMPUTE=compute_type(saved_statistics.dtype),
                **listed_arguments(tail, beta, temperature, student_softcap, logprobs),
                **compiled_with(finish_warps(backend, k)),
            )
    out = logit_gradient(
        student_logits, None, coefficients, labels=labels, weights=weights, temperature=temperature,
        student_softcap=student_softcap, vocab_size=n_cols, log=grad_entropy is not None,
        label=grad_logprob is not None, out=out,
    )  # fmt: skip
    if n_rows:
        with current_device(student_logits.device):
            scatter_kernel[(n_rows,)](
                values, ids, weights, out, out.stride(0), k, n_cols, K_BLOCK=lanes(k),
                **compiled_with(finish_warps(backend, k)),
            )  # fmt: skip
    return out
