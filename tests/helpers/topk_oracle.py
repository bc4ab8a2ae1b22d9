"""Float64 oracle of the loss against a sparse teacher, row by row from the definitions; and inputs to try it on."""

from __future__ import annotations

import decimal
import math

import torch
from torch import Tensor

NAMES = ("divergence", "student_logprob", "teacher_logprob", "student_entropy", "teacher_entropy")


def teacher_tail(logprobs: list[float], eps: float) -> float:
    """1 - sum exp(l) in 60 digits, at least eps/2 * sum p |l|."""
    with decimal.localcontext() as context:
        context.prec = 60
        finite = [decimal.Decimal(x) for x in logprobs if x > -math.inf]
        left = 1 - sum((x.exp() for x in finite), decimal.Decimal(0))
    return max(float(left), eps / 2 * sum(math.exp(x) * abs(x) for x in map(float, finite)))


def times(p: Tensor, v: Tensor) -> Tensor:
    """p * v with 0 * anything = 0, also in the gradient."""
    return torch.where(p > 0, p * torch.where(p > 0, v, 0.0), 0.0)


def one_row(z, ids, lp, eps, tail, beta, temperature, softcap):
    """(divergence, student log-probs [V], student entropy, {id: teacher log-prob}, teacher entropy) of one row."""
    a = (softcap * torch.tanh(z / softcap) if softcap else z) / temperature
    log_p = a - a.logsumexp(-1)
    listed = ids >= 0
    ids, lp = ids[listed], lp.double()[listed]
    s, t = log_p[ids], lp
    if tail == "renormalize":
        s, t = s - s.logsumexp(-1), t - t.logsumexp(-1)
    rest = torch.ones(len(a), dtype=torch.bool)
    rest[ids] = False
    if tail == "bucket" and rest.any():
        mass = torch.tensor([teacher_tail(lp.tolist(), eps)], dtype=torch.float64)
        s = torch.cat((s, (a[rest].logsumexp(-1) - a.logsumexp(-1)).view(1)))
        t = torch.cat((t, mass.log()))
    ps, pt = s.exp(), t.exp()
    # What an imperfectly normalised teacher leaves counts as in sum p log(p/q) - p + q.
    excess = 0.0 if tail == "ignore" else ps.sum() - pt.sum()
    if beta == 0:
        divergence = times(pt, t - s).sum() + excess
    elif beta == 1:
        divergence = times(ps, s - t).sum() - excess
    else:
        m = torch.logaddexp(math.log(beta) + t, math.log(1 - beta) + s)
        divergence = beta * times(pt, t - m).sum() + (1 - beta) * times(ps, s - m).sum()
    entropy = -times(log_p.exp(), log_p).sum()
    return divergence, log_p, entropy, dict(zip(ids.tolist(), lp.tolist(), strict=True)), -times(pt, t).sum()


def oracle(student, ids, logprobs, labels=None, *, tail="bucket", beta=0.0, temperature=1.0, student_softcap=None):
    """{name: [N] float64}, differentiable in ``student`` [N, V] float64."""
    rows = []
    for n in range(student.shape[0]):
        b = float(beta[n]) if isinstance(beta, Tensor) else beta
        eps = torch.finfo(logprobs.dtype).eps
        d, log_p, entropy, table, teacher_entropy = one_row(
            student[n], ids[n].long(), logprobs[n], eps, tail, b, temperature, student_softcap
        )
        label = -100 if labels is None else int(labels[n])
        ignored = torch.zeros((), dtype=torch.float64)
        rows.append(
            (
                d,
                ignored if label == -100 else log_p[label],
                ignored if label == -100 else torch.tensor(table.get(label, math.nan), dtype=torch.float64),
                entropy,
                teacher_entropy,
            )
        )
    return {name: torch.stack(column) for name, column in zip(NAMES, zip(*rows, strict=True), strict=True)}


def make(n, vocab, k, dtype=torch.float32, *, seed=0, peak=2.0, ragged=False, lp_dtype=None):
    """Student logits [n, vocab], ids [n, k], log-probabilities [n, k], labels [n] (every other one listed)."""
    g = torch.Generator().manual_seed(seed)
    student = peak * torch.randn(n, vocab, generator=g, dtype=torch.float64)
    teacher = (student + torch.randn(n, vocab, generator=g, dtype=torch.float64)).log_softmax(-1)
    ids = teacher.topk(k).indices
    ids = ids.gather(-1, torch.rand(n, k, generator=g).argsort(-1))  # in no order
    logprobs = teacher.gather(-1, ids).to(lp_dtype or (torch.float64 if dtype == torch.float64 else torch.float32))
    if ragged:
        for row in range(n):
            blank = torch.rand(k, generator=g) < row / max(n - 1, 1)  # the first row is full, the last empty
            ids[row, blank], logprobs[row, blank] = -1, math.nan
    labels = torch.randint(0, vocab, (n,), generator=g)
    for row in range(0, n, 2):
        if ids[row].max() >= 0:
            labels[row] = ids[row].max()
    return student.to(dtype), ids, logprobs, labels


def plain(student, ids, logprobs, labels, tail, beta, temperature):
    """Straightforward PyTorch with statistics in float32: the yardstick for errors. Returns divergence, entropy."""
    a = student.float() / temperature
    log_p = a.log_softmax(-1)
    s, t = log_p.gather(-1, ids), logprobs.float()
    if tail == "bucket":
        rest = a.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True) - a.logsumexp(-1, keepdim=True)
        left = (1 - t.exp().sum(-1, keepdim=True)).clamp(min=1e-12)
        s, t = torch.cat((s, rest), -1), torch.cat((t, left.log()), -1)
    elif tail == "renormalize":
        s, t = s.log_softmax(-1), t.log_softmax(-1)
    if beta in (0, 1):
        first, second = (s, t) if beta == 0 else (t, s)
        divergence = torch.nn.functional.kl_div(first, second, reduction="none", log_target=True).sum(-1)
    else:
        m = torch.logaddexp(math.log(beta) + t, math.log(1 - beta) + s)
        divergence = beta * (t.exp() * (t - m)).sum(-1) + (1 - beta) * (s.exp() * (s - m)).sum(-1)
    return divergence, -(log_p.exp() * log_p).sum(-1), log_p.gather(-1, labels[:, None]).squeeze(-1)
