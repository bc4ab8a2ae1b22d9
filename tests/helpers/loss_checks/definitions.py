"""The losses written from their definitions, in the dtype of their inputs: float64 gives the reference values.

In float32 they show the rounding error to be expected of plain PyTorch. Only PyTorch's ``log_softmax`` and autograd are
used, nothing of caop_fast. Statistics are not weighted, and 0 in rows of weight 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from benchmarks import inputs

IGNORE_INDEX = -100
ABSENT = -1e4  # in place of -inf: its exponential is 0 too, but the difference of two is 0 instead of NaN


_terms: ContextVar[list[Tensor] | None] = ContextVar("terms", default=None)


@contextmanager
def terms_of_gradients() -> Iterator[list[Tensor]]:
    """Collects the magnitude of the terms whose difference each row's gradient is, [N, 1], in a backward inside.

    Through y = log_softmax(a) the gradient is dy - p sum(dy), whose two terms nearly cancel for models that are near.
    """
    found: list[Tensor] = []
    token = _terms.set(found)
    try:
        yield found
    finally:
        _terms.reset(token)


def log_softmax(a: Tensor) -> Tensor:
    y, found = a.log_softmax(-1), _terms.get()
    if found is not None and y.requires_grad and y.numel():

        def see(dy: Tensor) -> None:
            terms = dy.abs() + y.detach().exp() * dy.sum(-1, keepdim=True).abs()
            found.append(terms.amax(-1, keepdim=True))

        y.register_hook(see)
    return y


def tempered(logits: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """softcap(z) / T, with ``ABSENT`` for -inf."""
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return torch.where(logits == -torch.inf, ABSENT, z / temperature)


def projected(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Logits scale * (hidden W^T + bias) in the dtype of the hidden states."""
    logits = hidden @ weight.to(hidden.dtype).t()
    return scale * (logits if bias is None else logits + bias.to(hidden.dtype))


def effective(weights: Tensor | None, labels: Tensor | None, like: Tensor) -> Tensor:
    """The weights of the rows of ``like`` [N, ...]: as given, or 0 where the label is -100, or 1."""
    if weights is not None:
        return weights.to(like.dtype)
    if labels is not None:
        return (labels != IGNORE_INDEX).to(like.dtype)
    return torch.ones(like.shape[0], dtype=like.dtype, device=like.device)


def clean(rows: Tensor, w: Tensor) -> Tensor:
    """``rows`` [N, ...] with 0 where the weight is 0, even for NaN."""
    return torch.where((w == 0).unsqueeze(-1), 0.0, rows)


def reduced(rows: Tensor, w: Tensor, reduction: str) -> Tensor:
    """sum(w D) / sum(w), sum(w D), or w D."""
    if reduction == "none":
        return w * rows
    total = (w * rows).sum()
    return total / w.sum().clamp(min=1e-30) if reduction == "mean" else total


def masked(found: dict[str, Tensor], w: Tensor) -> dict[str, Tensor]:
    """Statistics [N] with 0 where the weight is 0."""
    return {name: torch.where(w == 0, 0.0, value) for name, value in found.items()}


def picked(log_p: Tensor, labels: Tensor) -> Tensor:
    """log p(label), 0 where the label is -100."""
    value = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    value = torch.where(value < ABSENT / 2, -torch.inf, value)
    return torch.where(labels == IGNORE_INDEX, 0.0, value)


def entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)


def divergence(log_s: Tensor, log_t: Tensor, beta: float | Tensor) -> Tensor:
    """That of the benchmarks, or with a tensor of zeros and ones that of each row."""
    if not isinstance(beta, Tensor):
        return inputs.divergence(log_s, log_t, beta)
    return torch.where(beta == 1, inputs.divergence(log_s, log_t, 1.0), inputs.divergence(log_s, log_t, 0.0))


def dense(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    *,
    beta: float | Tensor,
    temperature: float,
    student_softcap: float | None,
    teacher_softcap: float | None,
    reduction: str,
) -> dict[str, Tensor]:
    """The outputs of a distillation loss for logits [N, V]."""
    w = effective(weights, labels, student)
    student, teacher = clean(student, w), clean(teacher.to(student.dtype), w)
    log_s = log_softmax(tempered(student, temperature, student_softcap))
    log_t = log_softmax(tempered(teacher, temperature, teacher_softcap))
    rows = divergence(log_s, log_t, beta)
    if not isinstance(beta, Tensor) and beta in (0, 1):  # -inf on one side only
        only = (student if beta == 0 else teacher) == -torch.inf
        only = only & ((teacher if beta == 0 else student) > -torch.inf)
        rows = torch.where(only.any(-1), torch.inf, rows)
    found = {"divergence": rows, "student_entropy": entropy(log_s), "teacher_entropy": entropy(log_t)}
    if labels is not None:
        found |= {"student_logprob": picked(log_s, labels), "teacher_logprob": picked(log_t, labels)}
    return {"loss": reduced(rows, w, reduction), **masked(found, w)}


def states(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, softcap: float | None
) -> dict[str, Tensor]:
    """The statistics of finished states of whole rows."""
    a, b = tempered(student, temperature, softcap), tempered(teacher.to(student.dtype), temperature, softcap)
    log_s, log_t = log_softmax(a), log_softmax(b)
    return {
        "forward_kl": divergence(log_s, log_t, 0.0),
        "reverse_kl": divergence(log_s, log_t, 1.0),
        "student_lse": a.logsumexp(-1),
        "teacher_lse": b.logsumexp(-1),
        "student_logprob": picked(log_s, labels),
        "teacher_logprob": picked(log_t, labels),
        "student_entropy": entropy(log_s),
        "teacher_entropy": entropy(log_t),
    }


def tokens(
    logits: Tensor, labels: Tensor | None, weights: Tensor | None, *, temperature: float, softcap: float | None
) -> dict[str, Tensor]:
    """Log-probability, entropy, log-sum-exp [N]."""
    w = effective(weights, labels, logits)
    a = tempered(clean(logits, w), temperature, softcap)
    found = {"entropy": entropy(log_softmax(a)), "lse": a.logsumexp(-1)}
    if labels is not None:
        found["logprob"] = picked(log_softmax(a), labels)
    return masked(found, w)


def sparse(
    student: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    *,
    tail: str,
    beta: float | Tensor,
    temperature: float,
    student_softcap: float | None,
    reduction: str,
) -> dict[str, Tensor]:
    """The outputs of a top-k loss for logits [N, V], ids [N, k] (-1 pads) and log-probabilities [N, k]."""
    w = effective(weights, labels, student)
    log_s = log_softmax(tempered(clean(student, w), temperature, student_softcap))
    valid = ids >= 0
    log_t = torch.where(valid, logprobs.to(student.dtype), ABSENT)
    s, t = outcomes(log_s, ids, log_t, tail)
    rows = divergence(s, t, beta)
    found = {"divergence": rows, "student_entropy": entropy(log_s), "teacher_entropy": entropy(t)}
    if labels is not None:
        found["student_logprob"] = picked(log_s, labels)
        match = valid & (ids == labels.unsqueeze(-1))
        known = torch.where(match, log_t, 0.0).sum(-1)
        known = torch.where(match.any(-1), known, torch.nan)
        found["teacher_logprob"] = torch.where(labels == IGNORE_INDEX, 0.0, known)
    return {"loss": reduced(rows, w, reduction), **masked(found, w)}


def outcomes(log_s: Tensor, ids: Tensor, log_t: Tensor, tail: str) -> tuple[Tensor, Tensor]:
    """Both models' log-probabilities of the listed ids, and with tail "bucket" of all other ids as one more outcome."""
    valid = ids >= 0
    listed = torch.where(valid, log_s.gather(-1, ids.clamp(min=0)), ABSENT)
    if tail == "renormalize":
        return log_softmax(listed), log_softmax(log_t)
    if tail != "bucket":
        return listed, log_t
    columns = torch.where(valid, ids, log_s.shape[-1])  # padding marks a column past the last
    other = torch.ones(len(ids), log_s.shape[-1] + 1, dtype=torch.bool, device=ids.device)
    other = other.scatter(-1, columns, False)[:, :-1]
    rest_s = torch.where(other, log_s, ABSENT).logsumexp(-1, keepdim=True)
    rest_t = torch.log1p(-log_t.exp().sum(-1, keepdim=True))
    return torch.cat([listed, rest_s], -1), torch.cat([log_t, rest_t], -1)


def confidence(
    log_p: Tensor,
    values: Tensor,
    target: Tensor,
    weights: Tensor | None,
    *,
    kind: str,
    outside_weight: float,
    eps: float,
    reduction: str,
) -> dict[str, Tensor]:
    """The outputs of a confidence loss for log-probabilities [N, C] of the candidates under the full softmax."""
    w = effective(weights, None, log_p)
    v, y = values.to(log_p.dtype), clean(target.to(log_p.dtype).unsqueeze(-1), w).squeeze(-1)
    log_p = clean(log_p, w)
    inside = log_p.logsumexp(-1)
    log_q = log_p - inside.unsqueeze(-1)
    q = log_q.exp()
    expected = (q * v).sum(-1)
    if kind == "cross_entropy":
        score = -(split(v, y) * log_q).sum(-1)
    elif kind == "brier":
        score = (expected - y) ** 2
    elif kind == "expected_brier":
        score = (q * (v - y.unsqueeze(-1)) ** 2).sum(-1)
    else:
        e = expected.clamp(eps, 1 - eps)
        score = -(y * e.log() + (1 - y) * (1 - e).log())
    rows = score - outside_weight * inside
    variance = (q * (v - expected.unsqueeze(-1)) ** 2).sum(-1)
    found = masked({"expected": expected, "variance": variance, "outside_mass": -torch.expm1(inside)}, w)
    return {"loss": reduced(torch.where(w == 0, 0.0, rows), w, reduction), **found}


def split(values: Tensor, target: Tensor) -> Tensor:
    """Target distribution [N, C]: linear interpolation between neighbouring values, constant beyond the ends."""
    ordered, order = values.sort()
    y = target.clamp(ordered[0], ordered[-1]).unsqueeze(-1)
    step = ordered.diff()
    rising = ((y - ordered[:-1]) / step).clamp(0, 1)  # from one value to the next
    one = torch.ones_like(y)
    mass = torch.cat([one, rising], -1) - torch.cat([rising, 0 * one], -1)
    return torch.zeros_like(mass).scatter(-1, order.expand_as(mass), mass)


def soft_ece(
    stated: Tensor, correct: Tensor, weights: Tensor | None, *, n_bins: int, temperature: float
) -> dict[str, Tensor]:
    """Soft-binned calibration error; a NaN confidence has weight 0."""
    w = effective(weights, None, stated) * ~stated.isnan()
    c, y = (torch.where(w == 0, 0.0, x) for x in (stated, correct.to(stated.dtype)))
    centres = (torch.arange(n_bins, dtype=c.dtype, device=c.device) + 0.5) / n_bins
    member = (-((c.unsqueeze(-1) - centres) ** 2) / temperature).softmax(-1)
    return {"error": (member * (w * (c - y)).unsqueeze(-1)).sum(0).abs().sum() / w.sum()}
