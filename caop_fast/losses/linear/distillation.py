"""The distillation loss from hidden states and output heads: the [N, V] logits never exist as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from caop_fast.losses import checks
from caop_fast.losses.distillation import reduce_rows
from caop_fast.losses.linear.arguments import Model, Prepared, check_pair, prepare
from caop_fast.losses.linear.shards import VocabularyShards
from caop_fast.losses.ops.linear_distillation import linear_distillation
from caop_fast.losses.ops.linear_distillation_rows import linear_distillation_rows as rows_operator
from caop_fast.losses.outputs import DistillationOutput

MEMORY = ("balanced", "min")


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
    process_group: torch.distributed.ProcessGroup | VocabularyShards | None = None,
    backend: str = "auto",
    validate: bool | None = None,
) -> DistillationOutput:
    """``distillation_loss`` of ``logits = softcap(scale * (hidden W^T + bias))``, without ever holding [N, V] logits.

    Only ``loss`` is differentiable, with respect to the student's hidden states, weight and bias, once; the other
    fields are detached (``linear_distillation_rows`` has them differentiable). A second backward with
    ``retain_graph=True`` is right. The same tensor may be both heads: it is read once for both, and the gradient goes
    through the student only. Works under ``torch.compile(fullgraph=True)`` and ``torch.autocast``.

    With one unit U = 2 N V H operations, ``memory="balanced"`` makes the gradients in the forward, chunk of tokens by
    chunk of tokens, with 4 U (3 U where the student's head is frozen, 2 U where nothing needs a gradient); "min" makes
    the logits again in the backward, block of ids by block of ids, with 6 U (8 U for an interior beta), and keeps no
    float32 gradient of the weight. ``docs/linear_losses.md`` has the memory of both.

    Dtypes: a GEMM multiplies operands of the promoted dtype of hidden states and weight (under ``torch.autocast``, its
    dtype, float64 excepted, as ``torch.nn.Linear`` would; of ``logits_dtype`` where that is narrower) and returns
    ``logits_dtype``; the weight gradient is
    accumulated in float32 and rounded once, to the dtype of the weight. A head narrower than its operands is widened
    block by block.

    Distributed heads: an FSDP2 ``DTensor`` is gathered once, and its gradient averaged over the ranks of its mesh, as
    FSDP2 does. With ``process_group`` each rank holds consecutive rows of both heads, the same tokens, and gets the
    whole result; see ``VocabularyShards``.

    Args:
        student_hidden: [..., H_s] float32, bfloat16, float16 or float64; N tokens in all.
        student_weight: [V_s, H_s].
        teacher_hidden: [..., H_t], same leading shape. Nothing of the teacher is differentiated.
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
        weights: [...], finite, >= 0, not differentiated (a ratio that should be trained belongs to
            ``linear_distillation_rows``). None means 1, and 0 where the label is -100; given weights count for such
            tokens, too. Rows of weight 0 report 0 and cannot poison anything; on the CPU they are never touched, so
            passing them costs nothing. On a GPU leaving them out would make the host wait: pass only the tokens that
            count where the host knows them.
        vocab_size: compare only the first ids (of all ranks); needed where V_s and V_t differ.
        reduction: "mean" = sum(w D)/sum(w) or "sum".
        logits_dtype: None = float32 (float64 when an input is). torch.bfloat16 or torch.float16 is faster on a GPU and
            rounds logits: near a divergence of 0.02 that is about 23 % of the gradient.
        chunk_size: most tokens per chunk (with ``memory="min"``, ids per block); None chooses by memory.
        memory: "balanced" or "min", above.
        process_group: ranks over which the rows of both heads are cut, in their order; None for whole heads.
        backend: "torch", "triton" or "auto"; as in ``distillation_loss``.
        validate: as in ``distillation_loss``.

    Returns:
        DistillationOutput; ``loss`` is a scalar, statistics are float32 (float64 when an input is).

    Raises:
        TypeError, ValueError: on bad arguments, naming the argument, what it got and what it takes.
        RuntimeError: on a second derivative.
    """
    check_reduction(reduction, "linear_distillation_loss", "linear_distillation_rows")
    checks.choice("memory", memory, MEMORY)
    student = Model("student_", student_hidden, student_weight, student_bias, student_scale, student_softcap)
    teacher = Model("teacher_", teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap)
    call, rows = _prepare(
        student, teacher, labels, weights, beta, temperature, vocab_size=vocab_size, logits_dtype=logits_dtype,
        chunk_size=chunk_size, small=memory == "min", process_group=process_group, backend=backend, validate=validate,
    )  # fmt: skip
    if memory == "min":
        found = rows_operator(*call.sides, *rows, *call.setting)
        loss = reduce_rows(found[0], rows[1], reduction, torch.Size((found[0].shape[0],)))
        found = [loss, *(t.detach() for t in found[:5])]
    else:
        found = linear_distillation(*call.sides, *rows, reduction == "mean", *call.setting)
    return output(found[0], found[1:6], call.lead, labels)


def linear_distillation_rows(
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
    logits_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    process_group: torch.distributed.ProcessGroup | VocabularyShards | None = None,
    backend: str = "auto",
    validate: bool | None = None,
) -> DistillationOutput:
    """Per-token divergences, log-probabilities and entropies from hidden states, differentiable in any mix.

    For losses whose weights follow from the statistics themselves: importance ratios, clipping, entropy masks.
    ``divergence``, ``student_logprob`` and ``student_entropy`` are differentiable with respect to the student's hidden
    states, weight and bias, once. The backward makes the logits again, block of ids by block of ids: 2 U forward and
    4 U backward in units of U = 2 N V H operations (3 U where only one of hidden states and weight needs a gradient).

    Args:
        weights: [...], finite, >= 0; they only mask: a token of weight 0 reports 0 everywhere, gets gradient 0, and may
            hold anything. None masks the tokens whose label is -100.
        chunk_size: most tokens per chunk of the forward; None chooses by memory.
        student_hidden, student_weight, teacher_hidden, teacher_weight, labels, student_bias, teacher_bias,
            student_scale, teacher_scale, student_softcap, teacher_softcap, beta, temperature, vocab_size, logits_dtype,
            process_group, backend, validate: as in ``linear_distillation_loss``.

    Returns:
        DistillationOutput in float32 (float64 when an input is), each field with the leading shape; ``loss`` is None.

    Raises:
        TypeError, ValueError: on bad arguments, naming the argument, what it got and what it takes.
        RuntimeError: on a second derivative.
    """
    student = Model("student_", student_hidden, student_weight, student_bias, student_scale, student_softcap)
    teacher = Model("teacher_", teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap)
    call, rows = _prepare(
        student, teacher, labels, weights, beta, temperature, vocab_size=vocab_size, logits_dtype=logits_dtype,
        chunk_size=chunk_size, small=False, process_group=process_group, backend=backend, validate=validate,
    )  # fmt: skip
    return output(None, rows_operator(*call.sides, *rows, *call.setting)[:5], call.lead, labels)


def check_reduction(reduction: str, function: str, instead: str) -> None:
    """ "mean" or "sum": the gradients are made before anybody could weigh them."""
    if reduction == "none":
        raise ValueError(
            f"reduction='none' needs gradients per row, which {function} does not keep: use 'mean' or 'sum', or "
            f"{instead}, whose fields are differentiable per token"
        )
    checks.choice("reduction", reduction, ("mean", "sum"))


def _prepare(
    student: Model,
    teacher: Model,
    labels: Tensor | None,
    weights: Tensor | None,
    beta: float | Tensor,
    temperature: float,
    **options: Any,
) -> tuple[Prepared, tuple[Any, ...]]:
    """The sides and setting of a call, and its labels, weights, beta per row, beta, temperature."""
    student, teacher = check_pair(student, teacher, sharded=options["process_group"] is not None)
    call = prepare((student, teacher), {"labels": labels, "weights": weights, "beta": beta}, **options)
    label_ids = checks.label_ids(labels, call.lead, call.setting.columns.total, values=False)
    row_weights = checks.row_weights(weights, label_ids, call.lead, call.dtype, values=False)
    beta = checks.divergence_beta(beta, call.lead, call.dtype, values=False)
    per_row = isinstance(beta, Tensor)
    temperature = checks.positive("temperature", temperature)
    return call, (label_ids, row_weights, beta if per_row else None, 0.0 if per_row else beta, temperature)


def output(loss: Tensor | None, found: Sequence[Tensor], lead: torch.Size, labels: Tensor | None) -> DistillationOutput:
    """Statistics in the operators' order as an output of the leading shape."""
    divergence, student_logprob, student_entropy, teacher_logprob, teacher_entropy = found
    return DistillationOutput(
        loss,
        divergence.view(lead),
        None if labels is None else student_logprob.view(lead),
        None if labels is None else teacher_logprob.view(lead),
        student_entropy.view(lead),
        teacher_entropy.view(lead),
    )
