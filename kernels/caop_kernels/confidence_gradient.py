"""Gradients of the confidence scores; formulas and candidates' arithmetic are those of `confidence.py`.

For logits two launches: `column_gradient_kernel` writes -h p_j over every column in one elementwise read, then
`candidate_gradient_kernel` writes the candidates' columns again, in full. The order of launches decides who is last,
so no program has to wait for another. For log-probabilities the second kernel alone fills [N, C].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from caop_kernels.checks import assert_fields, assert_logits, assert_rows, contiguous
from caop_kernels.confidence import (
    assert_candidates,
    candidate_logits,
    candidate_warps,
    clips,
    inside_slope,
    load_upstream,
    moments,
    restrict,
    score_slopes,
)
from caop_kernels.constants import CONFIDENCE_SAVED_FIELDS
from caop_kernels.launch import (
    CHUNK,
    backend_of,
    compiled_with,
    compute_type,
    current_device,
    gradient_launch,
    is_aligned,
    scaling,
)
from caop_kernels.masked_rows import live_row
from caop_kernels.math import LN2, chain, expm1
from caop_kernels.tile import Tile, load_logits, row_logits, store_gradient, store_zeros, tile_columns


@triton.jit
def column_tile(logits, out, columns, n_cols, n_out, m, factor, MASKED: tl.constexpr, SOFTCAP: tl.constexpr):
    """factor * 2^((v - m) scale) of one tile of columns, stored in the dtype of `out`; 0 from n_cols on."""
    v = load_logits(logits, columns, n_cols, MASKED, SOFTCAP)
    gradient = tl.exp2((v - m) * logits.scale) * factor
    if SOFTCAP:
        gradient *= 1.0 - v * v
    store_gradient(out, gradient, columns, n_cols, n_out, MASKED)


@triton.jit(do_not_specialize=["n_rows"])
def column_gradient_kernel(
    logits_ptr,  # [n_rows, >= n_cols], unit column stride
    weights_ptr,  # [n_rows], or None: rows of weight 0 are not read and get 0
    saved_statistics_ptr,  # [CONFIDENCE_SAVED_FIELDS, n_rows]
    grad_loss_ptr,  # [n_rows] each, or None
    grad_outside_ptr,
    out_ptr,  # [n_rows, n_out]
    logits_stride,
    out_stride,
    n_rows,
    n_cols,
    n_out,
    scale: tl.float64,  # log2(e) / T, times the cap where there is one
    inverse_cap: tl.float64,
    inverse_temperature: tl.float64,
    outside_weight: tl.float64,
    CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Program (row, chunk): -h p_j of one chunk of columns of one row, candidates or not."""
    TILE: tl.constexpr = Tile(GROUPS, THREADS, VECTOR)
    COLUMNS: tl.constexpr = GROUPS * THREADS * VECTOR
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * CHUNK
    logits = row_logits(logits_ptr + row * logits_stride, scale, inverse_cap, COMPUTE)
    out = out_ptr + row * out_stride
    offsets = begin + tile_columns(TILE)
    stop = tl.minimum(n_out - begin, CHUNK)
    if live_row(weights_ptr, row):
        rows = n_rows.to(tl.int64)
        m = tl.load(saved_statistics_ptr + row)
        z = tl.load(saved_statistics_ptr + rows + row)
        h = inside_slope(
            load_upstream(grad_loss_ptr, row, COMPUTE),
            load_upstream(grad_outside_ptr, row, COMPUTE),
            tl.load(saved_statistics_ptr + 2 * rows + row),
            tl.full((), outside_weight, COMPUTE),
        )
        factor = -h / z * tl.full((), inverse_temperature, COMPUTE)
        whole = tl.maximum(tl.minimum(n_cols - begin, stop), 0) // COLUMNS * COLUMNS
        for start in tl.range(0, whole, COLUMNS, loop_unroll_factor=UNROLL):
            column_tile(logits, out, start + offsets, n_cols, n_out, m, factor, False, SOFTCAP)
        for start in tl.range(whole, stop, COLUMNS):
            column_tile(logits, out, start + offsets, n_cols, n_out, m, factor, True, SOFTCAP)
    else:
        store_zeros(out, offsets, n_out, stop, TILE)


@triton.jit(do_not_specialize=["n_rows"])
def candidate_gradient_kernel(
    source_ptr,  # [n_rows, >= n_cols] logits, unit column stride; without ids [n_rows, C] log-probabilities
    ids_ptr,  # [C] int64, or None
    values_ptr,  # [C]
    target_ptr,  # [n_rows]
    weights_ptr,  # [n_rows], or None
    saved_statistics_ptr,  # [CONFIDENCE_SAVED_FIELDS, n_rows], or None without ids
    grad_loss_ptr,  # [n_rows] each, or None
    grad_expected_ptr,
    grad_variance_ptr,
    grad_outside_ptr,
    out_ptr,  # [n_rows, >= n_cols], of which the candidates' columns are written; without ids [n_rows, C]
    source_stride,
    out_stride,
    n_rows,
    n_cols,
    n_candidates,
    scale: tl.float64,  # log2(e) / T, times the cap where there is one
    inverse_cap: tl.float64,
    inverse_temperature: tl.float64,
    outside_weight: tl.float64,
    eps: tl.float64,
    upper: tl.float64,  # 1 - eps
    KIND: tl.constexpr,
    CANDIDATES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Program (row): the gradient of the candidates, of their logits or of their log-probabilities."""
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, CANDIDATES)
    real = slots < n_candidates
    source = row_logits(source_ptr + row * source_stride, scale, inverse_cap, COMPUTE)
    out = out_ptr + row * out_stride
    if live_row(weights_ptr, row):
        values = tl.load(values_ptr + slots, mask=real, other=0.0)
        target = tl.load(target_ptr + row)
        if ids_ptr is not None:
            m = tl.load(saved_statistics_ptr + row)
            z = tl.load(saved_statistics_ptr + n_rows.to(tl.int64) + row)
            ids, valid, v = candidate_logits(source, ids_ptr, slots, real, n_cols, SOFTCAP)
            relative = v - m
        else:
            relative = tl.load(source.row + slots, mask=real, other=0.0).to(COMPUTE)
            z = tl.full((), 1.0, COMPUTE)
        _, q, log_inside = restrict(relative, z, real, source.scale, tl.full((), scale * LN2, COMPUTE))
        expected, variance = moments(q, values)
        grad_loss = load_upstream(grad_loss_ptr, row, COMPUTE)
        grad_outside = load_upstream(grad_outside_ptr, row, COMPUTE)
        gradient = tl.zeros([CANDIDATES], COMPUTE)
        if grad_loss_ptr is not None:
            slopes = score_slopes(
                q,
                expected,
                variance,
                values,
                real,
                target,
                tl.full((), eps, COMPUTE),
                tl.full((), upper, COMPUTE),
                KIND,
            )
            # A NaN loss of upstream gradient 0 does no harm to the other outputs.
            gradient += chain(grad_loss, slopes)
        deviation = values - expected
        if grad_expected_ptr is not None:
            gradient += load_upstream(grad_expected_ptr, row, COMPUTE) * q * deviation
        if grad_variance_ptr is not None:
            gradient += load_upstream(grad_variance_ptr, row, COMPUTE) * q * (deviation * deviation - variance)
        h = inside_slope(grad_loss, grad_outside, log_inside, tl.full((), outside_weight, COMPUTE))
        if ids_ptr is not None:
            outside = -expm1(tl.where(log_inside > 0, 0.0, log_inside))
            gradient = (gradient + h * q * outside) * tl.full((), inverse_temperature, COMPUTE)
            if SOFTCAP:
                gradient *= 1.0 - v * v
            tl.store(out + ids, gradient.to(out.dtype.element_ty), mask=valid)
        else:
            tl.store(out + slots, (gradient + h * q).to(out.dtype.element_ty), mask=real)
    else:
        if ids_ptr is None:
            tl.store(out + slots, tl.zeros([CANDIDATES], out.dtype.element_ty), mask=real)


def confidence_scores_gradient(
    source: torch.Tensor,
    candidate_ids: torch.Tensor | None,
    candidate_values: torch.Tensor,
    target: torch.Tensor,
    saved_statistics: torch.Tensor | None,
    *,
    kind: str,
    outside_weight: float = 1.0,
    weights: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    eps: float = 1e-6,
    grad_loss: torch.Tensor | None = None,
    grad_expected: torch.Tensor | None = None,
    grad_variance: torch.Tensor | None = None,
    grad_outside: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of `source`, in its shape; columns from `vocab_size` on and rows of weight 0 get 0.

    Args:
        source, candidate_ids, candidate_values, target, kind, outside_weight, weights, temperature, softcap,
            vocab_size, eps: as given to `confidence.confidence_scores`.
        saved_statistics: what that returned; not read, and may be None, with `candidate_ids=None`.
        grad_loss, grad_expected, grad_variance, grad_outside: upstream gradients of the outputs, [N] in their dtype, or
            None.
        out: what is written and returned, with unit column stride and of any floating dtype; it may share no memory
            with `source`, whose candidates are read last. None for a new tensor in its dtype.
    """
    n_rows, n_out = source.shape
    if out is None:
        out = torch.empty_like(source, memory_format=torch.contiguous_format)
    assert_logits(n_rows, n_out, out)
    if n_rows == 0:
        return out
    n_cols = n_out if vocab_size is None else vocab_size
    dtype = candidate_values.dtype
    with_ids = candidate_ids is not None
    assert_logits(n_rows, n_cols, source)
    assert_candidates(candidate_ids, candidate_values, source, kind)
    assert_rows(n_rows, source.device, target, weights, grad_loss, grad_expected, grad_variance, grad_outside)
    grad_loss, grad_expected, grad_variance, grad_outside, weights = (
        contiguous(t) for t in (grad_loss, grad_expected, grad_variance, grad_outside, weights)
    )
    backend = backend_of(source.device)
    candidates = triton.next_power_of_2(candidate_values.shape[0])
    scale, inverse_cap = scaling(temperature, softcap)
    scalars = {
        "scale": scale,
        "inverse_cap": inverse_cap,
        "inverse_temperature": 1.0 / temperature if with_ids else 1.0,
        "outside_weight": outside_weight,
    }
    with current_device(source.device):
        if with_ids:
            assert saved_statistics is not None
            assert_fields(saved_statistics, CONFIDENCE_SAVED_FIELDS, n_rows)
            config = gradient_launch(
                backend,
                source.element_size(),
                aligned=is_aligned(source, out),
                lean=softcap is None and dtype != torch.float64,
            )
            column_gradient_kernel[(n_rows, triton.cdiv(n_out, CHUNK))](
                source,
                weights,
                saved_statistics,
                grad_loss,
                grad_outside,
                out,
                source.stride(0),
                out.stride(0),
                n_rows,
                n_cols,
                n_out,
                **scalars,
                SOFTCAP=softcap is not None,
                COMPUTE=compute_type(dtype),
                **config.constants(),
                **compiled_with(config.num_warps, config.num_stages),
            )
        candidate_gradient_kernel[(n_rows,)](
            source,
            contiguous(candidate_ids),
            candidate_values.contiguous(),
            target.to(dtype).contiguous(),
            weights,
            saved_statistics if with_ids else None,
            grad_loss,
            grad_expected,
            grad_variance,
            grad_outside,
            out,
            source.stride(0),
            out.stride(0),
            n_rows,
            n_cols,
            candidate_values.shape[0],
            **scalars,
            **clips(eps, dtype),
            KIND=kind,
            CANDIDATES=candidates,
            SOFTCAP=softcap is not None,
            COMPUTE=compute_type(dtype),
            **compiled_with(candidate_warps(candidates)),
        )
    return out
