"""``caop_fast::distillation_rows``: row statistics of two tensors of logits, and their gradient.

An operator, so that ``torch.compile`` takes it as a whole and nothing inside has to be traced: checks of values and the
choice of rows look at data on the CPU.
"""

import torch
from torch import Tensor

from caop_fast.losses import checks, on_triton, rows
from caop_fast.losses.ops.gradients import differentiate, gradient_operators
from caop_fast.losses.reference.divergence import Options

ONCE = "the distillation losses can be differentiated once: double backward through them is not supported"


@torch.library.custom_op("caop_fast::distillation_rows", mutates_args=())
def distillation_rows(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    beta_rows: Tensor | None,
    beta: float,
    temperature: float,
    student_softcap: float | None,
    teacher_softcap: float | None,
    vocab: int,
    inplace: bool,
    triton: bool,
    validate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits [N, V_s], [N, V_t] to divergence, student_logprob, student_entropy, teacher_logprob, teacher_entropy [N].

    The log-probabilities are empty without labels. The last two outputs are for the gradient: ``Rows.saved_statistics`` and
    whether a logit is -inf. Labels int64, weights and beta_rows in the dtype of the statistics. ``inplace`` is
    about the backward.
    """
    if validate:
        checks.check_labels(labels, vocab)
        checks.check_weights(weights)
        checks.check_beta(beta_rows)
    dtype = checks.statistics_dtype((student, teacher))
    options = Options(beta if beta_rows is None else beta_rows, temperature, student_softcap, teacher_softcap)
    if triton:
        found = on_triton.distillation_rows(student, teacher, labels, weights, options, vocab)
    else:
        found = rows.distillation_rows(student, teacher, labels, weights, options, vocab, dtype)
    empty = [student.new_empty(0, dtype=dtype) for _ in range(2)]
    return (
        found.divergence,
        empty[0] if found.student_logprob is None else found.student_logprob,
        found.student_entropy,
        empty[1] if found.teacher_logprob is None else found.teacher_logprob,
        found.teacher_entropy,
        found.saved_statistics,
        student.new_full((0 if triton else 1,), found.has_neg_inf, dtype=torch.bool),
    )


@distillation_rows.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    beta_rows: Tensor | None,
    beta: float,
    temperature: float,
    student_softcap: float | None,
    teacher_softcap: float | None,
    vocab: int,
    inplace: bool,
    triton: bool,
    validate: bool,
) -> tuple[Tensor, ...]:
    dtype = checks.statistics_dtype((student, teacher))
    n_rows = student.shape[0]
    label_rows = 0 if labels is None else n_rows
    return (
        *(student.new_empty(size, dtype=dtype) for size in (n_rows, label_rows, n_rows, label_rows, n_rows)),
        student.new_empty((6, n_rows), dtype=dtype),
        student.new_empty((0 if triton else 1,), dtype=torch.bool),
    )


def distillation_gradient(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    beta_rows: Tensor | None,
    saved_statistics: Tensor,
    student_entropy: Tensor,
    has_neg_inf: Tensor,
    grad_divergence: Tensor | None,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    beta: float,
    temperature: float,
    student_softcap: float | None,
    teacher_softcap: float | None,
    vocab: int,
    triton: bool,
    *,
    inplace: bool,
) -> Tensor:
    """Gradient of the student's logits, [N, V_s] in their dtype, for what flows into the outputs, [N] each or None."""
    options = Options(beta if beta_rows is None else beta_rows, temperature, student_softcap, teacher_softcap)
    upstream = {
        name: None if value is None else value.to(saved_statistics.dtype).contiguous()
        for name, value in (
            ("grad_divergence", grad_divergence),
            ("grad_logprob", grad_logprob),
            ("grad_entropy", grad_entropy),
        )
    }
    columns = rows.Columns.whole(vocab)
    arguments = (student, teacher, labels, weights, options, columns, saved_statistics, student_entropy)
    out = student if inplace else None
    if triton:
        return on_triton.distillation_gradient(*arguments, out=out, **upstream)
    has_neg_inf = student.device.type != "cpu" or bool(has_neg_inf)  # elsewhere to look would make the host wait
    return rows.distillation_gradient(*arguments, has_neg_inf=has_neg_inf, out=out, **upstream)


gradient = gradient_operators("distillation_rows_backward", distillation_gradient, once=ONCE)
distillation_rows_backward, distillation_rows_backward_ = gradient.fresh, gradient.over
differentiate(
    distillation_rows,
    gradient,
    logits="student_logits",
    n_tensors=5,
    labels=2,
    saved=(5, 2, 6),
    flows=(0, 1, 2),
    logprob=1,
)
