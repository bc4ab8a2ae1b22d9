"""Row statistics in float64 from the definitions, and inputs to try them on. Shares nothing with the kernels."""

from __future__ import annotations

import torch

FIELDS = (
    "forward_kl",
    "reverse_kl",
    "student_lse",
    "teacher_lse",
    "student_logprob",
    "teacher_logprob",
    "student_entropy",
    "teacher_entropy",
)


def oracle(student, teacher, labels=None, *, temperature=1.0, student_softcap=None, teacher_softcap=None):
    """{field: [N] float64}; columns that both sides exclude (-inf) contribute nothing."""

    def scaled(logits, cap):
        z = logits.double().cpu()
        return (cap * torch.tanh(z / cap) if cap else z) / temperature

    a, b = scaled(student, student_softcap), scaled(teacher, teacher_softcap)
    la, lb = a.log_softmax(-1), b.log_softmax(-1)
    pa, pb = la.exp(), lb.exp()

    def kl(p, lp, lq):
        term = p * (lp - lq)
        term = torch.where(lp.isneginf(), 0.0, term)  # also where both are -inf
        term = torch.where(lq.isneginf() & ~lp.isneginf(), torch.inf, term)
        return term.sum(-1)

    def entropy(p, lp):
        return -torch.where(lp.isneginf(), 0.0, p * lp).sum(-1)

    out = {
        "forward_kl": kl(pb, lb, la),
        "reverse_kl": kl(pa, la, lb),
        "student_lse": a.logsumexp(-1),
        "teacher_lse": b.logsumexp(-1),
        "student_entropy": entropy(pa, la),
        "teacher_entropy": entropy(pb, lb),
    }
    if labels is not None:
        y = labels.cpu()
        inside = (y >= 0) & (y < a.shape[1])
        picked = y.clamp(0, a.shape[1] - 1)[:, None]
        for name, lp in (("student_logprob", la), ("teacher_logprob", lb)):
            value = torch.where(inside, lp.gather(1, picked)[:, 0], torch.nan)
            out[name] = torch.where(y == -100, 0.0, value)
    return out


def plain(student, teacher, labels, *, temperature=1.0):
    """The same in ordinary PyTorch operations in float32: the yardstick for rounding errors."""
    a, b = student.float() / temperature, teacher.float() / temperature
    la, lb = a.log_softmax(-1), b.log_softmax(-1)
    return {
        "forward_kl": torch.nn.functional.kl_div(la, lb, reduction="none", log_target=True).sum(-1),
        "reverse_kl": torch.nn.functional.kl_div(lb, la, reduction="none", log_target=True).sum(-1),
        "student_lse": a.logsumexp(-1),
        "teacher_lse": b.logsumexp(-1),
        "student_logprob": la.gather(1, labels[:, None])[:, 0],
        "teacher_logprob": lb.gather(1, labels[:, None])[:, 0],
        "student_entropy": -(la.exp() * la).sum(-1),
        "teacher_entropy": -(lb.exp() * lb).sum(-1),
    }


def logits(kind: str, n: int, v: int, dtype: torch.dtype, device, seed: int = 0):
    """(student [n, v], teacher [n, v]) of one of the shapes that distributions take in training."""
    g = torch.Generator().manual_seed(seed)
    a = 2.0 * torch.randn(n, v, generator=g, dtype=torch.float64)
    b = 2.0 * torch.randn(n, v, generator=g, dtype=torch.float64)
    hot = torch.randint(0, v, (n,), generator=g)
    rows = torch.arange(n)
    if kind == "near":  # the teacher is an average of the student
        b = a + 1e-3 * b
    elif kind in ("peaked", "student_peaked", "teacher_peaked"):
        # Not higher: beyond 36 nats float64 itself rounds 1 - p(hot) away, and the oracle with it.
        if kind != "teacher_peaked":
            a[rows, hot] += 15.0
        if kind != "student_peaked":
            b[rows, hot] += 15.0
        if kind == "student_peaked":
            b *= 0.1
        if kind == "teacher_peaked":
            a *= 0.1
    elif kind == "large":  # logits around 1e4
        a, b = a * 10 + 1e4, b * 10 - 1e4
    elif kind != "normal":
        raise ValueError(kind)
    return a.to(dtype).to(device), b.to(dtype).to(device)
