"""Rows whose columns come in blocks, put together as the linear losses do it on either backend, and cases to try."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import ModuleType
from typing import NamedTuple

import torch
from caop_fast.losses.rows import Columns, Rows
from gradient_oracle import assert_gradient, exact_gradient, upstream
from oracle import statistics
from torch import Tensor

from caop_fast.losses import on_triton, rows
from caop_fast.losses.reference import states
from caop_fast.losses.reference.divergence import Options

V = 1031
CUTS = ((0, 700, V), (0, 1, 430, V))  # one column alone is a block, too
BETAS = (0.0, 0.3, 1.0, "rows")
FIELDS = ("divergence", "student_logprob", "teacher_logprob", "student_entropy", "teacher_entropy")
FLOWS = ("divergence", "logprob", "entropy")
GOOD = 8  # rows of ``case`` that an oracle can be asked about
INF, NAN = float("inf"), float("nan")


class Backend(NamedTuple):
    """What differs between the backends: by name, or in what it takes."""

    code: ModuleType
    row_state: Callable[[Tensor, Tensor, Tensor | None, Options], Tensor]
    merge_states: Callable[[Tensor], Tensor]
    token_fields: list[int]  # of the saved_statistics, those that a gradient of one model's tokens takes


def _reference_state(student: Tensor, teacher: Tensor, labels: Tensor | None, options: Options) -> Tensor:
    return states.row_state(student, teacher, labels, options, torch.promote_types(student.dtype, torch.float32))


TORCH = Backend(rows, _reference_state, states.merge_states, [0, 2])
TRITON = Backend(
    on_triton,
    lambda s, t, y, o: on_triton.row_state(s, t, y, o, s.shape[1]),
    on_triton.merge_states,
    [0, 1, 2, 3, 4, 5],
)


def columns_of(cuts: tuple[int, ...]) -> list[Columns]:
    """Consecutive blocks of ids."""
    return [Columns(a, b - a, cuts[-1]) for a, b in pairwise(cuts)]


def rows_in_blocks(
    backend: Backend, student: Tensor, teacher: Tensor, labels: Tensor | None, cuts: tuple[int, ...], options: Options
) -> Rows:
    """Statistics of rows from their blocks: states, and for an interior beta a second pass."""
    blocks = [(c.of(student), c.of(teacher), c.local(labels)) for c in columns_of(cuts)]
    state = backend.merge_states(torch.stack([backend.row_state(*block, options) for block in blocks]))
    found = backend.code.state_rows(state, labels, options)
    if not options.interior:
        return found
    sums = torch.cat([backend.code.mixture_sums(s, t, options, found.saved_statistics) for s, t, _ in blocks])
    return found._replace(divergence=backend.code.finish_mixture(sums, found.saved_statistics, options))


def gradient_in_blocks(
    backend: Backend,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    cuts: tuple[int, ...],
    options: Options,
    found: Rows,
    flows: dict[str, Tensor],
    *,
    weights: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Gradient [N, V], block by block, each written beside its logits, in ``dtype``."""
    upstream = {f"d_{n}": flows[n].to(found.saved_statistics) if n in flows else None for n in FLOWS}
    parts = []
    for columns in columns_of(cuts):
        block = columns.of(student)
        out = torch.full(block.shape, NAN, dtype=dtype or student.dtype, device=student.device)
        part = backend.code.distillation_gradient(
            block, columns.of(teacher), labels, weights, options, columns, found.saved_statistics, found.student_entropy,
            out=out, **upstream,
        )  # fmt: skip
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
    options = Options(beta_of(beta, n, device), **scalars)
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
    found = rows_in_blocks(backend, logits, logits, labels, cuts, Options(0.0, temperature, softcap, softcap))
    d = {f"d_{n}": flows[n].to(found.saved_statistics) if n in flows else None for n in ("logprob", "entropy", "lse")}
    parts = []
    for columns in columns_of(cuts):
        block = columns.of(logits)
        out = torch.full_like(block, NAN)
        part = backend.code.token_gradient(
            block, labels, None, found.saved_statistics[backend.token_fields], found.student_entropy, temperature, softcap,
            columns, out=out, **d,
        )  # fmt: skip
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
