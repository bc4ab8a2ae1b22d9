"""Scores of a distribution over C confidence candidates, from raw logits or from the candidates' log-probabilities.

Candidate c has the value v_c in [0, 1] and the log-probability log p_c; y is the target. In nats, per row:

    log P = log sum_c p_c        q_c = p_c / P        E = sum_c q_c v_c        V = sum_c q_c (v_c - E)^2
    outside mass = 1 - P, as -expm1(log P)            loss = score - outside_weight * log P

    kind              score                                      d score / d log p_c at fixed P
    cross_entropy     -sum_c t_c log q_c                         q_c - t_c
    brier             (E - y)^2                                  2 (E - y) q_c (v_c - E)
    expected_brier    sum_c q_c (v_c - y)^2                      q_c ((v_c - E) (v_c - E + 2 (E - y)) - V)
    bernoulli_nll     -y log e - (1 - y) log f                   q_c (-y/e (v_c - E) - (1 - y)/f ((1 - v_c) - F))

t splits a mass of 1 linearly between the neighbours of y among the values; F = sum_c q_c (1 - v_c) is a sum of its own,
for 1 - E has no digits where E rounds to 1; e and f are E and F clipped to [eps, 1 - eps], with slope 0 where clipped.
E and V have the slopes q_c (v_c - E) and q_c ((v_c - E)^2 - V).

(The third is q_c ((v_c - y)^2 - score), written so that nothing cancels where q is certain.) These slopes s_c add up to
0, and log P has the slope q_c. With h the upstream gradient of log P in all, the gradients are

    d / d log p_c = s_c + h q_c        d / d a_j = s_c + h q_c (1 - P) where j is candidate c,  -h p_j elsewhere

with a_j the logit after softcap and temperature. Writing q_c (1 - P) for q_c - p_c keeps the digits of rows whose mass
lies on the candidates. The gradients are computed by `confidence_gradient.py`.

A row of weight 0 is not read and holds 0. A candidate id outside [0, V) makes every row NaN and reads nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from caop_kernels.backend import require
from caop_kernels.checks import assert_rows, contiguous, shared_columns
from caop_kernels.constants import CONFIDENCE_KINDS, CONFIDENCE_SAVED_FIELDS
from caop_kernels.launch import (
    backend_of,
    compiled_with,
    compute_type,
    current_device,
    is_aligned,
    scaling,
    statistics_launch,
)
from caop_kernels.masked_rows import live_row
from caop_kernels.math import LN2, chain, clip, expm1, log1p
from caop_kernels.state import FLOOR
from caop_kernels.tile import (
    Tile,
    by_thread,
    gather_logits,
    load_logits,
    row_logits,
    thread_max,
    thread_sum,
    tile_columns,
)


class ConfidenceScores(NamedTuple):
    """Scores of each row, [N] float32 (float64 when the source is)."""

    loss: torch.Tensor
    expected: torch.Tensor
    variance: torch.Tensor
    outside_mass: torch.Tensor
    saved_statistics: torch.Tensor
    """[CONFIDENCE_SAVED_FIELDS, N] for the gradient: the maximum m of the logits (of tanh(z / cap) with a softcap),
    z = sum 2^((v - m) scale), and log P. [.., 0] when the source was log-probabilities."""


@triton.jit
def candidate_logits(logits, ids_ptr, slots, real, n_cols, SOFTCAP: tl.constexpr):
    """(ids, which may be written, logits through tanh(z / cap)) of the candidates; NaN for ids outside [0, n_cols)."""
    ids = tl.load(ids_ptr + slots, mask=real, other=0)
    valid = real & (ids >= 0) & (ids < n_cols)
    v = gather_logits(logits, ids, valid, SOFTCAP)
    return ids, valid, tl.where(valid, v, float("nan"))


@triton.jit
def restrict(v, z, real, scale, natural):
    """(log q, q, log P) of one row's candidates, with log p = natural * v - log z and scale = natural * log2(e).

    NaN throughout when no candidate is possible, one is NaN, or z is no sum of probabilities (0 or NaN). Where the
    largest candidate is the row's maximum (v = 0) the exponentials are, to the bit, those that went into z: near P = 1
    the difference of the sums keeps digits that one of logarithms, or other exponentials, would lose, and so would the
    quotient of the sums, which GPUs divide to 2 ulp.
    """
    v = tl.where(real, tl.where(z > 0, v, float("nan")), float("-inf"))
    top = tl.max(v, axis=0)
    below = v - top
    e = tl.exp2(below * scale)
    total = tl.sum(e, axis=0)
    outside = (total - z) / z
    near = tl.abs(outside) <= 0.5
    log_quotient = tl.where(near, log1p(tl.where(near, outside, 0.0)), tl.log(total / z))
    return below * natural - tl.log(total), e / total, top * natural + log_quotient


@triton.jit
def split_target(values, real, target):
    """The target's mass on each candidate: linear between its two neighbouring values, all on the end value beyond."""
    below = real & (values < target)
    above = real & (values >= target)
    low = tl.max(tl.where(below, values, float("-inf")), axis=0)
    high = tl.min(tl.where(above, values, float("inf")), axis=0)
    share = (target - low) / (high - low)
    share = tl.where(low == float("-inf"), 1.0, tl.where(high == float("inf"), 0.0, share))
    return tl.where(above & (values == high), share, tl.where(below & (values == low), 1.0 - share, 0.0))


@triton.jit
def moments(q, values):
    """Mean and variance of the candidate values under q; q is 0 in the padding."""
    expected = tl.sum(q * values, axis=0)
    return expected, tl.sum(q * (values - expected) * (values - expected), axis=0)


@triton.jit
def row_score(log_q, q, expected, values, real, target, eps, upper, KIND: tl.constexpr):
    """The score of the chosen kind, without the outside term; a NaN target gives NaN."""
    if KIND == "cross_entropy":
        mass = split_target(values, real, target)
        score = -tl.sum(tl.where(mass == 0, 0.0, mass * log_q), axis=0)
    elif KIND == "brier":
        score = (expected - target) * (expected - target)
    elif KIND == "expected_brier":
        score = tl.sum(q * (values - target) * (values - target), axis=0)
    else:
        success = clip(expected, eps, upper)
        failure = clip(tl.sum(q * (1.0 - values), axis=0), eps, upper)
        score = -(target * tl.log(success) + (1.0 - target) * tl.log(failure))
    return tl.where(target == target, score, float("nan"))


@triton.jit
def score_slopes(q, expected, variance, values, real, target, eps, upper, KIND: tl.constexpr):
    """d score / d log p_c at fixed P, per candidate."""
    if KIND == "cross_entropy":
        slopes = q - split_target(values, real, target)
    elif KIND == "brier":
        slopes = 2.0 * (expected - target) * q * (values - expected)
    elif KIND == "expected_brier":
        deviation = values - expected
        slopes = q * (deviation * (deviation + 2.0 * (expected - target)) - variance)
    else:
        failed = tl.sum(q * (1.0 - values), axis=0)
        inside = (expected >= eps) & (expected <= upper)
        success = tl.where(inside, target / clip(expected, eps, upper), 0.0)
        inside = (failed >= eps) & (failed <= upper)
        failure = tl.where(inside, (1.0 - target) / clip(failed, eps, upper), 0.0)
        slopes = -q * (success * (values - expected) + failure * ((1.0 - values) - failed))
    return tl.where(target == target, slopes, float("nan"))


@triton.jit
def load_upstream(pointer, row, COMPUTE: tl.constexpr):
    """The upstream gradient of an output of this row; 0 for an output without one."""
    if pointer is not None:
        return tl.load(pointer + row).to(COMPUTE)
    else:
        return tl.full((), 0.0, COMPUTE)


@triton.jit
def inside_slope(grad_loss, grad_outside, log_inside, outside_weight):
    """h, the upstream gradient of log P. The outside mass is 0, with slope 0, where rounding takes P above 1."""
    inside = tl.where(log_inside > 0, 0.0, tl.exp(log_inside))
    h = -(grad_loss * outside_weight) - chain(grad_outside, inside)
    return tl.where(log_inside == log_inside, h, float("nan"))


@triton.jit
def accumulate(m, z, logits, columns, n_cols, TILE: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr):
    """Add one tile of columns to the running maxima and sums [threads], one per thread."""
    v = by_thread(load_logits(logits, columns, n_cols, MASKED, SOFTCAP), TILE)
    new_m = tl.maximum(m, thread_max(v))
    # Subtract first: v - m is exact near the maximum, while v * scale is rounded at the size of the logits.
    e = tl.exp2((v - new_m[None, :, None]) * logits.scale)
    return new_m, z * tl.exp2((m - new_m) * logits.scale) + thread_sum(e)


@triton.jit(do_not_specialize=["n_rows"])
def confidence_kernel(
    source_ptr,  # [n_rows, >= n_cols] logits, unit column stride; without ids [n_rows, C] log-probabilities
    ids_ptr,  # [C] int64, or None
    values_ptr,  # [C]
    target_ptr,  # [n_rows]
    weights_ptr,  # [n_rows], or None
    loss_ptr,  # [n_rows] each
    expected_ptr,
    variance_ptr,
    outside_ptr,
    saved_statistics_ptr,  # [CONFIDENCE_SAVED_FIELDS, n_rows], or None without ids
    source_stride,
    n_rows,
    n_cols,
    n_candidates,
    scale: tl.float64,  # log2(e) / T, times the cap where there is one
    inverse_cap: tl.float64,
    outside_weight: tl.float64,
    eps: tl.float64,
    upper: tl.float64,  # 1 - eps
    KIND: tl.constexpr,
    CANDIDATES: tl.constexpr,  # C rounded up to a power of two
    GROUPS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Program (row): the row's partition sum, from one read, then the candidates' scores."""
    TILE: tl.constexpr = Tile(GROUPS, THREADS, VECTOR)
    COLUMNS: tl.constexpr = GROUPS * THREADS * VECTOR
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, CANDIDATES)
    real = slots < n_candidates
    natural = tl.full((), scale * LN2, COMPUTE)
    # A row of weight 0 reads no logits: its loop is empty, its candidates are masked. (No branch around it all: on AMD
    # the compiler would lay that out as a loop.)
    live = live_row(weights_ptr, row)
    stop = tl.where(live, n_cols, 0)
    real = real & (stop > 0)
    source = row_logits(source_ptr + row * source_stride, scale, inverse_cap, COMPUTE)
    if ids_ptr is not None:
        m = tl.zeros([THREADS], COMPUTE) + FLOOR
        z = tl.zeros([THREADS], COMPUTE)
        columns = tile_columns(TILE)
        whole = stop // COLUMNS * COLUMNS
        for start in tl.range(0, whole, COLUMNS, loop_unroll_factor=UNROLL):
            m, z = accumulate(m, z, source, start + columns, n_cols, TILE, False, SOFTCAP)
        if whole < stop:
            m, z = accumulate(m, z, source, whole + columns, n_cols, TILE, True, SOFTCAP)
        row_m = tl.max(m, axis=0)
        row_z = tl.sum(z * tl.exp2((m - row_m) * source.scale), axis=0)
        _, _, v = candidate_logits(source, ids_ptr, slots, real, n_cols, SOFTCAP)
        v -= row_m
    else:
        v = tl.load(source.row + slots, mask=real, other=0.0).to(COMPUTE)
        row_z = tl.full((), 1.0, COMPUTE)
    values = tl.load(values_ptr + slots, mask=real, other=0.0)
    target = tl.load(target_ptr + row)
    log_q, q, log_inside = restrict(v, row_z, real, source.scale, natural)
    expected, variance = moments(q, values)
    score = row_score(
        log_q, q, expected, values, real, target, tl.full((), eps, COMPUTE), tl.full((), upper, COMPUTE), KIND
    )
    loss = score - tl.full((), outside_weight, COMPUTE) * log_inside
    outside = -expm1(tl.where(log_inside > 0, 0.0, log_inside))
    tl.store(loss_ptr + row, tl.where(live, loss, 0.0))
    tl.store(expected_ptr + row, tl.where(live, expected, 0.0))
    tl.store(variance_ptr + row, tl.where(live, variance, 0.0))
    tl.store(outside_ptr + row, tl.where(live, outside, 0.0))
    if ids_ptr is not None:
        rows = n_rows.to(tl.int64)
        tl.store(saved_statistics_ptr + row, tl.where(live, row_m, 0.0))
        tl.store(saved_statistics_ptr + rows + row, tl.where(live, row_z, 0.0))
        tl.store(saved_statistics_ptr + 2 * rows + row, tl.where(live, log_inside, 0.0))


def confidence_scores(
    source: torch.Tensor,
    candidate_ids: torch.Tensor | None,
    candidate_values: torch.Tensor,
    target: torch.Tensor,
    *,
    kind: str,
    outside_weight: float = 1.0,
    weights: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    eps: float = 1e-6,
) -> ConfidenceScores:
    """Score each row's distribution over the candidates against its target.

    Args:
        source: [N, V] logits, float32, bfloat16, float16 or float64; unit column stride, any row stride. With
            `candidate_ids=None` [N, C] log-probabilities of the candidates instead; then `temperature`, `softcap` and
            `vocab_size` play no part.
        candidate_ids: [C] int64, distinct; one outside [0, V) makes every row NaN.
        candidate_values: [C] in the dtype of the scores, distinct.
        target: [N] in the dtype of the scores; NaN gives NaN in that row's loss.
        kind: one of `constants.CONFIDENCE_KINDS`.
        outside_weight: factor of -log P in the loss.
        weights: [N], or None. Rows of weight 0 are not read and hold 0.
        temperature, softcap, vocab_size: the logits are `softcap * tanh(z / softcap) / temperature` of the first
            `vocab_size` columns.
        eps: clip of "bernoulli_nll"; the dtype's smallest normal number at least.

    Raises:
        RuntimeError: where the kernels cannot run (`caop_kernels.available` gives the same reason).
    """
    n_rows, n_cols = shared_columns(source, None, vocab_size)
    dtype = torch.float64 if source.dtype == torch.float64 else torch.float32
    assert_candidates(candidate_ids, candidate_values, source, kind)
    assert_rows(n_rows, source.device, target, weights)
    require(source.device)

    loss, expected, variance, outside_mass = (source.new_empty(n_rows, dtype=dtype) for _ in range(4))
    with_ids = candidate_ids is not None
    saved_statistics = source.new_empty((CONFIDENCE_SAVED_FIELDS, n_rows if with_ids else 0), dtype=dtype)
    scores = ConfidenceScores(loss, expected, variance, outside_mass, saved_statistics)
    if n_rows == 0:
        return scores
    backend = backend_of(source.device)
    scale, inverse_cap = scaling(temperature, softcap)
    candidates = triton.next_power_of_2(candidate_values.shape[0])
    config = statistics_launch(
        backend,
        source.element_size(),
        aligned=is_aligned(source),
        softcap=softcap is not None,
        double=dtype == torch.float64,
    )
    with current_device(source.device):
        confidence_kernel[(n_rows,)](
            source,
            contiguous(candidate_ids),
            candidate_values.contiguous(),
            target.to(dtype).contiguous(),
            contiguous(weights),
            loss,
            expected,
            variance,
            outside_mass,
            saved_statistics if with_ids else None,
            source.stride(0),
            n_rows,
            n_cols,
            candidate_values.shape[0],
            scale=scale,
            inverse_cap=inverse_cap,
            outside_weight=outside_weight,
            **clips(eps, dtype),
            KIND=kind,
            CANDIDATES=candidates,
            GROUPS=config.groups,
            THREADS=config.threads,
            VECTOR=config.vector,
            UNROLL=config.unroll,
            SOFTCAP=softcap is not None,
            COMPUTE=compute_type(dtype),
            **compiled_with(config.num_warps if with_ids else candidate_warps(candidates), config.num_stages),
        )
    return scores


def assert_candidates(ids: torch.Tensor | None, values: torch.Tensor, source: torch.Tensor, kind: str) -> None:
    """Ids [C] int64, or None with one column of the source each; values [C] in the dtype of the scores."""
    assert kind in CONFIDENCE_KINDS, kind
    assert values.dtype == (torch.float64 if source.dtype == torch.float64 else torch.float32), values.dtype
    assert ids is None or ids.dtype == torch.int64, ids.dtype
    assert_rows(source.shape[1] if ids is None else ids.shape[0], source.device, ids, values)


def clips(eps: float, dtype: torch.dtype) -> dict[str, float]:
    """The kernel's arguments for the clip of "bernoulli_nll"; eps must have a logarithm in `dtype`."""
    assert eps > 0, eps
    eps = max(eps, torch.finfo(dtype).tiny)
    return {"eps": eps, "upper": 1.0 - eps}


def candidate_warps(candidates: int) -> int:
    """Warps of a program that holds the candidates of one row and nothing else."""
    return min(max(candidates // 64, 1), 8)
