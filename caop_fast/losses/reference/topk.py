"""The mathematics of the loss against a sparse teacher, on blocks of rows, in plain PyTorch.

The teacher lists k ids with log-probabilities l_i from its full softmax. The student's logits z are complete, with
a = softcap(z)/T, p = softmax(a), L the listed ids and S = 1 - sum_L p the student's tail. The outcomes compared are

    bucket        the k ids and the tail, all other columns as one outcome
    renormalize   the k ids, both sides divided by their sums over L
    ignore        the k ids with their full-softmax probabilities; a partial sum

**Divergence.** With s = log p_s, t = log p_t of an outcome and r = t - s, the terms of the sum over outcomes are

    forward KL   p_t r - p_t + p_s        reverse KL   -p_s r - p_s + p_t        (ignore: p_t r and -p_s r)
    between      beta p_t (t - log m) + (1-beta) p_s (s - log m),   m = beta p_t + (1-beta) p_s

(the convention of GKD, arXiv 2306.13649). Over distributions the added p_s - p_t sum to 0; with them each term is
p_t (e^-r - 1 + r) >= 0, of second order in r, so that the rounding of the listed log-probabilities, which is of first
order in each r, cannot make a small KL wrong or negative.

**The student's tail** is a sum of its own over the columns that are not listed, relative to their own maximum: exact
also at e^-200. **The teacher's tail** is 1 - sum e^l_i with the largest entry apart, -expm1(l_max) - sum of the others,
which keeps what the log-probabilities carry. Their rounding may leave it <= 0; it is then taken as what that rounding
can resolve, eps/2 * sum p_i |l_i|, and as 0 where the student has no tail either.

**Gradient** with respect to a. With h_i the derivative of the divergence by log p_s,i as if the p_s,i were free,

    forward  -p_t      reverse  -p_s r (ignore: p_s (1 - r))      between  (1-beta) p_s (s - log m)      H = sum h

    bucket        listed h_i - p_i H      elsewhere q_j h_tail - p_j H,  q = softmax within the tail
    renormalize   listed h_i - p_i H      elsewhere 0
    ignore        listed h_i - p_i H      elsewhere -p_j H

    log p_s(y)    [j = y] - p_j           entropy   -p_j (log p_j + entropy)

then times 1/T and the softcap's derivative.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from caop_fast.losses.options import TopKOptions
from caop_fast.losses.reference.divergence import blank_labels, temper
from caop_kernels.constants import IGNORE_INDEX
from caop_kernels.listed_ids import repeated_ids

IMPOSSIBLE = -(2.0**64)  # a log-probability below this counts as -inf, so that finite masks act as -inf does
LOWEST = -(2.0**66)  # what stands for -inf in differences: two impossible outcomes then differ by 0
SERIES_TERMS = 17  # of e^-r - 1 + r at |r| <= 1/2: exact to float64


class Listed(NamedTuple):
    """The teacher's side of a block of rows."""

    valid: Tensor  # [R, k] bool: an id, not padding
    columns: Tensor  # [R, k] int64: a column of the row; padding repeats the row's first id (0 where it has none)
    first: Tensor  # [R, 1] int64: where that first id stands in the list
    ids: Tensor  # [R, k] as given
    logprobs: Tensor  # [R, k], -inf for padding
    resolution: float  # eps/2 of the dtype they came in


class Opened(NamedTuple):
    """A block's tempered logits: the listed ones apart, and everything else."""

    listed: Tensor  # [R, k], -inf for padding
    tail: Tensor  # [R, V] with -inf at the listed columns; owned
    slope: Tensor | None  # [R, V] derivative of the softcap


class SavedStatistics(NamedTuple):
    """[R, 1] columns: maxima and partition sums relative to them, of the whole row and of its tail.

    NaN where the list is bad.
    """

    shift: Tensor
    total: Tensor
    tail_shift: Tensor
    tail_total: Tensor


class Statistics(NamedTuple):
    """[R, 1] columns in nats; log-probabilities are None without labels."""

    divergence: Tensor
    student_logprob: Tensor | None
    student_entropy: Tensor
    teacher_logprob: Tensor | None
    teacher_entropy: Tensor


def list_teacher(ids: Tensor, logprobs: Tensor, vocab: int, dtype: torch.dtype) -> Listed:
    """Ids [R, k] and log-probabilities [R, k] in the form the rest takes; ids out of range select nothing."""
    valid = (ids >= 0) & (ids < vocab)
    first = valid.to(torch.uint8).argmax(-1, keepdim=True)
    inside = torch.where(valid, ids, 0).long()
    index = torch.where(valid, inside, inside.gather(-1, first))
    kept = torch.where(valid, logprobs.to(dtype), -math.inf)
    return Listed(valid, index, first, ids, kept, torch.finfo(logprobs.dtype).eps / 2)


def bad_lists(sorted_ids: Tensor, vocab: int) -> Tensor:
    """[R, 1] bool: whether the ids of a row, in the order of ``sort_ids``, hold one outside [-1, V), or one twice."""
    outside = (sorted_ids[:, :1] < -1) | (sorted_ids[:, -1:] >= vocab)
    return outside | repeated_ids(sorted_ids).any(-1, keepdim=True)


def open_rows(
    student: Tensor, listed: Listed, options: TopKOptions, dtype: torch.dtype, *, slope: bool = False
) -> Opened:
    """Split the tempered logits of raw rows [R, V] into the listed ones and the others."""
    a, derivative, owned = temper(student, options.temperature, options.softcap, dtype, consume=False, slope=slope)
    picked = a.gather(-1, listed.columns)
    some = listed.valid.any(-1, keepdim=True)
    blank = torch.where(some, -math.inf, picked)  # without any id the index is column 0, which keeps its value
    tail = a.scatter_(-1, listed.columns, blank) if owned else a.scatter(-1, listed.columns, blank)
    return Opened(picked.masked_fill(~listed.valid, -math.inf), tail, derivative)


def normalize(opened: Opened) -> tuple[SavedStatistics, Tensor]:
    """Maxima and partition sums of each row, and the student's entropy [R, 1]. Overwrites ``opened.tail``."""
    tail_shift = opened.tail.amax(-1, keepdim=True)
    shift = torch.maximum(tail_shift, opened.listed.amax(-1, keepdim=True))
    shift = torch.where(shift == -math.inf, 0.0, shift)
    tail_shift = torch.where(tail_shift == -math.inf, shift, tail_shift)
    tail_u, tail_e = shifted(opened.tail, tail_shift)
    u = (opened.listed - shift).clamp(min=LOWEST)
    e = u.exp()
    tail_total = tail_e.sum(-1, keepdim=True)
    below = tail_shift - shift
    fraction = below.exp()
    total = fraction * tail_total + e.sum(-1, keepdim=True)
    total = torch.where(total > 0, total, math.nan)  # no finite logit: no distribution
    moment = fraction * (tail_e.mul_(tail_u).sum(-1, keepdim=True) + tail_total * below)
    entropy = total.log() - (moment + (e * u).sum(-1, keepdim=True)) / total
    return SavedStatistics(shift, total, tail_shift, tail_total), entropy.clamp_(min=0)


def shifted(tail: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """u = tail - shift, at least LOWEST so that e * u is 0 where e is, and e = exp(u). Overwrites ``tail``."""
    u = tail.sub_(shift).clamp_(min=LOWEST)
    return u, u.exp()


def student_outcomes(opened: Opened, norm: SavedStatistics, options: TopKOptions) -> tuple[Tensor, Tensor]:
    """log p_s of the outcomes, [R, k + 1], the tail last (-inf where it is none); and of the k ids in full, [R, k]."""
    full = opened.listed - norm.shift - norm.total.log()
    if options.tail == "renormalize":
        top = opened.listed.amax(-1, keepdim=True)
        u = opened.listed - torch.where(top == -math.inf, 0.0, top)
        total = u.exp().sum(-1, keepdim=True)
        outcomes = u - torch.where(total == 0, 0.0, total.log())
        outcomes = torch.where(norm.total.isnan(), math.nan, outcomes)
    else:
        outcomes = full
    tail = norm.tail_total.log() + (norm.tail_shift - norm.shift) - norm.total.log()
    if options.tail != "bucket":
        tail = torch.full_like(tail, -math.inf)
    outcomes = torch.cat((outcomes, tail), -1)
    return torch.where(outcomes < IMPOSSIBLE, -math.inf, outcomes), full


def teacher_outcomes(listed: Listed, student_tail: Tensor, vocab: int, options: TopKOptions) -> Tensor:
    """log p_t of the outcomes, [R, k + 1], the tail last. ``student_tail``: the student's log-mass there, [R, 1]."""
    lp = torch.where(listed.logprobs < IMPOSSIBLE, -math.inf, listed.logprobs)
    top, hot = lp.max(-1, keepdim=True)
    if options.tail == "renormalize":
        u = lp - torch.where(top == -math.inf, 0.0, top)
        total = u.exp().sum(-1, keepdim=True)
        return torch.nn.functional.pad(u - torch.where(total == 0, 0.0, total.log()), (0, 1), value=-math.inf)
    if options.tail == "ignore":
        return torch.nn.functional.pad(lp, (0, 1), value=-math.inf)
    p = lp.exp()
    left = -torch.expm1(top) - p.scatter(-1, hot, 0.0).sum(-1, keepdim=True)
    resolved = listed.resolution * torch.where(p > 0, p * lp.abs(), 0.0).sum(-1, keepdim=True)
    columns_left = listed.valid.sum(-1, keepdim=True) < vocab
    none = ~columns_left | ((left <= resolved) & (student_tail == -math.inf))
    tail = torch.where(none, 0.0, torch.maximum(left, resolved))
    return torch.cat((lp, tail.log()), -1)


def exp_excess(r: Tensor) -> Tensor:
    """e^-r - 1 + r to full relative precision: r^2/2 (1 - r/3 (1 - r/4 (...))) for |r| <= 1/2."""
    x = r.clamp(-0.5, 0.5)
    series = torch.ones_like(x)
    for n in range(SERIES_TERMS, 2, -1):
        series = 1 - series * x / n
    return torch.where(r.abs() <= 0.5, x * x / 2 * series, torch.expm1(-r) + r)


def divergence_terms(s: Tensor, t: Tensor, options: TopKOptions) -> tuple[Tensor, Tensor]:
    """The terms of the divergence over outcomes and the h of the module docstring, [R, k + 1] each."""
    if isinstance(options.beta, Tensor):
        forward, reverse = (divergence_terms(s, t, options._replace(beta=b)) for b in (0.0, 1.0))
        chosen = [torch.where(options.beta == 1, r, f) for f, r in zip(forward, reverse, strict=True)]
        known = (options.beta == 0) | (options.beta == 1)
        return torch.where(known, chosen[0], math.nan), torch.where(known, chosen[1], math.nan)
    ps, pt = s.exp(), t.exp()
    r = t.clamp(min=LOWEST) - s.clamp(min=LOWEST)
    if options.beta == 0:
        terms = torch.where(pt > 0, pt * r, 0.0)
        if options.normalized:
            terms = torch.where(r.abs() <= 0.5, pt * exp_excess(r), terms - pt + ps)
        return torch.where((s == -math.inf) & (t > -math.inf), math.inf, terms), -pt
    if options.beta == 1:
        terms = torch.where(ps > 0, -ps * r, 0.0)
        slopes = terms if options.normalized else terms + ps
        if options.normalized:
            terms = torch.where(r.abs() <= 0.5, ps * exp_excess(-r), terms - ps + pt)
        infinite = (t == -math.inf) & (s > -math.inf)
        return torch.where(infinite, math.inf, terms), torch.where(infinite, math.inf, slopes)
    # The larger of the two exceeds m by -above; share is the weight of the smaller one.
    share = (r >= 0).to(r.dtype).mul_(1 - 2 * options.beta).add_(options.beta)
    above = torch.log1p(share * torch.expm1(-r.abs()))
    from_student = (1 - options.beta) * ps * -(above + r.clamp(min=0))
    from_teacher = options.beta * pt * -(above - r.clamp(max=0))
    return from_student + from_teacher, from_student


def row_statistics(
    opened: Opened, student: Tensor, listed: Listed, bad: Tensor, labels: Tensor | None, options: TopKOptions
) -> tuple[Statistics, SavedStatistics]:
    """Everything reported of raw rows [R, V], and what the gradient needs. Overwrites ``opened.tail``.

    ``bad``: of ``bad_lists``; NaN throughout such a row.
    """
    vocab = student.shape[-1]
    norm, entropy = normalize(opened)
    s, _ = student_outcomes(opened, norm, options)
    t = teacher_outcomes(listed, s[:, -1:], vocab, options)
    terms, _ = divergence_terms(s, t, options)
    divergence = terms.sum(-1, keepdim=True)
    # A NaN of either side reaches every term but those that `clamp` and `where` decided.
    broken = s.isnan().any(-1, keepdim=True) | t.isnan().any(-1, keepdim=True) | norm.total.isnan()
    divergence = torch.where(broken, math.nan, divergence.clamp(min=0) if options.normalized else divergence)
    pt = t.exp()
    teacher_entropy = torch.where(pt == 0, 0.0, -(pt * t)).sum(-1, keepdim=True)
    student_logprob: Tensor | None = None
    teacher_logprob: Tensor | None = None
    if labels is not None:
        column = labels.view(-1, 1)
        raw = student.gather(-1, column.clamp(0, vocab - 1))
        a, *_ = temper(raw, options.temperature, options.softcap, entropy.dtype, consume=True)
        student_logprob = _unless(bad, blank_labels(a - norm.shift - norm.total.log(), column, vocab))
        match = listed.valid & (listed.ids == column)
        picked = torch.where(match, listed.logprobs, 0.0).sum(-1, keepdim=True)
        picked = torch.where(match.any(-1, keepdim=True), picked, math.nan)
        teacher_logprob = _unless(bad, torch.where(column == IGNORE_INDEX, 0.0, picked))
    statistics = Statistics(
        _unless(bad, divergence),
        student_logprob,
        _unless(bad, entropy),
        teacher_logprob,
        _unless(bad, teacher_entropy.clamp(min=0)),
    )
    return statistics, SavedStatistics(*(_unless(bad, column) for column in norm))


def _unless(bad: Tensor, values: Tensor) -> Tensor:
    """``values`` [R, 1], NaN in the rows ``bad``."""
    return torch.where(bad, math.nan, values)


def logit_gradient(
    opened: Opened,
    norm: SavedStatistics,
    entropy: Tensor,
    listed: Listed,
    labels: Tensor | None,
    options: TopKOptions,
    *,
    grad_divergence: Tensor | None,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    """Gradient [R, V] with respect to ``a``, times the softcap's derivative. Overwrites ``opened``.

    The upstream gradients, [R, 1] or None, must already hold the factor 1/T. Columns of the tail are written relative
    to its own maximum, p_j = 2^.. being ``scale * exp(u_j)``, so a tail that underflows keeps its digits.
    """
    vocab = opened.tail.shape[-1]
    below = norm.tail_shift - norm.shift
    scale = below.exp() / norm.total
    s, full = student_outcomes(opened, norm, options)
    p = full.exp()
    value, constant, log = torch.zeros_like(full), torch.zeros_like(scale), None
    if grad_divergence is not None:
        t = teacher_outcomes(listed, s[:, -1:], vocab, options)
        _, h = divergence_terms(s, t, options)
        total = h.sum(-1, keepdim=True)
        broken = t.isnan().any(-1, keepdim=True) | (total == math.inf)  # a reverse KL of +inf has no gradient
        d = torch.where(broken & (grad_divergence != 0), math.nan, grad_divergence)
        value = value + flow(d, h[:, :-1] - s[:, :-1].exp() * total)
        if options.tail == "bucket":
            constant = flow(d, h[:, -1:] / norm.tail_total - scale * total)
        elif options.tail == "ignore":
            constant = flow(d, -scale * total)
    if grad_logprob is not None and labels is not None:
        label = blank_labels(grad_logprob, labels.view(-1, 1), vocab)
        value = value + torch.where(listed.ids == labels.view(-1, 1), label, 0.0) - flow(label, p)
        constant = constant - flow(label, scale)
    if grad_entropy is not None:
        value = value - flow(grad_entropy, torch.where(p > 0, p * (full + entropy), 0.0))
        constant = constant - flow(grad_entropy, scale * (below - norm.total.log() + entropy))
        log = -grad_entropy * scale
    constant = torch.where(norm.tail_total == 0, 0.0, constant)  # a tail of -inf alone

    u, gradient = shifted(opened.tail, norm.tail_shift)
    gradient.mul_(constant if log is None else u.mul_(log).add_(constant))
    if grad_logprob is not None and labels is not None:
        gradient.scatter_add_(-1, labels.view(-1, 1).clamp(0, vocab - 1), label)
    value = torch.where(listed.valid, value, value.gather(-1, listed.first))
    value = torch.where(listed.valid.any(-1, keepdim=True), value, gradient[:, :1])
    gradient.scatter_(-1, listed.columns, value)
    return gradient if opened.slope is None else gradient.mul_(opened.slope)


def flow(upstream: Tensor, values: Tensor) -> Tensor:
    """upstream * values, and 0 where nothing flows, so that an infinite value there does no harm."""
    return torch.where(upstream == 0, 0.0, upstream * values)
