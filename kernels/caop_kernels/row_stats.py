"""Row statistics of a student and a teacher from one read of both logits.

With a = softcap(z_s)/T, b = softcap(z_t)/T, p = softmax, all in nats, and the sums of `state.py`:

    log-ratio of the partition sums    lr  = log1p(d / z_t)  where |d| <= z_t / 2,  else  ln z_s - ln z_t
    forward KL(teacher || student)     fkl =  ln2 * c_t / z_t + lr
    reverse KL(student || teacher)     rkl = -ln2 * c_s / z_s - lr
    entropy                            H   = ln z - ln2 * a / z
    log-sum-exp                        lse = ln2 * (m + log2 z)
    log-probability of a label         a[y] - lse = ln2 * (u[y] - log2 z)

KLs are formed from paired differences, so their rounding error shrinks with the KL itself; what is left below zero is
rounding and is clamped, as are the entropies. NaN stays NaN.

Edge values: a column where both logits are -inf contributes 0. Forward KL is +inf where the student excludes a column
(-inf) that the teacher does not, reverse KL where the teacher excludes one that the student does not. A row that is
-inf throughout, or holds NaN or +inf, gives NaN in the statistics that involve that side, and in that row only. Logits
are expected within +-1e4. Beyond that: finite masks act like -inf wherever both sides use one, and a column where one
side lies 2^64 or more below the other counts as excluded; a side with no logit above -2^40 has no distribution (NaN).

Launch: program (row, chunk) reduces one fixed chunk of columns to a state, then one program per block of rows merges
the chunks in order and finishes. No atomics: the bits of a row depend on that row, its strides and its alignment.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from caop_kernels.backend import require
from caop_kernels.checks import check_labels, check_logits, check_positive
from caop_kernels.elementary import LN2, log1p, tanh
from caop_kernels.launch import (
    CHUNK,
    MERGE_ROWS,
    backend_of,
    current_device,
    is_aligned,
    merge_warps,
    statistics_launch,
)
from caop_kernels.state import EXCLUDED, FLOOR, STATE_FIELDS, load_state, merge, rebase, store_state

LOG2E = math.log2(math.e)
IGNORE_INDEX = tl.constexpr(-100)

# x of an excluded column is +-2^100; times this it overflows, while sums of ordinary x stay far from it.
SUPPORT_SCALE_32 = tl.constexpr(2.0**64)
SUPPORT_SCALE_64 = tl.constexpr(2.0**960)


class RowStatistics(NamedTuple):
    """Per-row statistics, each [N] in nats; float32, or float64 when an input is. None where not asked for.

    `student_logprob` and `teacher_logprob` are also None without labels.
    """

    forward_kl: torch.Tensor | None
    reverse_kl: torch.Tensor | None
    student_lse: torch.Tensor | None
    teacher_lse: torch.Tensor | None
    student_logprob: torch.Tensor | None
    teacher_logprob: torch.Tensor | None
    student_entropy: torch.Tensor | None
    teacher_entropy: torch.Tensor | None


@triton.jit
def accumulate(
    m_s, m_t, z_s, z_t, d, a_s, a_t, c_t, c_s, s,
    student, teacher, columns, n_cols, scale_s, scale_t, inverse_cap_s, inverse_cap_t,
    GROUPS: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr, MASKED: tl.constexpr,
    SOFTCAP_S: tl.constexpr, SOFTCAP_T: tl.constexpr, FORWARD: tl.constexpr, REVERSE: tl.constexpr,
    ENTROPY_S: tl.constexpr, ENTROPY_T: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Add one tile of columns [groups, threads * vector] to the states [threads], one per thread."""
    if MASKED:
        mask = columns < n_cols
        v_s = tl.load(student + columns, mask=mask, other=0.0, eviction_policy="evict_first").to(COMPUTE)
        v_t = tl.load(teacher + columns, mask=mask, other=0.0, eviction_policy="evict_first").to(COMPUTE)
    else:
        v_s = tl.load(student + columns, eviction_policy="evict_first").to(COMPUTE)
        v_t = tl.load(teacher + columns, eviction_policy="evict_first").to(COMPUTE)
    # The cap itself is part of scale_s and scale_t.
    if SOFTCAP_S:
        v_s = tanh(v_s * inverse_cap_s)
    if SOFTCAP_T:
        v_t = tanh(v_t * inverse_cap_t)
    if MASKED:  # after the softcap, which would turn -inf into -cap
        v_s = tl.where(mask, v_s, float("-inf"))
        v_t = tl.where(mask, v_t, float("-inf"))
    v_s = tl.reshape(v_s, [GROUPS, THREADS, VECTOR])
    v_t = tl.reshape(v_t, [GROUPS, THREADS, VECTOR])

    # Groups before vector: both reductions stay inside a thread.
    new_m_s = tl.maximum(m_s, tl.max(tl.max(v_s, axis=2), axis=0) * scale_s)
    new_m_t = tl.maximum(m_t, tl.max(tl.max(v_t, axis=2), axis=0) * scale_t)
    z_s, z_t, d, a_s, a_t, c_t, c_s = rebase(m_s, m_t, z_s, z_t, d, a_s, a_t, c_t, c_s, new_m_s, new_m_t)

    u_s = tl.fma(v_s, tl.zeros_like(v_s) + scale_s, tl.zeros_like(v_s) - new_m_s[None, :, None])
    u_t = tl.fma(v_t, tl.zeros_like(v_t) + scale_t, tl.zeros_like(v_t) - new_m_t[None, :, None])
    # Exponentials before the clamp: 2^-inf is 0, and NaN gets through (maximum may drop it).
    e_s = tl.exp2(u_s)
    e_t = tl.exp2(u_t)
    u_s = tl.maximum(u_s, EXCLUDED)
    u_t = tl.maximum(u_t, EXCLUDED)
    x = u_t - u_s
    z_s += tl.sum(tl.sum(e_s, axis=2), axis=0)
    z_t += tl.sum(tl.sum(e_t, axis=2), axis=0)
    if FORWARD or REVERSE:
        d += tl.sum(tl.sum(e_s - e_t, axis=2), axis=0)
        if x.dtype == tl.float64:
            s += tl.sum(tl.sum(x * SUPPORT_SCALE_64, axis=2), axis=0)
        else:
            s += tl.sum(tl.sum(x * SUPPORT_SCALE_32, axis=2), axis=0)
    if ENTROPY_S:
        a_s += tl.sum(tl.sum(e_s * u_s, axis=2), axis=0)
    if ENTROPY_T:
        a_t += tl.sum(tl.sum(e_t * u_t, axis=2), axis=0)
    if FORWARD:
        c_t += tl.sum(tl.sum(e_t * x, axis=2), axis=0)
    if REVERSE:
        c_s += tl.sum(tl.sum(e_s * x, axis=2), axis=0)
    return new_m_s, new_m_t, z_s, z_t, d, a_s, a_t, c_t, c_s, s


@triton.jit(do_not_specialize=["n_rows"])
def row_statistics_kernel(
    student_ptr,  # [n_rows, >= n_cols], unit column stride
    teacher_ptr,
    states_ptr,  # [chunks, STATE_FIELDS, n_rows], COMPUTE
    student_stride,
    teacher_stride,
    n_rows,
    n_cols,
    scale_s: tl.float64,  # log2(e) / T, times the cap where there is one
    scale_t: tl.float64,
    inverse_cap_s: tl.float64,
    inverse_cap_t: tl.float64,
    CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
    SOFTCAP_S: tl.constexpr,
    SOFTCAP_T: tl.constexpr,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    ENTROPY_S: tl.constexpr,
    ENTROPY_T: tl.constexpr,
    COMPUTE: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """Program (row, chunk): reduce one chunk of columns of one row to a state."""
    TILE: tl.constexpr = GROUPS * THREADS * VECTOR
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    student = student_ptr + row * student_stride
    teacher = teacher_ptr + row * teacher_stride
    scale_s = tl.full((), scale_s, COMPUTE)
    scale_t = tl.full((), scale_t, COMPUTE)
    inverse_cap_s = tl.full((), inverse_cap_s, COMPUTE)
    inverse_cap_t = tl.full((), inverse_cap_t, COMPUTE)

    # Addresses as [groups, threads * vector]: within a group columns are contiguous, which leaves the compiler one way
    # to lay them out, `vector` per thread. Reshaped, the sums over groups and vector then stay inside a thread.
    offsets = tl.arange(0, GROUPS)[:, None] * (THREADS * VECTOR) + tl.arange(0, THREADS * VECTOR)[None, :]
    zero = tl.zeros([THREADS], COMPUTE)
    m_s, m_t = zero + FLOOR, zero + FLOOR
    z_s, z_t, d, a_s, a_t, c_t, c_s, s = zero, zero, zero, zero, zero, zero, zero, zero

    begin = chunk * CHUNK
    width = tl.minimum(n_cols - begin, CHUNK)
    whole = width // TILE * TILE
    for start in tl.range(0, whole, TILE, loop_unroll_factor=UNROLL):
        m_s, m_t, z_s, z_t, d, a_s, a_t, c_t, c_s, s = accumulate(
            m_s, m_t, z_s, z_t, d, a_s, a_t, c_t, c_s, s,
            student, teacher, begin + start + offsets, n_cols, scale_s, scale_t, inverse_cap_s, inverse_cap_t,
            GROUPS, THREADS, VECTOR, False, SOFTCAP_S, SOFTCAP_T, FORWARD, REVERSE, ENTROPY_S, ENTROPY_T, COMPUTE,
        )  # fmt: skip
    if whole < width:
        m_s, m_t, z_s, z_t, d, a_s, a_t, c_t, c_s, s = accumulate(
            m_s, m_t, z_s, z_t, d, a_s, a_t, c_t, c_s, s,
            student, teacher, begin + whole + offsets, n_cols, scale_s, scale_t, inverse_cap_s, inverse_cap_t,
            GROUPS, THREADS, VECTOR, True, SOFTCAP_S, SOFTCAP_T, FORWARD, REVERSE, ENTROPY_S, ENTROPY_T, COMPUTE,
        )  # fmt: skip

    row_m_s = tl.max(m_s, axis=0)
    row_m_t = tl.max(m_t, axis=0)
    z_s, z_t, d, a_s, a_t, c_t, c_s = rebase(m_s, m_t, z_s, z_t, d, a_s, a_t, c_t, c_s, row_m_s, row_m_t)
    store_state(
        states_ptr + chunk.to(tl.int64) * FIELDS * n_rows + row, n_rows,
        row_m_s, row_m_t, tl.sum(z_s, axis=0), tl.sum(z_t, axis=0), tl.sum(d, axis=0), tl.sum(a_s, axis=0),
        tl.sum(a_t, axis=0), tl.sum(c_t, axis=0), tl.sum(c_s, axis=0), tl.sum(s, axis=0),
    )  # fmt: skip


@triton.jit
def label_logprob(pointer, label, valid, ignored, z, m, scale, inverse_cap, SOFTCAP: tl.constexpr):
    """ln2 * (u[label] - log2 z) per row; 0 where ignored, NaN where the label is out of range (and nothing is read)."""
    v = tl.load(pointer + label, mask=valid, other=0.0).to(z.dtype)
    if SOFTCAP:
        v = tanh(v * inverse_cap)
    logprob = (tl.fma(v, tl.zeros_like(v) + scale, -m) - tl.log2(z)) * LN2
    return tl.where(ignored, 0.0, tl.where(valid, logprob, float("nan")))


@triton.jit(do_not_specialize=["n_rows", "n_states"])
def merge_statistics_kernel(
    states_ptr,  # [n_states, FIELDS, n_rows]
    student_ptr,
    teacher_ptr,
    labels_ptr,  # [n_rows] int64 or None
    forward_kl_ptr,  # [n_rows] each, or None where not asked for
    reverse_kl_ptr,
    student_lse_ptr,
    teacher_lse_ptr,
    student_logprob_ptr,
    teacher_logprob_ptr,
    student_entropy_ptr,
    teacher_entropy_ptr,
    student_stride,
    teacher_stride,
    n_rows,
    n_states,
    n_cols,
    scale_s: tl.float64,
    scale_t: tl.float64,
    inverse_cap_s: tl.float64,
    inverse_cap_t: tl.float64,
    ROWS: tl.constexpr,
    SOFTCAP_S: tl.constexpr,
    SOFTCAP_T: tl.constexpr,
    COMPUTE: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """One thread per row: merge the row's states in order, then turn the sums into statistics."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = rows < n_rows
    n_rows = n_rows.to(tl.int64)

    zero = tl.zeros([ROWS], COMPUTE)
    m_s, m_t = zero + FLOOR, zero + FLOOR
    z_s, z_t, d, a_s, a_t, c_t, c_s, s = zero, zero, zero, zero, zero, zero, zero, zero
    for i in tl.range(0, n_states):
        o_m_s, o_m_t, o_z_s, o_z_t, o_d, o_a_s, o_a_t, o_c_t, o_c_s, o_s = load_state(
            states_ptr + i * (FIELDS * n_rows) + rows, n_rows, mask
        )
        m_s, m_t, z_s, z_t, d, a_s, a_t, c_t, c_s, s = merge(
            m_s, m_t, z_s, z_t, d, a_s, a_t, c_t, c_s, s,
            o_m_s, o_m_t, o_z_s, o_z_t, o_d, o_a_s, o_a_t, o_c_t, o_c_s, o_s,
        )  # fmt: skip

    # A side without a single finite logit has no distribution: everything that involves it is NaN.
    z_s = tl.where(z_s > 0, z_s, float("nan"))
    z_t = tl.where(z_t > 0, z_t, float("nan"))
    near = tl.abs(d) <= 0.5 * z_t
    lr = tl.where(near, log1p(tl.where(near, d / z_t, 0.0)), tl.log(z_s) - tl.log(z_t))
    both = s != s  # one side excludes a column, the other another (or NaN logits: then lr is NaN)
    if forward_kl_ptr is not None:
        kl = tl.where(both | (s == float("inf")), float("inf"), c_t / z_t * LN2) + lr
        tl.store(forward_kl_ptr + rows, tl.where(kl < 0, 0.0, kl), mask=mask)
    if reverse_kl_ptr is not None:
        kl = tl.where(both | (s == float("-inf")), float("inf"), -(c_s / z_s) * LN2) - lr
        tl.store(reverse_kl_ptr + rows, tl.where(kl < 0, 0.0, kl), mask=mask)
    if student_lse_ptr is not None:
        tl.store(student_lse_ptr + rows, (m_s + tl.log2(z_s)) * LN2, mask=mask)
    if teacher_lse_ptr is not None:
        tl.store(teacher_lse_ptr + rows, (m_t + tl.log2(z_t)) * LN2, mask=mask)
    if student_entropy_ptr is not None:
        entropy = tl.log(z_s) - a_s / z_s * LN2
        tl.store(student_entropy_ptr + rows, tl.where(entropy < 0, 0.0, entropy), mask=mask)
    if teacher_entropy_ptr is not None:
        entropy = tl.log(z_t) - a_t / z_t * LN2
        tl.store(teacher_entropy_ptr + rows, tl.where(entropy < 0, 0.0, entropy), mask=mask)
    if labels_ptr is not None:
        label = tl.load(labels_ptr + rows, mask=mask, other=IGNORE_INDEX)
        ignored = label == IGNORE_INDEX
        valid = (label >= 0) & (label < n_cols)
        if student_logprob_ptr is not None:
            logprob = label_logprob(
                student_ptr + rows * student_stride, label, valid, ignored, z_s, m_s,
                tl.full((), scale_s, COMPUTE), tl.full((), inverse_cap_s, COMPUTE), SOFTCAP_S,
            )  # fmt: skip
            tl.store(student_logprob_ptr + rows, logprob, mask=mask)
        if teacher_logprob_ptr is not None:
            logprob = label_logprob(
                teacher_ptr + rows * teacher_stride, label, valid, ignored, z_t, m_t,
                tl.full((), scale_t, COMPUTE), tl.full((), inverse_cap_t, COMPUTE), SOFTCAP_T,
            )  # fmt: skip
            tl.store(teacher_logprob_ptr + rows, logprob, mask=mask)


STATISTICS = RowStatistics._fields


def row_statistics(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    vocab_size: int | None = None,
    statistics: Collection[str] = STATISTICS,
) -> RowStatistics:
    """Both KLs, log-sum-exps, entropies and label log-probabilities of each row, from one read of both logits.

    Args:
        student_logits: [N, V_s], float32, bfloat16, float16 or float64; unit column stride, any row stride.
        teacher_logits: [N, V_t], likewise; the dtypes may differ.
        labels: [N] int64 of any stride, or None. -100 gives log-probability 0; any other value outside [0, V) gives NaN
            in that row and reads nothing.
        temperature: > 0; logits are divided by it, after the softcap.
        student_softcap: c > 0 replaces z by c * tanh(z / c); None leaves z.
        teacher_softcap: likewise.
        vocab_size: compare the first `vocab_size` columns only. Required where V_s and V_t differ.
        statistics: names of RowStatistics fields to compute; the others are None and their work is compiled out.

    Returns:
        RowStatistics of [N] tensors in nats: float32, or float64 when an input is float64. Not differentiable.

    Raises:
        TypeError, ValueError: on a bad argument; the message names it.
        RuntimeError: where the kernels cannot run (`caop_kernels.available` gives the same reason).
    """
    n_rows, n_cols = check_logits(student_logits, teacher_logits, vocab_size)
    check_labels(labels, student_logits)
    check_positive("temperature", temperature)
    check_positive("student_softcap", student_softcap, optional=True)
    check_positive("teacher_softcap", teacher_softcap, optional=True)
    asked = set(statistics)
    labels = None if labels is None else labels.contiguous()  # the kernel reads them by row number
    if not asked or not asked <= set(STATISTICS):
        raise ValueError(f"statistics must name one or more of {STATISTICS}, got {tuple(statistics)!r}")
    require(student_logits.device)

    double = torch.float64 in (student_logits.dtype, teacher_logits.dtype)
    dtype = torch.float64 if double else torch.float32
    if labels is None:
        asked -= {"student_logprob", "teacher_logprob"}
    outputs = {name: student_logits.new_empty(n_rows, dtype=dtype) if name in asked else None for name in STATISTICS}
    if n_rows == 0 or not asked:
        return RowStatistics(**outputs)

    softcap = student_softcap is not None or teacher_softcap is not None
    backend = backend_of(student_logits.device)
    config = statistics_launch(
        backend,
        min(student_logits.element_size(), teacher_logits.element_size()),
        aligned=is_aligned(student_logits, teacher_logits),
        softcap=softcap,
        double=double,
    )
    chunks = triton.cdiv(n_cols, CHUNK)
    states = student_logits.new_empty((chunks, STATE_FIELDS, n_rows), dtype=dtype)
    common = {
        "n_rows": n_rows,
        "n_cols": n_cols,
        "scale_s": LOG2E / temperature * (student_softcap or 1.0),
        "scale_t": LOG2E / temperature * (teacher_softcap or 1.0),
        "inverse_cap_s": 1.0 / (student_softcap or 1.0),
        "inverse_cap_t": 1.0 / (teacher_softcap or 1.0),
        "SOFTCAP_S": student_softcap is not None,
        "SOFTCAP_T": teacher_softcap is not None,
        "COMPUTE": tl.float64 if double else tl.float32,
        "FIELDS": STATE_FIELDS,
    }
    with current_device(student_logits.device):
        row_statistics_kernel[(n_rows, chunks)](
            student_logits,
            teacher_logits,
            states,
            student_logits.stride(0),
            teacher_logits.stride(0),
            **config.constants(),
            **statistics_flags(asked),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **common,
        )
        merge_statistics_kernel[(triton.cdiv(n_rows, MERGE_ROWS),)](
            states,
            student_logits,
            teacher_logits,
            labels,
            *outputs.values(),
            student_logits.stride(0),
            teacher_logits.stride(0),
            n_states=chunks,
            ROWS=MERGE_ROWS,
            num_warps=merge_warps(backend),
            **common,
        )
    return RowStatistics(**outputs)


def statistics_flags(asked: Collection[str]) -> dict[str, bool]:
    """Constexpr arguments of the statistics kernel that compile out the sums nobody asked for."""
    return {
        "FORWARD": "forward_kl" in asked,
        "REVERSE": "reverse_kl" in asked,
        "ENTROPY_S": "student_entropy" in asked,
        "ENTROPY_T": "teacher_entropy" in asked,
    }
