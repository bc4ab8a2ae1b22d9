"""The mathematics of the distillation losses, on blocks of rows, in plain PyTorch.

With a = z_s/T and b = z_t/T the tempered logits of a row, p_s = softmax(a), p_t = softmax(b), r = log p_s - log p_t:

    forward KL   KL(t||s) = sum p_t (log p_t - log p_s)                       beta = 0
    reverse KL   KL(s||t) = sum p_s (log p_s - log p_t)                       beta = 1
    between      beta KL(t||m) + (1-beta) KL(s||m),  m = beta p_t + (1-beta) p_s     (generalised Jensen-Shannon)
    entropy      H = -sum p log p

(the convention of GKD, arXiv 2306.13649). Every gradient with respect to a has one form, with coefficients per row:

    da = p_s (A0 + A1 R + A2 log p_s) - A3 p_t + A4 [label]          R = r, or log p_s - log m for 0 < beta < 1

    forward KL   p_s - p_t                     log p_s(y)   [y] - p_s
    reverse KL   p_s (R - E_s R)               H_s          -p_s (log p_s + H_s)
    between      (1-beta) p_s (R - E_s R)

**Paired differences.** With the shifted logits u = a - max a, e = exp(u), Z = sum e for each side and x = u_t - u_s,

    lr  = log Z_s - log Z_t, taken as log1p(sum(e_s - e_t)/Z_t) unless the two differ much
    KL(t||s) = sum(e_t x)/Z_t + lr      KL(s||t) = -sum(e_s x)/Z_s - lr      H = log Z - sum(e u)/Z

Where the distributions are close x and lr are small numbers with small rounding errors, so a KL of 1e-6 keeps its
leading digits in float32; the textbook difference of two cross entropies (each near log V) would lose them all.

**Minus infinity.** A logit of -inf is an impossible token. A column that both sides exclude adds nothing; one that only
one side excludes makes the KL that weighs it by the other side +inf, also where that probability underflows to 0. The
same goes for finite masks, as in the Triton kernel: u below -2**100 counts as excluded, and so does a logit that lies
more than 2**64 octaves below the other side's. No finite divergence is larger than that.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from caop_fast.losses.options import DivergenceOptions
from caop_kernels.constants import IGNORE_INDEX

EXCLUDED = -(2.0**100)  # where u stands for "impossible": finite, so that two such columns differ by 0
SUPPORT_GAP = math.log(2) * 2.0**64  # a larger |u_t - u_s| means that only one side allows the column


class Block(NamedTuple):
    """[R, V] arrays of one block of rows: u = tempered logits - shift and e = exp(u) for both sides."""

    student_u: Tensor
    student_e: Tensor
    teacher_u: Tensor
    teacher_e: Tensor
    softcap_slope: Tensor | None  # derivative of the student's softcap


class RowStatistics(NamedTuple):
    """Everything known of each row: [R, 1] columns. ``total`` is sum exp(a - shift), so lse = shift + log(total)."""

    student_shift: Tensor
    student_total: Tensor
    teacher_shift: Tensor
    teacher_total: Tensor
    log_ratio: Tensor  # log(student_total) - log(teacher_total)
    divergence: Tensor
    mean_ratio: Tensor | None  # E_s[R] of the module docstring; None for forward KL, whose gradient does not need it
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_logprob: Tensor | None
    teacher_logprob: Tensor | None


class OpenedStatistics(NamedTuple):
    """The opened block of raw logits [R, V], its statistics, and whether -inf, NaN or masks are among the logits."""

    block: Block
    statistics: RowStatistics
    has_neg_inf: bool


class Coefficients(NamedTuple):
    """Coefficients [R, 1] of the gradient; None where a term is absent."""

    student: Tensor  # A0
    ratio: Tensor | None  # A1
    student_log: Tensor | None  # A2
    teacher: Tensor | None  # A3
    label: Tensor | None  # A4


def temper(
    logits: Tensor, temperature: float, softcap: float | None, dtype: torch.dtype, *, consume: bool, slope: bool = False
) -> tuple[Tensor, Tensor | None, bool]:
    """``softcap * tanh(logits / softcap) / temperature`` in ``dtype``; its softcap's derivative; whether it is ours.

    ``consume`` allows overwriting ``logits``.
    """
    scaled = logits.to(dtype)
    owned = consume or scaled is not logits
    derivative = None
    if softcap is not None:
        scaled = scaled.div_(softcap) if owned else scaled / softcap
        scaled.tanh_()
        owned = True
        if slope:
            derivative = (scaled * scaled).neg_().add_(1)
        scaled.mul_(softcap)
    if temperature != 1:
        scaled = scaled.div_(temperature) if owned else scaled / temperature
        owned = True
    return scaled, derivative, owned


def open_block(
    student: Tensor,
    teacher: Tensor,
    options: DivergenceOptions,
    dtype: torch.dtype,
    *,
    known: RowStatistics | None = None,
    consume: bool = False,
    slope: bool = False,
) -> tuple[Block, Tensor, Tensor]:
    """The arrays of a block of raw logits [R, V], and the two shifts [R, 1] (the maxima, or those ``known``)."""
    a, derivative, a_owned = temper(
        student, options.temperature, options.student_softcap, dtype, consume=consume, slope=slope
    )
    b, _, b_owned = temper(teacher, options.temperature, options.teacher_softcap, dtype, consume=consume)
    student_shift = a.amax(-1, keepdim=True) if known is None else known.student_shift
    teacher_shift = b.amax(-1, keepdim=True) if known is None else known.teacher_shift
    a = a.sub_(student_shift) if a_owned else a - student_shift
    b = b.sub_(teacher_shift) if b_owned else b - teacher_shift
    return Block(a, a.exp(), b, b.exp(), derivative), student_shift, teacher_shift


def weighted_sum(e: Tensor, values: Tensor, has_neg_inf: bool = False) -> Tensor:
    """sum e * values over each row, [R, 1]; ``has_neg_inf``: a term of e = 0 is 0 whatever its value."""
    terms = e * values
    if has_neg_inf:
        terms.masked_fill_(e == 0, 0)
    return terms.sum(-1, keepdim=True)


def totals(block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """sum e_s, sum e_t and the log of their quotient, [R, 1] each."""
    zs, zt = block.student_e.sum(-1, keepdim=True), block.teacher_e.sum(-1, keepdim=True)
    log_zs, log_zt = zs.log(), zt.log()
    difference = (block.student_e - block.teacher_e).sum(-1, keepdim=True)
    log_ratio = torch.where(difference.abs() <= zt / 2, (difference / zt).log1p(), log_zs - log_zt)
    return zs, zt, log_ratio


def contains_neg_inf(block: Block) -> bool:
    """Whether -inf, NaN or masks are among the logits. Always on accelerators: to look would make the host wait."""
    if block.student_u.device.type != "cpu":
        return True
    if block.student_u.numel() == 0:
        return False
    lowest = torch.minimum(block.student_u.amin(), block.teacher_u.amin())
    return not float(lowest) > -SUPPORT_GAP / 2  # NaN compares false


def row_statistics(
    block: Block, shifts: tuple[Tensor, Tensor], labels: Tensor | None, options: DivergenceOptions, *, has_neg_inf: bool
) -> RowStatistics:
    """Statistics of each row of a block. ``has_neg_inf``: as ``contains_neg_inf`` says."""
    us, es, ut, et, _ = block
    zs, zt, log_ratio = totals(block)
    log_zs, log_zt = zs.log(), zt.log()
    divergence, mean_ratio = divergences(block, zs, zt, log_ratio, options, has_neg_inf)
    return RowStatistics(
        student_shift=shifts[0],
        student_total=zs,
        teacher_shift=shifts[1],
        teacher_total=zt,
        log_ratio=log_ratio,
        divergence=divergence,
        mean_ratio=mean_ratio,
        student_entropy=log_zs - weighted_sum(es, us, has_neg_inf) / zs,
        teacher_entropy=log_zt - weighted_sum(et, ut, has_neg_inf) / zt,
        student_logprob=None if labels is None else label_logprob(us, log_zs, labels),
        teacher_logprob=None if labels is None else label_logprob(ut, log_zt, labels),
    )


def open_statistics(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    options: DivergenceOptions,
    dtype: torch.dtype,
    *,
    consume: bool = False,
    slope: bool = False,
) -> OpenedStatistics:
    """``open_block`` and ``row_statistics`` of raw logits [R, V]."""
    block, *shifts = open_block(student, teacher, options, dtype, consume=consume, slope=slope)
    has_neg_inf = contains_neg_inf(block)
    statistics = row_statistics(block, (shifts[0], shifts[1]), labels, options, has_neg_inf=has_neg_inf)
    return OpenedStatistics(block, statistics, has_neg_inf)


def divergences(
    block: Block, zs: Tensor, zt: Tensor, log_ratio: Tensor, options: DivergenceOptions, has_neg_inf: bool
) -> tuple[Tensor, Tensor | None]:
    """D(beta) and E_s[R], [R, 1] each. Never negative; NaN stays NaN."""
    es, et = block.student_e, block.teacher_e
    if options.interior:
        sums = mixture_sums(block, log_ratio, options, has_neg_inf=has_neg_inf)
        return finish_mixture(sums, torch.stack([zs, zt]), options)
    x = log_quotient(block, has_neg_inf)
    forward = reverse = mean_ratio = None
    if isinstance(options.beta, Tensor) or options.beta == 0:
        forward = (weighted_sum(et, x) / zt + log_ratio).clamp_(min=0)
        if has_neg_inf:
            forward.masked_fill_(x.amax(-1, keepdim=True) > SUPPORT_GAP, math.inf)
    if isinstance(options.beta, Tensor) or options.beta == 1:
        mean_ratio = -weighted_sum(es, x) / zs - log_ratio
        if has_neg_inf:
            mean_ratio.masked_fill_(x.amin(-1, keepdim=True) < -SUPPORT_GAP, math.inf)
        reverse = mean_ratio.clamp(min=0)
    return choose_divergence(options.beta, forward, reverse), mean_ratio


def log_quotient(block: Block, has_neg_inf: bool) -> Tensor:
    """x = u_t - u_s, [R, V]; ``has_neg_inf``: finite, 0 where both sides exclude a column and huge where one does."""
    if not has_neg_inf:
        return block.teacher_u - block.student_u
    return block.teacher_u.clamp(min=EXCLUDED).sub_(block.student_u.clamp(min=EXCLUDED))


def choose_divergence(beta: float | Tensor, forward: Tensor | None, reverse: Tensor | None) -> Tensor:
    """The KL that beta, 0 or 1, asks for; in a tensor any other entry gives NaN."""
    if isinstance(beta, Tensor):
        assert forward is not None
        assert reverse is not None
        column = beta.view_as(forward)
        return torch.where(column == 0, forward, torch.where(column == 1, reverse, math.nan))
    chosen = forward if beta == 0 else reverse
    assert chosen is not None
    return chosen


def mixture_excess(
    block: Block, log_ratio: Tensor, options: DivergenceOptions, has_neg_inf: bool
) -> tuple[Tensor, Tensor]:
    """log m - log p_s and log m - log p_t, [R, V], without overflow or underflow.

    With q = |r| the larger of the two log-probabilities exceeds the other by q, and log m lies above it by
    log1p(share * expm1(-q)), share being the weight of the smaller one in the mixture.
    """
    r = log_quotient(block, has_neg_inf).neg_().sub_(log_ratio)
    share = (r >= 0).to(r.dtype).mul_(2 * options.beta - 1).add_(1 - options.beta)  # beta or 1 - beta
    above_larger = r.abs().neg_().expm1_().mul_(share).log1p_()
    return above_larger - r.clamp(max=0), above_larger + r.clamp(min=0)


def mixture_sums(
    block: Block, log_ratio: Tensor, options: DivergenceOptions, *, has_neg_inf: bool | None = None
) -> Tensor:
    """sum e_s (log p_s - log m) and sum e_t (log p_t - log m), [2, R, 1]. Those of other columns are added to them."""
    if has_neg_inf is None:
        has_neg_inf = contains_neg_inf(block)
    from_student, from_teacher = mixture_excess(block, log_ratio, options, has_neg_inf)
    return torch.stack([-weighted_sum(block.student_e, from_student), -weighted_sum(block.teacher_e, from_teacher)])


def finish_mixture(sums: Tensor, totals: Tensor, options: DivergenceOptions) -> tuple[Tensor, Tensor]:
    """The interior divergence and E_s[R] of the sums of all columns, given both partition sums; [2, ...] both."""
    assert not isinstance(options.beta, Tensor)
    mean_ratio, mean_teacher = sums / totals
    return (options.beta * mean_teacher + (1 - options.beta) * mean_ratio).clamp_(min=0), mean_ratio


def label_logprob(u: Tensor, log_total: Tensor, labels: Tensor) -> Tensor:
    """log p(label), [R, 1]: 0 for the label -100, NaN for any other label outside the vocabulary."""
    column = labels.view(-1, 1)
    picked = u.gather(-1, column.clamp(0, u.shape[-1] - 1)) - log_total
    return blank_labels(picked, column, u.shape[-1])


def blank_labels(values: Tensor, column: Tensor, vocab: int) -> Tensor:
    """``values`` [R, 1] with 0 where the label is -100 and NaN where it is otherwise outside the vocabulary."""
    values = torch.where((column >= 0) & (column < vocab), values, math.nan)
    return torch.where(column == IGNORE_INDEX, 0.0, values)


def coefficients(
    rows: RowStatistics,
    options: DivergenceOptions,
    labels: Tensor | None,
    vocab: int,
    *,
    grad_divergence: Tensor | None = None,
    grad_logprob: Tensor | None = None,
    grad_entropy: Tensor | None = None,
) -> Coefficients | None:
    """Coefficients of the gradient, given those of the outputs ([R, 1] or None); None when nothing flows.

    The upstream gradients must already hold the constant factors between the raw logit and ``a`` (1/T).
    """
    terms: list[Tensor] = []
    ratio = student_log = teacher = label = None
    if grad_divergence is not None:
        forward, ratio = split_by_beta(grad_divergence, options.beta)
        if forward is not None:
            terms.append(forward)
            teacher = forward
        if ratio is not None and rows.mean_ratio is not None:
            undefined = rows.mean_ratio == math.inf  # a reverse KL of +inf has no gradient
            mean_ratio = rows.mean_ratio.masked_fill(undefined, math.nan)
            terms.append(-scaled_statistic(ratio, mean_ratio))
    if grad_logprob is not None and labels is not None:
        label = blank_labels(grad_logprob, labels.view(-1, 1), vocab)
        terms.append(-label)
    if grad_entropy is not None:
        student_log = -grad_entropy
        terms.append(-scaled_statistic(grad_entropy, rows.student_entropy))
    if not terms:
        return None
    return Coefficients(sum(terms[1:], start=terms[0]), ratio, student_log, teacher, label)


def split_by_beta(upstream: Tensor, beta: float | Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The parts of the divergence's upstream gradient that fall to p_s - p_t and to p_s (R - E_s R)."""
    if isinstance(beta, Tensor):
        column = beta.view(-1, 1)
        upstream = torch.where((column == 0) | (column == 1), upstream, math.nan)
        return torch.where(column == 1, 0.0, upstream), torch.where(column == 0, 0.0, upstream)
    if beta == 0:
        return upstream, None
    return None, upstream if beta == 1 else upstream * (1 - beta)


def scaled_statistic(upstream: Tensor, statistic: Tensor) -> Tensor:
    """upstream * statistic, and 0 where nothing flows, so that an infinite divergence elsewhere does no harm."""
    return torch.where(upstream == 0, 0.0, upstream * statistic)


def logit_gradient(
    block: Block,
    rows: RowStatistics,
    c: Coefficients,
    labels: Tensor | None,
    options: DivergenceOptions,
    *,
    has_neg_inf: bool,
) -> Tensor:
    """Gradient [R, V] with respect to ``a``, times the softcap's derivative. Overwrites the block.

    ``labels`` are relative to the block's first column; one that is not among its columns adds nothing here.

    Written with p = e/Z and log p = u - log Z, so constants of a row fold into its coefficients.
    """
    us, es, ut, et, slope = block
    bracket = None
    constant = c.student
    if c.ratio is not None:
        if options.interior:  # R = log p_s - log m
            bracket = mixture_excess(block, rows.log_ratio, options, has_neg_inf)[0].neg_().mul_(c.ratio)
        else:  # R = u_s - u_t - lr
            bracket = ut.sub_(us).mul_(-c.ratio)
            constant = constant - c.ratio * rows.log_ratio
            if has_neg_inf:
                bracket.masked_fill_(c.ratio == 0, 0)
    if c.student_log is not None:
        constant = constant - c.student_log * rows.student_total.log()
        logs = us.mul_(c.student_log)
        if has_neg_inf:
            logs.masked_fill_(c.student_log == 0, 0)
        bracket = logs if bracket is None else bracket.add_(logs)
    if bracket is None:
        gradient = es.mul_(constant / rows.student_total)
    else:
        bracket.add_(constant).div_(rows.student_total)
        if has_neg_inf:
            known = constant == constant  # a row without a gradient stays NaN
            known = known.logical_and(rows.student_total == rows.student_total)  # and one without a distribution
            bracket.masked_fill_((es == 0).logical_and_(known), 0)
        gradient = es.mul_(bracket)
    if c.teacher is not None:
        gradient.sub_(et.mul_(c.teacher / rows.teacher_total))
    if c.label is not None and labels is not None:
        add_at_labels(gradient, labels, c.label)
    return gradient if slope is None else gradient.mul_(slope)


def add_at_labels(gradient: Tensor, labels: Tensor, values: Tensor) -> None:
    """Add ``values`` [R, 1] to ``gradient`` [R, V] at the labels [R] that are among its columns."""
    column = labels.view(-1, 1)
    inside = (column >= 0) & (column < gradient.shape[-1])
    gradient.scatter_add_(-1, torch.where(inside, column, 0), torch.where(inside, values, 0.0))
