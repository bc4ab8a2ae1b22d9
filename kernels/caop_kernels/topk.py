"""Statistics of a student against a sparse teacher, k ids and log-probabilities per row, from one read of the student.

`topk_tail.py` reads the logits and leaves, per chunk of columns, the state of what is *not* listed. Here one program
per row joins the chunks, gathers the k listed logits, and finishes (`topk_outcomes.py`):

    lse        of the union of tail and listed columns: positive sums only
    entropy    ln z - ln2 a / z, likewise
    outcomes   the listed ids and, for tail = "bucket", everything else as one

No atomics: the bits of a row depend on that row, its strides and its alignment.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from caop_kernels.backend import require
from caop_kernels.checks import assert_labels, assert_rows, contiguous, shared_columns
from caop_kernels.constants import MAX_LISTED, TAILS, TOPK_SAVED_FIELDS
from caop_kernels.gradient import split_beta
from caop_kernels.launch import backend_of, compiled_with, compute_type, current_device, scaling
from caop_kernels.listed_ids import sort_ids
from caop_kernels.masked_rows import live_row
from caop_kernels.math import LN2
from caop_kernels.state import EXCLUDED, FLOOR
from caop_kernels.tile import IGNORE_INDEX, exponents, gather_logits, row_logits
from caop_kernels.topk_outcomes import divergence_terms, student_outcomes, teacher_outcomes
from caop_kernels.topk_tail import TAIL_FIELDS, TailState, lanes, rebase_tail, tail_states


class TopkStatistics(NamedTuple):
    """Per-row statistics, each [N] in nats; float32, or float64 when an input is."""

    divergence: torch.Tensor
    student_logprob: torch.Tensor | None
    """Of the full softmax. None without labels, 0 where the label is -100, NaN where it is out of range."""
    student_entropy: torch.Tensor
    """Of the full softmax."""
    teacher_logprob: torch.Tensor | None
    """As listed; NaN for a label that is not."""
    teacher_entropy: torch.Tensor
    """Over the outcomes compared."""
    saved_statistics: torch.Tensor
    """[TOPK_SAVED_FIELDS, N] for the gradient: m (log2 units) and z of the whole row, m and z of its tail. NaN where
    the ids are bad."""


@triton.jit
def load_listed(student, ids_ptr, logprobs_ptr, row, lane, k, n_cols, SOFTCAP: tl.constexpr):
    """(ids, valid, v, lp): the list of a row, and the student's logits there (after tanh).

    Lanes that list nothing are not valid and have v = 0 and lp = -inf. Nothing is read for an id out of range.
    """
    ids = tl.load(ids_ptr + row * k + lane, mask=lane < k, other=-1).to(tl.int64)
    valid = (ids >= 0) & (ids < n_cols)
    lp = tl.load(logprobs_ptr + row * k + lane, mask=lane < k, other=float("-inf")).to(student.scale.dtype)
    lp = tl.where(valid, lp, float("-inf"))
    v = gather_logits(student, ids, valid, SOFTCAP)
    return ids, valid, v, lp


@triton.jit
def bad_list(sorted_ids, lane, k, n_cols):
    """Whether a row's ids, in the order of `sort_ids`, hold one outside [-1, n_cols), or one twice."""
    ids = tl.load(sorted_ids + lane, mask=lane < k, other=-1)
    before = tl.load(sorted_ids + lane - 1, mask=(lane > 0) & (lane < k), other=-1)
    bad = (ids < -1) | (ids >= n_cols) | ((ids == before) & (ids >= 0))
    return tl.sum(bad.to(tl.int32), axis=0) > 0


@triton.jit(do_not_specialize=["n_rows"])
def topk_finish_kernel(
    states_ptr,  # [n_rows, FIELDS, chunks]
    student_ptr,
    ids_ptr,  # [n_rows, k] integers
    sorted_ids_ptr,  # [n_rows, k] int32, of `sort_ids`
    logprobs_ptr,  # [n_rows, k]
    labels_ptr,  # [n_rows] int64, or None
    weights_ptr,  # [n_rows], or None: rows of weight 0 report 0
    beta_ptr,  # [n_rows] zeros and ones, or None
    divergence_ptr,  # [n_rows] each
    student_logprob_ptr,  # or None
    student_entropy_ptr,
    teacher_logprob_ptr,  # or None
    teacher_entropy_ptr,
    saved_statistics_ptr,  # [TOPK_SAVED_FIELDS, n_rows]
    student_stride,
    k,
    chunks,
    n_rows,
    n_cols,
    scale: tl.float64,
    inverse_cap: tl.float64,
    resolution: tl.float64,
    beta: tl.float64,
    K_BLOCK: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """One program per row: join its chunks, gather what is listed, and form the statistics."""
    row = tl.program_id(0).to(tl.int64)
    beta = tl.full((), beta, COMPUTE)
    divergence = tl.zeros((), COMPUTE)
    student_logprob = tl.zeros((), COMPUTE)
    student_entropy = tl.zeros((), COMPUTE)
    teacher_logprob = tl.zeros((), COMPUTE)
    teacher_entropy = tl.zeros((), COMPUTE)
    if live_row(weights_ptr, row):
        student = row_logits(student_ptr + row * student_stride, scale, inverse_cap, COMPUTE)
        lane = tl.arange(0, K_BLOCK)
        ids, valid, v, lp = load_listed(student, ids_ptr, logprobs_ptr, row, lane, k, n_cols, SOFTCAP)
        bad = bad_list(sorted_ids_ptr + row * k, lane, k, n_cols)

        # The tail: all chunks at once, in an order that only the number of columns decides.
        chunk = tl.arange(0, CHUNK_BLOCK)
        state = states_ptr + row * (FIELDS * chunks) + chunk
        tails = TailState(
            tl.load(state, mask=chunk < chunks, other=FLOOR),
            tl.load(state + chunks, mask=chunk < chunks, other=0.0),
            tl.load(state + 2 * chunks, mask=chunk < chunks, other=0.0),
        )
        m_tail = tl.max(tails.m, axis=0)
        tails = rebase_tail(tails, m_tail)
        z_tail = tl.sum(tails.z, axis=0)
        a_tail = tl.sum(tails.a, axis=0)

        # The whole row.
        m = tl.maximum(m_tail, tl.max(tl.where(valid, v, float("-inf")), axis=0) * student.scale)
        u = exponents(v, student.scale, m)
        u = tl.where(valid, u, float("-inf"))
        e = tl.exp2(u)
        below = m_tail - m
        z = tl.exp2(below) * z_tail + tl.sum(e, axis=0)
        z = tl.where(z > 0, z, float("nan"))  # not one finite logit: no distribution
        a = tl.exp2(below) * (a_tail + z_tail * below) + tl.sum(e * tl.maximum(u, EXCLUDED), axis=0)
        student_entropy = tl.log(z) - a / z * LN2
        student_entropy = tl.where(student_entropy < 0, 0.0, student_entropy)
        step = n_rows.to(tl.int64)
        saved = saved_statistics_ptr + row
        tl.store(saved, tl.where(bad, float("nan"), m))
        tl.store(saved + step, tl.where(bad, float("nan"), z))
        tl.store(saved + 2 * step, tl.where(bad, float("nan"), m_tail))
        tl.store(saved + 3 * step, tl.where(bad, float("nan"), z_tail))

        full = tl.sum(valid.to(tl.int32), axis=0) >= n_cols
        s, p_s = student_outcomes(u, m, z, m_tail, z_tail, lane, k, TAIL)
        t, p_t = teacher_outcomes(lp, s, lane, k, full, tl.full((), resolution, COMPUTE), TAIL)
        if beta_ptr is not None:
            beta = tl.load(beta_ptr + row)
        term, _ = divergence_terms(s, t, p_s, p_t, beta, FORWARD, REVERSE, TAIL)
        divergence = tl.sum(term, axis=0)
        teacher_entropy = tl.sum(tl.where(p_t == 0, 0.0, -(p_t * t)), axis=0)
        teacher_entropy = tl.where(teacher_entropy < 0, 0.0, teacher_entropy)
        if TAIL != "ignore":
            divergence = tl.where(divergence < 0, 0.0, divergence)
        broken = tl.sum((lp != lp).to(tl.int32), axis=0) > 0  # comparisons above may have dropped a NaN
        teacher_entropy = tl.where(bad | broken, float("nan"), teacher_entropy)
        student_entropy = tl.where(bad, float("nan"), student_entropy)
        divergence = tl.where(bad | broken | (z != z), float("nan"), divergence)

        if labels_ptr is not None:
            label = tl.load(labels_ptr + row)
            inside = (label >= 0) & (label < n_cols)
            v_label = gather_logits(student, label, inside, SOFTCAP)
            student_logprob = (exponents(v_label, student.scale, m) - tl.log2(z)) * LN2
            student_logprob = tl.where(inside & (not bad), student_logprob, float("nan"))
            match = valid & (ids == label)
            found = tl.sum(match.to(tl.int32), axis=0) > 0
            teacher_logprob = tl.sum(tl.where(match, lp, 0.0), axis=0)
            teacher_logprob = tl.where(found & (not bad), teacher_logprob, float("nan"))
            ignored = (label == IGNORE_INDEX) & (not bad)
            student_logprob = tl.where(ignored, 0.0, student_logprob)
            teacher_logprob = tl.where(ignored, 0.0, teacher_logprob)

    tl.store(divergence_ptr + row, divergence)
    tl.store(student_entropy_ptr + row, student_entropy)
    tl.store(teacher_entropy_ptr + row, teacher_entropy)
    if labels_ptr is not None:
        tl.store(student_logprob_ptr + row, student_logprob)
        tl.store(teacher_logprob_ptr + row, teacher_logprob)


def finish_warps(backend: str, k: int) -> int:
    """Warps of a program that works on one row's list: two lanes per thread, and no more than four warps."""
    return max(1, min(4, lanes(k) // 64))


def assert_listed(n_rows: int, ids: torch.Tensor, logprobs: torch.Tensor) -> None:
    """Ids [N, k] integers and log-probabilities [N, k] floating."""
    assert ids.shape == logprobs.shape, (ids.shape, logprobs.shape)
    assert ids.shape[0] == n_rows, ids.shape
    assert 1 <= ids.shape[1] <= MAX_LISTED, ids.shape
    assert not ids.is_floating_point(), ids.dtype
    assert logprobs.is_floating_point(), logprobs.dtype


def assert_sorted(sorted_ids: torch.Tensor, ids: torch.Tensor) -> None:
    """Sorted ids of the shape of the ids, on their device."""
    assert sorted_ids.shape == ids.shape, (sorted_ids.shape, ids.shape)
    assert sorted_ids.dtype == torch.int32, sorted_ids.dtype
    assert sorted_ids.device == ids.device, (sorted_ids.device, ids.device)


def packed_ids(ids: torch.Tensor) -> torch.Tensor:
    """Ids as the kernels take them: contiguous, int32 or int64."""
    return (ids if ids.dtype in (torch.int32, torch.int64) else ids.to(torch.int32)).contiguous()


def listed_arguments(
    tail: str, beta: float | torch.Tensor, temperature: float, softcap: float | None, logprobs: torch.Tensor
) -> dict[str, Any]:
    """Arguments that every kernel working on a row's list takes."""
    assert tail in TAILS, tail
    beta, beta_per_row = split_beta(beta)
    assert_rows(logprobs.shape[0], logprobs.device, beta_per_row)
    scale, inverse_cap = scaling(temperature, softcap)
    return {
        "beta_ptr": beta_per_row,
        "beta": beta,
        "scale": scale,
        "inverse_cap": inverse_cap,
        "resolution": torch.finfo(logprobs.dtype).eps / 2,
        "TAIL": tail,
        "FORWARD": beta_per_row is not None or beta == 0,
        "REVERSE": beta_per_row is not None or beta == 1,
        "SOFTCAP": softcap is not None,
    }


def topk_statistics(
    student_logits: torch.Tensor,
    teacher_ids: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    sorted_ids: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    tail: str = "bucket",
    beta: float | torch.Tensor = 0.0,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    vocab_size: int | None = None,
) -> TopkStatistics:
    """Divergence, log-probabilities and entropies of each row, from one read of the student's logits.

    Args:
        student_logits: [N, V], float32, bfloat16, float16 or float64; unit column stride, any row stride.
        teacher_ids: [N, k] integers, 1 <= k <= 256; -1 pads a row. An id outside [-1, V), which reads nothing, and
            one that is listed twice make their row NaN, and its gradient.
        teacher_logprobs: [N, k], the teacher's full-softmax log-probabilities at the same temperature.
        labels: [N] int64, or None. -100 gives log-probability 0; any other value outside [0, V) NaN.
        sorted_ids: [N, k], the teacher's ids as `sort_ids` returns them; None to sort them here.
        weights: [N], or None. Rows of weight 0 are not read and report 0.
        tail: "bucket", "renormalize" or "ignore".
        beta: 0 forward KL, 1 reverse KL, between the generalised JSD; or [N] of zeros and ones (any other entry: NaN).
        temperature, student_softcap: as everywhere; > 0.
        vocab_size: only the first columns are the vocabulary.

    Raises:
        RuntimeError: where the kernels cannot run.
    """
    n_rows, n_cols = shared_columns(student_logits, None, vocab_size)
    assert_listed(n_rows, teacher_ids, teacher_logprobs)
    assert_labels(labels, n_rows, student_logits.device)
    assert_rows(n_rows, student_logits.device, weights)
    require(student_logits.device)

    double = torch.float64 in (student_logits.dtype, teacher_logprobs.dtype)
    dtype = torch.float64 if double else torch.float32
    empty = [student_logits.new_empty(n_rows, dtype=dtype) for _ in range(3)]
    student_logprob, teacher_logprob = (
        None if labels is None else student_logits.new_empty(n_rows, dtype=dtype) for _ in range(2)
    )
    saved_statistics = student_logits.new_zeros((TOPK_SAVED_FIELDS, n_rows), dtype=dtype)
    found = TopkStatistics(empty[0], student_logprob, empty[1], teacher_logprob, empty[2], saved_statistics)
    if n_rows == 0:
        return found

    backend = backend_of(student_logits.device)
    k = teacher_ids.shape[1]
    ids, logprobs = packed_ids(teacher_ids), teacher_logprobs.contiguous()
    sorted_ids = sort_ids(ids, n_cols) if sorted_ids is None else sorted_ids.contiguous()
    assert_sorted(sorted_ids, ids)
    weights = contiguous(weights)
    listed = listed_arguments(tail, beta, temperature, student_softcap, logprobs)
    states = tail_states(
        student_logits, sorted_ids, weights, n_cols=n_cols, dtype=dtype, softcap=student_softcap is not None,
        scale=listed["scale"], inverse_cap=listed["inverse_cap"],
    )  # fmt: skip
    chunks = states.shape[2]
    with current_device(student_logits.device):
        topk_finish_kernel[(n_rows,)](
            states,
            student_logits,
            ids,
            sorted_ids,
            logprobs,
            contiguous(labels),
            weights,
            divergence_ptr=found.divergence,
            student_logprob_ptr=found.student_logprob,
            student_entropy_ptr=found.student_entropy,
            teacher_logprob_ptr=found.teacher_logprob,
            teacher_entropy_ptr=found.teacher_entropy,
            saved_statistics_ptr=found.saved_statistics,
            chunks=chunks,
            CHUNK_BLOCK=triton.next_power_of_2(chunks),
            student_stride=student_logits.stride(0),
            k=k,
            n_rows=n_rows,
            n_cols=n_cols,
            K_BLOCK=lanes(k),
            COMPUTE=compute_type(dtype),
            FIELDS=TAIL_FIELDS,
            **listed,
            **compiled_with(finish_warps(backend, k)),
        )
    return found
