"""Rows whose columns come in blocks, put together as the linear losses do it on either backend, and cases to try."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from caop_fast.losses.backends.base import Backend
from caop_fast.losses.backends.resolve import get_backend
from caop_fast.losses.batches import (
    Columns,
    DistillationBatch,
    DistillationGrads,
    DistillationRows,
    SavedTokens,
    TokenBatch,
    TokenGrads,
)
from caop_fast.losses.options import DivergenceOptions, TokenOptions
from helpers.gradient_oracle import assert_gradient, exact_gradient, upstream
from helpers.oracle import statistics

V = 1031
CUTS = ((0, 700, V), (0, 1, 430, V))  # one column alone is a block, too
BETAS = (0.0, 0.3, 1.0, "rows")
FIELDS = ("divergence", "student_logprob", "teacher_logprob", "student_entropy", "teacher_entropy")
FLOWS = ("divergence", "logprob", "entropy")
GOOD = 8  # rows of ``case`` that an oracle can be asked about
INF, NAN = float("inf"), float("nan")
TORCH, TRITON = get_backend("torch"), get_backend("triton")


def columns_of(cuts: tuple[int, ...]) -> list[Columns]:
    """Consecutive blocks of ids."""
    return [Columns(a, b - a, cuts[-1]) for a, b in pairwise(cuts)]


def rows_in_blocks(
    backend: Backend,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    cuts: tuple[int, ...],
    options: DivergenceOptions,
) -> DistillationRows:
    """Statistics of rows from their blocks: states, and for an interior beta a second pass."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    blocks = [
        (DistillationBatch(c.of(student), c.of(teacher), c.local(labels), None), c.width) for c in columns_of(cuts)
    ]
    states = [backend.row_state(batch, options, width, dtype) for batch, width in blocks]
    found = backend.finish_distillation(backend.merge_states(torch.stack(states)), labels, options)
    if not options.interior:
        return found
    sums = [backend.mixture_sums(batch.student, batch.teacher, options, found.saved_statistics) for batch, _ in blocks]
    return found._replace(divergence=backend.finish_mixture(torch.cat(sums), found.saved_statistics, options))


def grads_of(flows: dict[str, Tensor]) -> DistillationGrads:
    return DistillationGrads(*(flows.get(name) for name in FLOWS))


def gradient_in_blocks(
    backend: Backend,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    cuts: tuple[int, ...],
    options: DivergenceOptions,
    found: DistillationRows,
    flows: dict[str, Tensor],
    *,
    weights: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Gradient [N, V], block by block, each written beside its logits, in ``dtype``."""
    saved = found.saved._replace(has_neg_inf=None)
    parts = []
    for columns in columns_of(cuts):
        batch = DistillationBatch(columns.of(student), columns.of(teacher), labels, weights)
        out = torch.full(batch.student.shape, NAN, dtype=dtype or student.dtype, device=student.device)
        part = backend.distillation_gradient(batch, options, columns, saved, grads_of(flows), out)
        assert part is out
        parts.append(part)
    return torch.cat(parts, 1)


def case(dtype: torch.dtype, offset: float, cuts: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Logits [13, V] of both sides and labels.

    The labels are the first and last ids of the blocks, and none. In row 6 the first block and in row 7 some columns
    are excluded on both sides. The rows from ``GOOD`` on are bad: three labels that no block has, a NaN in a student's
    last block, and one in a teacher's first.
    """
    g = torch.Generator().manual_seed(11)
    student, teacher = (2.0 * torch.randn(13, cuts[-1], generator=g, dtype=torch.float64) for _ in range(2))
    student[4:6] *= 4.0
    student, teacher = ((side + offset).to(dtype).to(device) for side in (student, teacher))
    student[6, : cuts[1]], teacher[6, : cuts[1]] = -INF, -INF
    student[7, 1::2], teacher[7, 1::2] = -INF, -INF
    v, last = cuts[-1], cuts[-2]
    labels = [0, cuts[1] - 1, cuts[1], last - 1, v - 1, -100, v - 1, last + last % 2, v, -1, 2**62, 3, v - 2]
    student[11, v - 2] = NAN
    teacher[12, 0] = NAN
    return student, teacher, torch.tensor(labels, device=device)


def beta_of(beta: float | str, n: int, device: torch.device) -> float | Tensor:
    return (torch.arange(n, device=device) % 2).float() if beta == "rows" else beta


def good(value: float | Tensor | None) -> float | Tensor | None:
    return value[:GOOD] if isinstance(value, Tensor) else value


def check_blocks(
    backend: Backend,
    beta: float | str,
    cuts: tuple[int, ...],
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    offset: float = 0.0,
    names: tuple[str, ...] = FLOWS,
    gradient_dtype: torch.dtype | None = None,
    **scalars: float,
) -> None:
    """Statistics and gradient of ``case`` against float64; what is bad is NaN in its row."""
    student, teacher, labels = case(dtype, offset, cuts, device)
    n = student.shape[0]
    options = DivergenceOptions(beta_of(beta, n, device), **scalars)
    flows = upstream(n, *names, device=device)
    found = rows_in_blocks(backend, student, teacher, labels, cuts, options)
    gradient = gradient_in_blocks(backend, student, teacher, labels, cuts, options, found, flows, dtype=gradient_dtype)
    exact = {"beta": good(options.beta), **scalars}
    sides = student[:GOOD], teacher[:GOOD], labels[:GOOD]
    low = [side.cpu().double().clamp(min=-1e300) for side in sides[:2]]
    want = statistics(*low, sides[2].cpu(), **{k: v.cpu() if isinstance(v, Tensor) else v for k, v in exact.items()})
    tolerance = 1e-9 if dtype == torch.float64 else 5e-6
    for name, expected in zip(FIELDS, want, strict=True):
        got = getattr(found, name)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(
            got[:GOOD].double().cpu(), expected, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    want, _ = exact_gradient(*sides, flows={k: good(v) for k, v in flows.items()}, **exact)
    assert_gradient(gradient[:GOOD], want, sides[0], temperature=options.temperature, softcap=options.student_softcap)
    assert found.student_logprob[GOOD:].isnan().tolist() == [True, True, True, True, False]
    assert found.teacher_logprob[GOOD:].isnan().tolist() == [True, True, True, False, True]
    assert found.divergence[GOOD:].isnan().tolist() == [False, False, False, True, True]
    reads = "logprob" in names, "divergence" in names
    # In all blocks, not only in that which holds what is bad.
    poisoned = [reads[0], reads[0], reads[0], True, reads[1]]
    assert gradient[GOOD:].isnan().all(-1).tolist() == poisoned
    assert gradient[GOOD:].isnan().any(-1).tolist() == poisoned


def check_tokens(
    backend: Backend,
    cuts: tuple[int, ...],
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    offset: float = 0.0,
    names: tuple[str, ...] = ("logprob", "entropy", "lse"),
    temperature: float = 1.0,
    softcap: float | None = None,
) -> None:
    """The gradient of one model's logits, from states of both sides alike, against float64."""
    logits, _, labels = case(dtype, offset, cuts, device)
    flows = upstream(len(labels), *names, device=device)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    states = [
        backend.row_state(
            DistillationBatch(c.of(logits), c.of(logits), c.local(labels), None),
            DivergenceOptions(0.0, temperature, softcap, softcap),
            c.width,
            dtype,
        )
        for c in columns_of(cuts)
    ]
    found = backend.finish_tokens(backend.merge_states(torch.stack(states)), labels)
    saved = SavedTokens(found.saved_statistics, found.entropy)
    grads = TokenGrads(*(flows.get(name) for name in ("logprob", "entropy", "lse")))
    parts = []
    for columns in columns_of(cuts):
        batch = TokenBatch(columns.of(logits), labels, None)
        out = torch.full_like(batch.logits, NAN)
        part = backend.token_gradient(batch, TokenOptions(temperature, softcap), columns, saved, grads, out)
        assert part is out
        parts.append(part)
    got = torch.cat(parts, 1)
    kept = logits[:GOOD]
    want, _ = exact_gradient(
        kept, kept, labels[:GOOD], flows={k: v[:GOOD] for k, v in flows.items()}, temperature=temperature,
        student_softcap=softcap,
    )  # fmt: skip
    assert_gradient(got[:GOOD], want, kept, temperature=temperature, softcap=softcap)
    poisoned = [*["logprob" in names] * 3, True, False]
    assert got[GOOD:].isnan().all(-1).tolist() == poisoned
    assert got[GOOD:].isnan().any(-1).tolist() == poisoned
