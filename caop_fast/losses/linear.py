"""The distillation loss from hidden states and output heads: the [N, V] logits never exist as a whole.

The gradients are made in the forward, chunk of tokens by chunk of tokens, while the logits of the chunk are there. With
one unit = 2 N V H operations it takes 4 units: two projections, d_hidden and d_weight (3 with a frozen student head, 2
without gradients); recomputing the logits in the backward would take 6.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from caop_fast.losses import checks, on_triton
from caop_fast.losses.backend import resolve_backend
from caop_fast.losses.distillation import reduce_rows, total_weight
from caop_fast.losses.once import first_derivative_only
from caop_fast.losses.outputs import DistillationOutput
from caop_fast.losses.projection import (
    Head,
    add_weight_gradient,
    chunk_rows,
    hidden_gradient,
    logits,
    make_head,
    projection_dtypes,
)
from caop_fast.losses.reference.divergence import Options, RowStatistics
from caop_fast.losses.rows import (
    Rows,
    block_gradient,
    block_statistics,
    join_statistics,
    live_rows,
    row_blocks,
    spread,
    take,
    take_options,
)


class Wanted(NamedTuple):
    """Which gradients to make."""

    hidden: bool
    weight: bool
    bias: bool


class Problem(NamedTuple):
    """What does not change from chunk to chunk."""

    student: Head
    teacher: Head
    options: Options
    dtype: torch.dtype
    backend: str
    chunk: int
    wanted: Wanted


def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    beta: float | Tensor = 0.0,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    vocab_size: int | None = None,
    reduction: str = "mean",
    logits_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    memory: str = "balanced",
    process_group: Any = None,
    backend: str = "auto",
    validate: bool | None = None,
) -> DistillationOutput:
    """``distillation_loss`` of ``logits = softcap(scale * (hidden W^T + bias))``, without ever holding [N, V] logits.

    Only ``loss`` is differentiable, with respect to the student's hidden states, weight and bias, once; the other
    fields are detached. The gradients are made in the forward and scaled in the backward, so a second backward with
    ``retain_graph=True`` is right. The same tensor may be both heads: the gradient goes through the student only.

    Dtypes: a GEMM multiplies operands of the promoted dtype of hidden states and weight (under ``torch.autocast``, its
    dtype, float64 excepted, as ``torch.nn.Linear`` would) and returns ``logits_dtype``; the weight gradient is
    accumulated in float32 and rounded once, to the dtype of the weight. A head narrower than its operands is widened
    block by block. ``torch.compile`` works with graph breaks; ``fullgraph=True`` is not supported yet.

    Args:
        student_hidden: [..., H_s] float32, bfloat16, float16 or float64; N tokens in all.
        student_weight: [V_s, H_s].
        teacher_hidden: [..., H_t], same leading shape.
        teacher_weight: [V_t, H_t].
        labels: [...] integers in [0, V), or -100 for none.
        student_bias: [V_s] or None.
        teacher_bias: [V_t] or None.
        student_scale: multiplies the student's logits, before its softcap.
        teacher_scale: the same for the teacher.
        student_softcap: ``c * tanh(z / c)`` on the logits before the temperature; None for none.
        teacher_softcap: the same for the teacher.
        beta: as in ``distillation_loss``: 0 = forward KL, 1 = reverse KL, between, or a 0/1 tensor [...].
        temperature: divides both sides' logits, > 0.
        weights: [...], finite, >= 0; None means 1, and 0 where the label is -100. Rows of weight 0 report 0 and cannot
            poison anything; on the CPU they are never touched, so passing them costs nothing.
        vocab_size: compare only the first ids; needed where V_s and V_t differ.
        reduction: "mean" = sum(w D)/sum(w) or "sum".
        logits_dtype: None = float32 (float64 when an input is). torch.bfloat16 or torch.float16 is faster on a GPU and
            rounds logits: near a divergence of 0.02 that is about 23 % of the gradient.
        chunk_size: tokens per chunk; None chooses by memory.
        memory: "balanced".
        process_group: None; sharded vocabularies are not supported.
        backend: "torch", "triton" or "auto"; as in ``distillation_loss``.
        validate: as in ``distillation_loss``.

    Returns:
        DistillationOutput; ``loss`` is a scalar, statistics are float32 (float64 when an input is).

    Raises:
        TypeError, ValueError: on bad arguments, naming the argument, what it got and what it takes.
        NotImplementedError: for a ``process_group``.
    """
    student_hidden = checks.floating_tensor("student_hidden", student_hidden, min_ndim=2)
    teacher_hidden = checks.floating_tensor("teacher_hidden", teacher_hidden, min_ndim=2)
    lead = student_hidden.shape[:-1]
    if teacher_hidden.shape[:-1] != lead:
        raise ValueError(
            "teacher_hidden must have the leading shape of student_hidden, "
            f"{tuple(lead)}, got {tuple(teacher_hidden.shape[:-1])}"
        )
    _check_head("student", student_hidden, student_weight, student_bias)
    _check_head("teacher", teacher_hidden, teacher_weight, teacher_bias)
    vocab = checks.vocabulary(
        vocab_size, student_weight=student_weight.shape[0], teacher_weight=teacher_weight.shape[0]
    )
    device = checks.one_device(
        {
            "student_hidden": student_hidden,
            "student_weight": student_weight,
            "teacher_hidden": teacher_hidden,
            "teacher_weight": teacher_weight,
            "student_bias": student_bias,
            "teacher_bias": teacher_bias,
            "labels": labels,
            "weights": weights,
            "beta": beta,
        }
    )
    dtype = checks.statistics_dtype(
        (student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias)
    )
    values = checks.checks_values(validate, device)
    label_ids = checks.label_ids(labels, lead, vocab, values=values)
    row_weights = checks.row_weights(weights, label_ids, lead, dtype, values=values)
    options = Options(
        beta=checks.divergence_beta(beta, lead, dtype, values=values),
        temperature=checks.positive("temperature", temperature),
        student_softcap=checks.positive("student_softcap", student_softcap, optional=True),
        teacher_softcap=checks.positive("teacher_softcap", teacher_softcap, optional=True),
    )
    _check_modes(reduction, memory, process_group, logits_dtype)
    grad = torch.is_grad_enabled()
    wanted = Wanted(
        grad and student_hidden.requires_grad,
        grad and student_weight.requires_grad,
        grad and student_bias is not None and student_bias.requires_grad,
    )
    result = dtype if logits_dtype is None else logits_dtype
    student_scale = checks.finite("student_scale", student_scale)
    teacher_scale = checks.finite("teacher_scale", teacher_scale)
    problem = Problem(
        make_head(
            student_weight,
            student_bias,
            student_scale,
            vocab,
            *projection_dtypes(student_hidden, student_weight, result),
        ),
        make_head(
            teacher_weight,
            teacher_bias,
            teacher_scale,
            vocab,
            *projection_dtypes(teacher_hidden, teacher_weight, result),
        ),
        options,
        dtype,
        resolve_backend(backend, device),
        chunk_rows(chunk_size, vocab, result, device, weight_gradient=wanted.weight),
        wanted,
    )
    loss, divergence, student_logprob, teacher_logprob, student_entropy, teacher_entropy = _Linear.apply(
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        student_weight,
        student_bias,
        teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
        label_ids,
        row_weights,
        problem,
        reduction,
    )
    return DistillationOutput(
        loss,
        divergence.view(lead),
        None if student_logprob is None else student_logprob.view(lead),
        None if teacher_logprob is None else teacher_logprob.view(lead),
        student_entropy.view(lead),
        teacher_entropy.view(lead),
    )


def _check_head(side: str, hidden: Tensor, weight: Any, bias: Any) -> None:
    if hidden.shape[-1] == 0:
        raise ValueError(f"{side}_hidden must have at least one feature, got shape {tuple(hidden.shape)}")
    checks.floating_tensor(f"{side}_weight", weight, ndim=2)
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{side}_weight must be [V, {hidden.shape[-1]}] to fit {side}_hidden {tuple(hidden.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None:
        checks.floating_tensor(f"{side}_bias", bias, ndim=1)
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(f"{side}_bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")


def _check_modes(reduction: Any, memory: Any, process_group: Any, logits_dtype: Any) -> None:
    if reduction == "none":
        raise ValueError(
            "reduction='none' needs gradients per row, which linear_distillation_loss does not keep (that is "
            "linear_distillation_rows, not in this release): use 'mean' or 'sum', or distillation_loss on logits"
        )
    checks.choice("reduction", reduction, ("mean", "sum"))
    if memory != "balanced":
        raise ValueError(f"memory must be 'balanced' (the only mode in this release), got {memory!r}")
    if process_group is not None:
        raise NotImplementedError(
            "process_group must be None: sharded vocabularies are not supported in this release, "
            f"got {type(process_group).__name__}"
        )
    if logits_dtype is not None:
        if not isinstance(logits_dtype, torch.dtype):
            raise TypeError(f"logits_dtype must be a torch.dtype or None, got {type(logits_dtype).__name__}")
        if logits_dtype not in checks.FLOAT_DTYPES:
            raise ValueError(f"logits_dtype must be float32, bfloat16, float16 or float64, got {logits_dtype}")


class _Sums:
    """Gradients of sum(w D), gathered chunk by chunk."""

    def __init__(self) -> None:
        self.hidden: list[Tensor] = []
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def add(self, d_logits: Tensor, hidden: Tensor, problem: Problem) -> None:
        if problem.wanted.hidden:
            self.hidden.append(hidden_gradient(d_logits, problem.student))
        if problem.wanted.weight:
            self.weight = add_weight_gradient(self.weight, d_logits, hidden, problem.student)
        if problem.wanted.bias:
            part = d_logits.sum(0, dtype=problem.dtype)
            self.bias = part if self.bias is None else self.bias.add_(part)


def _chunk(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    labels: Tensor | None,
    options: Options,
    upstream: Tensor | None,
    problem: Problem,
) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
    """Statistics of a chunk of tokens and, given the rows' ``upstream`` [C], the gradient of its logits [C, V].

    The statistics are [C] or None: divergence, both log-probabilities, both entropies.
    """
    student, teacher = logits(student_hidden, problem.student), logits(teacher_hidden, problem.teacher)
    if problem.backend == "triton":
        return _kernel_chunk(student, teacher, labels, options, upstream)
    found, d_logits = [], None
    for rows in row_blocks(student.shape[0], student.shape[1], student.device, None):
        chosen, block_labels = take_options(options, rows), take(labels, rows)
        block, statistics, careful = block_statistics(
            student[rows],
            teacher[rows],
            block_labels,
            chosen,
            problem.dtype,
            consume=True,
            slope=upstream is not None and options.student_softcap is not None,
        )
        found.append(statistics)
        if upstream is not None:
            flow = upstream[rows].view(-1, 1) / options.temperature
            d_logits = block_gradient(block, statistics, block_labels, chosen, careful=careful, d_divergence=flow)
            if d_logits.shape[0] < student.shape[0]:
                student[rows] = d_logits  # the logits of these rows have served
                d_logits = student
    return _columns(join_statistics(found)), d_logits


def _kernel_chunk(
    student: Tensor, teacher: Tensor, labels: Tensor | None, options: Options, upstream: Tensor | None
) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
    """The same by the Triton kernels, the gradient over the logits."""
    vocab = student.shape[1]
    found = on_triton.distillation_rows(student, teacher, labels, None, options, vocab)
    d_logits = None
    if upstream is not None:
        d_logits = on_triton.distillation_gradient(
            student,
            teacher,
            labels,
            None,
            options,
            vocab,
            found.normaliser,
            found.student_entropy,
            inplace=True,
            d_divergence=upstream,
            d_logprob=None,
            d_entropy=None,
        )
    return _columns(found), d_logits


def _columns(found: RowStatistics | Rows) -> tuple[Tensor | None, ...]:
    names = ("divergence", "student_logprob", "teacher_logprob", "student_entropy", "teacher_entropy")
    return tuple(getattr(found, name) for name in names)


def _join(parts: list[Tensor | None]) -> Tensor | None:
    return None if parts[0] is None else torch.cat(parts)


class _Linear(torch.autograd.Function):
    """Hidden states [N, H] and heads to loss and row statistics; the backward only scales."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor,
        labels: Tensor | None,
        weights: Tensor | None,
        problem: Problem,
        reduction: str,
    ) -> tuple[Tensor | None, ...]:
        n_rows, kind = student_hidden.shape[0], student_hidden.device.type
        autocast_off = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
        with autocast_off:
            live, dead = live_rows(weights)
            options, row_weights, student, teacher = problem.options, weights, student_hidden, teacher_hidden
            if live is not None:
                student, teacher, row_weights = student[live], teacher[live], weights[live]
                labels, options = take(labels, live), take_options(options, live)
            elif dead is not None:  # NaN * 0 is NaN: what a row of weight 0 holds must go before the GEMMs
                student = student.masked_fill(dead.view(-1, 1), 0)
                teacher = teacher.masked_fill(dead.view(-1, 1), 0)
            upstream = unit = None
            if any(problem.wanted):
                upstream, unit = _row_upstream(row_weights, student, problem)
            sums, found = _Sums(), []
            for start in range(0, max(student.shape[0], 1), problem.chunk):
                rows = slice(start, start + problem.chunk)
                statistics, d_logits = _chunk(
                    student[rows],
                    teacher[rows],
                    take(labels, rows),
                    take_options(options, rows),
                    None if upstream is None else upstream[rows],
                    problem,
                )
                found.append(statistics)
                if d_logits is not None:
                    sums.add(d_logits, student[rows], problem)
                del d_logits
            outputs = [spread(_join(parts), n_rows, live, dead) for parts in zip(*found, strict=True)]
            loss = reduce_rows(outputs[0], weights, reduction, torch.Size((n_rows,)))
            divisor = total_weight(weights, outputs[0]) if reduction == "mean" else 1
        hidden = torch.cat(sums.hidden) if len(sums.hidden) > 1 else (sums.hidden or [None])[0]
        ctx.save_for_backward(
            hidden, sums.weight, sums.bias, live, *(t if isinstance(t, Tensor) else None for t in (divisor, unit))
        )
        ctx.divisor = divisor if isinstance(divisor, int) else None
        ctx.shapes = n_rows, student_weight.shape[0]
        ctx.dtypes = student_hidden.dtype, student_weight.dtype, None if student_bias is None else student_bias.dtype
        ctx.mark_non_differentiable(*(t for t in outputs if t is not None))
        ctx.set_materialize_grads(False)
        return loss, *outputs

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, d_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if d_loss is None:
            return (None,) * 8
        hidden, weight, bias, live, divisor, unit = ctx.saved_tensors
        factor = d_loss / (ctx.divisor if divisor is None else divisor)
        if unit is not None:
            factor = factor * unit
        n_rows, vocab = ctx.shapes
        scaled = [
            None if total is None else _scaled(total, factor, dtype, height, index)
            for total, dtype, height, index in zip(
                (hidden, weight, bias), ctx.dtypes, (n_rows, vocab, vocab), (live, None, None), strict=True
            )
        ]
        return *scaled, None, None, None, None, None


def _row_upstream(weights: Tensor | None, hidden: Tensor, problem: Problem) -> tuple[Tensor, Tensor | None]:
    """What flows into each row's divergence from sum(w D), [R], times the factor between hidden W^T and the logits.

    float16 GEMM operands underflow below 6e-8, which weights divided by a token count would reach: there the largest
    weight is taken out, and returned to be multiplied in at the end.
    """
    factor = problem.student.scale
    if weights is None:
        return hidden.new_full((hidden.shape[0],), factor, dtype=problem.dtype), None
    unit = None
    if problem.student.operand == torch.float16 and weights.numel():
        unit = weights.amax()
        unit = torch.where(unit == 0, 1.0, unit)
        weights = weights / unit
    return weights * factor, unit


def _scaled(total: Tensor, factor: Tensor, dtype: torch.dtype, height: int, index: Tensor | None) -> Tensor:
    """``total * factor`` rounded once to ``dtype``, in a new tensor of ``height`` rows, zero where nothing went."""
    if index is None and total.shape[0] == height:
        return torch.mul(total, factor, out=torch.empty_like(total, dtype=dtype))
    out = total.new_zeros((height, *total.shape[1:]), dtype=dtype)
    if index is None:
        out[: total.shape[0]] = total * factor
        return out
    return out.index_copy_(0, index, (total * factor).to(dtype))
