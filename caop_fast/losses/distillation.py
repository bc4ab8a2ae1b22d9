"""The distillation loss on logits: one differentiable function, chunked over tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from caop_fast.losses import checks
from caop_fast.losses.once import first_derivative_only
from caop_fast.losses.outputs import DistillationOutput
from caop_fast.losses.reference import Options, RowStatistics, open_block
from caop_fast.losses.rows import (
    block_gradient,
    block_statistics,
    join_statistics,
    renormalised,
    resolve_backend,
    row_blocks,
    take,
    take_options,
    take_statistics,
)


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    beta: float | Tensor = 0.0,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    vocab_size: int | None = None,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str = "auto",
    validate: bool | None = None,
) -> DistillationOutput:
    """Divergence between student and teacher per token, with log-probabilities and entropies, in nats.

    ``loss``, ``divergence``, ``student_logprob`` and ``student_entropy`` are differentiable with respect to
    ``student_logits``, in any mix, once; the teacher never is. No shift is applied: ``logits[i]`` and ``labels[i]``
    speak of the same token. The memory beyond inputs and the gradient is a few small blocks of rows.

    A token that one side excludes (-inf) and the other allows, however improbable, makes the KL that weighs it by the
    other side +inf; one that both exclude contributes 0. Finite masks such as ``finfo.min`` count as -inf: whatever
    lies 2**64 (log2 units) or more below the other side's logit does, so anything above 2**64 is reported as +inf.

    ``torch.compile`` works with graph breaks; ``fullgraph=True`` is not supported yet.

    Args:
        student_logits: [..., V_s] float32, bfloat16, float16 or float64; any leading shape, N tokens in all.
        teacher_logits: [..., V_t], same leading shape; the dtype may differ.
        labels: [...] integers in [0, V), or -100 for none.
        beta: 0 = forward KL(teacher || student), 1 = reverse KL(student || teacher), between
            ``beta KL(t||m) + (1-beta) KL(s||m)`` with ``m = beta p_t + (1-beta) p_s`` (GKD, arXiv 2306.13649); or a
            tensor [...] of zeros and ones that chooses the KL per token.
        temperature: divides both sides' logits, > 0. There is no factor T**2.
        weights: [...], finite, >= 0, not differentiated. None means 1, and 0 where the label is -100. A row of weight 0
            reports 0 everywhere, gets gradient 0, and may hold anything.
        student_softcap: ``c * tanh(z / c)`` on the logits before the temperature; None for none.
        teacher_softcap: the same for the teacher.
        vocab_size: compare only the first ids; needed where V_s and V_t differ. Columns past it get gradient 0.
        reduction: "mean" = sum(w D)/sum(w) (0 when all weights are 0), "sum", or "none" (w D per token).
        inplace: the backward writes the gradient over ``student_logits`` (not a leaf, nor a view of one); a second
            backward is an error.
        backend: "torch", "triton", or "auto" (Triton on GPUs where it is installed). With Triton the statistics of a
            row come from one kernel; the gradient, and for 0 < beta < 1 the divergence, from the PyTorch code.
        validate: check values of tensors (labels, weights, beta), which makes the host wait for a GPU; None does so
            on the CPU only. Unchecked, a bad label or beta entry gives NaN in its row.

    Returns:
        DistillationOutput; statistics are float32 (float64 when an input is), with the leading shape of the inputs.

    Raises:
        TypeError, ValueError: on bad arguments, naming the argument, what it got and what it takes.
    """
    checks.floating_tensor("student_logits", student_logits, min_ndim=2)
    checks.floating_tensor("teacher_logits", teacher_logits, min_ndim=2)
    lead = student_logits.shape[:-1]
    if teacher_logits.shape[:-1] != lead:
        raise ValueError(
            "teacher_logits must have the leading shape of student_logits, "
            f"{tuple(lead)}, got {tuple(teacher_logits.shape[:-1])}"
        )
    device = checks.one_device(
        {
            "student_logits": student_logits,
            "teacher_logits": teacher_logits,
            "labels": labels,
            "weights": weights,
            "beta": beta,
        }
    )
    vocab = checks.vocabulary(
        vocab_size, student_logits=student_logits.shape[-1], teacher_logits=teacher_logits.shape[-1]
    )
    dtype = checks.statistics_dtype((student_logits, teacher_logits))
    values = checks.checks_values(validate, device)
    label_ids = checks.label_ids(labels, lead, vocab, values=values)
    row_weights = checks.row_weights(weights, label_ids, lead, dtype, values=values)
    options = Options(
        beta=checks.divergence_beta(beta, lead, dtype, values=values),
        temperature=checks.positive("temperature", temperature),
        student_softcap=checks.positive("student_softcap", student_softcap, optional=True),
        teacher_softcap=checks.positive("teacher_softcap", teacher_softcap, optional=True),
    )
    checks.choice("reduction", reduction, checks.REDUCTIONS)
    if checks.flag("inplace", inplace) and student_logits.requires_grad:
        owner = student_logits if student_logits._base is None else student_logits._base
        if owner.is_leaf and owner.requires_grad:
            what = "a leaf" if owner is student_logits else "a view of a leaf"
            raise ValueError(
                f"inplace=True would overwrite student_logits, {what} that requires grad; pass inplace=False"
            )
    chosen = resolve_backend(backend, device)

    student = student_logits.reshape(-1, student_logits.shape[-1])
    teacher = teacher_logits.detach().reshape(-1, teacher_logits.shape[-1])
    live, dead = live_rows(row_weights)
    divergence, student_logprob, student_entropy, teacher_logprob, teacher_entropy = _Rows.apply(
        student, teacher, label_ids, live, dead, options, vocab, dtype, inplace, chosen
    )
    return DistillationOutput(
        reduce_rows(divergence, row_weights, reduction, lead),
        divergence.view(lead),
        None if student_logprob is None else student_logprob.view(lead),
        None if teacher_logprob is None else teacher_logprob.view(lead),
        student_entropy.view(lead),
        teacher_entropy.view(lead),
    )


def live_rows(weights: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """How weight-0 rows are left out: an index of the others (CPU: never touched), or a mask [N] of them (no sync).

    (None, None) when there are none to leave out.
    """
    if weights is None:
        return None, None
    dead = weights == 0
    if weights.device.type != "cpu":
        return None, dead
    if not bool(dead.any()):
        return None, None
    return (~dead).nonzero().view(-1), None


def reduce_rows(divergence: Tensor, weights: Tensor | None, reduction: str, lead: torch.Size) -> Tensor:
    """The loss of [N] divergences: sum(w D)/sum(w), sum(w D) or w D. Rows of weight 0 must hold 0."""
    weighted = divergence if weights is None else divergence * weights
    if reduction == "none":
        return weighted.view(lead)
    total = weighted.sum()
    return total if reduction == "sum" else total / total_weight(weights, divergence)


def total_weight(weights: Tensor | None, rows: Tensor) -> Tensor | int:
    """What a mean divides by: sum(w), or 1 where that is 0."""
    if weights is None:
        return max(rows.shape[0], 1)
    total = weights.sum()
    return torch.where(total == 0, 1.0, total)


def spread(column: Tensor | None, n_rows: int, live: Tensor | None, dead: Tensor | None) -> Tensor | None:
    """Column [R, 1] of the live rows as [N], with 0 in the others."""
    if column is None:
        return None
    flat = column.view(-1)
    if live is not None:
        return flat.new_zeros(n_rows).index_copy_(0, live, flat)
    return flat if dead is None else flat.masked_fill(dead, 0)


class _Rows(torch.autograd.Function):
    """[N, V] logits to the row statistics; the backward serves divergence, log-probability and entropy at once."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        live: Tensor | None,
        dead: Tensor | None,
        options: Options,
        vocab: int,
        dtype: torch.dtype,
        inplace: bool,
        backend: str,
    ) -> tuple[Tensor | None, ...]:
        found, careful = [], False
        for rows in row_blocks(student.shape[0], vocab, student.device, live):
            _, statistics, block_careful = block_statistics(
                student[rows, :vocab],
                teacher[rows, :vocab],
                take(labels, rows),
                take_options(options, rows),
                dtype,
                backend=backend,
                consume=isinstance(rows, Tensor),  # an index makes a copy, which is ours
            )
            found.append(statistics)
            careful |= block_careful
        statistics = join_statistics(found)
        beta = options.beta if isinstance(options.beta, Tensor) else None
        ctx.save_for_backward(student, teacher, labels, live, dead, beta, *statistics)
        fixed = options if beta is None else options._replace(beta=None)
        ctx.settings = (fixed, vocab, dtype, inplace, careful, backend)
        ctx.consumed = False
        outputs = [
            spread(column, student.shape[0], live, dead)
            for column in (
                statistics.divergence,
                statistics.student_logprob,
                statistics.student_entropy,
                statistics.teacher_logprob,
                statistics.teacher_entropy,
            )
        ]
        ctx.mark_non_differentiable(*(t for t in outputs[3:] if t is not None))
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @first_derivative_only
    def backward(
        ctx: Any, d_divergence: Tensor | None, d_logprob: Tensor | None, d_entropy: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if ctx.consumed:
            raise RuntimeError(
                "inplace=True: the first backward wrote its gradient over student_logits; use inplace=False"
            )
        student, teacher, labels, live, dead, beta, *columns = ctx.saved_tensors
        options, vocab, dtype, inplace, careful, backend = ctx.settings
        nothing = (None,) * 10
        upstream = {"d_divergence": d_divergence, "d_logprob": d_logprob, "d_entropy": d_entropy}
        upstream = {k: v.to(dtype).view(-1, 1) / options.temperature for k, v in upstream.items() if v is not None}
        if not upstream or not ctx.needs_input_grad[0]:
            return nothing
        if beta is not None:
            options = options._replace(beta=beta)
        statistics = RowStatistics(*columns)
        gradient = student if inplace else torch.empty_like(student)
        if inplace:
            ctx.consumed = True
        if live is not None:
            dead = torch.ones(student.shape[0], dtype=torch.bool, device=student.device).index_fill_(0, live, False)
        done = 0
        for rows in row_blocks(student.shape[0], vocab, student.device, live):
            height = rows.numel() if isinstance(rows, Tensor) else rows.stop - rows.start
            known = take_statistics(statistics, slice(done, done + height))
            done += height
            chosen = take_options(options, rows)
            block, *_ = open_block(
                student[rows, :vocab],
                teacher[rows, :vocab],
                chosen,
                dtype,
                known=known,
                consume=isinstance(rows, Tensor),
                slope=options.student_softcap is not None,
            )
            if backend == "triton":
                known = renormalised(block, known)
            gradient[rows, :vocab] = block_gradient(
                block,
                known,
                take(labels, rows),
                chosen,
                careful=careful,
                **{name: value[rows] for name, value in upstream.items()},
            ).to(gradient.dtype)
        gradient[:, vocab:] = 0
        if dead is not None:
            gradient.masked_fill_(dead.view(-1, 1), 0)
        return gradient, *nothing[1:]
