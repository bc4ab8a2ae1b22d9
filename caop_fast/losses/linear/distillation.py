"""The distillation loss from hidden states and output heads: the [N, V] logits never exist as a whole.

``linear_distillation_loss`` calls the operator ``caop_fast::linear_distillation``, which computes the gradients in the
forward pass, or with ``memory="min"`` the operator of ``linear_distillation_rows``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from caop_fast.losses import checks
from caop_fast.losses.batches import DistillationRows
from caop_fast.losses.distillation import distillation_output, reduce_rows
from caop_fast.losses.linear.config import check_reduction, prepare, statistics_dtype
from caop_fast.losses.linear.distillation_rows import (
    DistillationCall,
    check_call,
    linear_rows,
    unmask_call,
    validate_call,
)
from caop_fast.losses.linear.distributed import VocabularyShards
from caop_fast.losses.linear.gradients import (
    LossWithGradients,
    WeightedRows,
    compute_with_gradients,
    differentiate_loss,
    fake_with_gradients,
)
from caop_fast.losses.linear.lm_head import LMHead, ProjectedSide
from caop_fast.losses.operator import Operator
from caop_fast.losses.options import DivergenceOptions
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

    With one unit U = 2 N V H operations, ``memory="balanced"`` computes the gradients in the forward pass, chunk of
    tokens by chunk of tokens, with 4 U (3 U where the student's head is frozen, 2 U where nothing needs a gradient);
    "min" recomputes the logits in vocabulary blocks in the backward, with 6 U (8 U for an interior beta), and keeps no
    gradient of the weight. ``docs/linear_losses.md`` has the memory of both.

    Dtypes: a GEMM multiplies operands of the promoted dtype of hidden states and weight (under ``torch.autocast``, its
    dtype, float64 excepted, as ``torch.nn.Linear`` would; of ``logits_dtype`` where that is narrower) and returns
    ``logits_dtype``; the weight gradient is accumulated in float32 and rounded once, to the dtype of the weight (a
    bfloat16 one on a GPU with ``memory="balanced"`` before the upstream gradient of the loss multiplies it, which is
    exact for 1 and other powers of two). A head narrower than its operands is widened block by block.

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
    call = prepare(
        {
            "student_": ProjectedSide(student_hidden, LMHead(student_weight, student_bias, student_scale)),
            "teacher_": ProjectedSide(teacher_hidden, LMHead(teacher_weight, teacher_bias, teacher_scale)),
        },
        {"labels": labels, "weights": weights, "beta": beta},
        vocab_size=vocab_size,
        logits_dtype=logits_dtype,
        chunk_size=chunk_size,
        process_group=process_group,
        backend=backend,
        validate=validate,
        low_memory=memory == "min",
    )
    options = DivergenceOptions(beta, temperature, student_softcap, teacher_softcap)
    inputs = check_call(call, labels, weights, options)
    if memory == "balanced":
        return linear_distillation(LossInputs(inputs, reduction)).output(call.lead)
    rows = linear_rows(inputs)
    loss = reduce_rows(rows.divergence, inputs.weights, reduction, rows.divergence.shape)
    detached = rows._replace(
        divergence=rows.divergence.detach(),
        student_logprob=None if rows.student_logprob is None else rows.student_logprob.detach(),
        student_entropy=rows.student_entropy.detach(),
    )
    return distillation_output(loss, detached, call.lead)


class LossInputs(NamedTuple):
    """Arguments of ``caop_fast::linear_distillation``."""

    call: DistillationCall
    reduction: str


def _loss(inputs: LossInputs) -> LossWithGradients:
    call = inputs.call
    validate_call(call)
    work = unmask_call(call)

    def compute(
        tokens: slice, student: Tensor, teacher: Tensor | None, out: Tensor, grad_divergence: Tensor | None
    ) -> DistillationRows:
        batch = work.batch(student, teacher, tokens)
        return work.backend.distillation_rows_with_gradient(batch, work.options.rows(tokens), grad_divergence, out)

    rows = WeightedRows(
        work.unmasked, call.weights, inputs.reduction, labelled=call.labels is not None, dtype=work.backend.dtype
    )
    return compute_with_gradients(work.sides, compute, rows, call.config)


def _fake_loss(inputs: LossInputs) -> LossWithGradients:
    call = inputs.call
    dtype = statistics_dtype(call.student, call.teacher)
    return fake_with_gradients(call.student, call.config, labelled=call.labels is not None, dtype=dtype)


linear_distillation = Operator("linear_distillation", LossInputs, LossWithGradients, _loss, _fake_loss)
differentiate_loss(linear_distillation, lambda inputs: inputs.call.student, "call_student")
