"""The grid: what its axes are, the rows of one case, the truth about them, and by how much a result may be off."""

from __future__ import annotations

import zlib
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from helpers.oracle import log_probs, pairwise, statistics, weighted_mean
from helpers.row_oracle import logits

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VOCABS = (8, 1000, 1031, 32000)  # 32000: two chunks of columns
KINDS = ("normal", "peaked", "student_peaked", "teacher_peaked", "near")  # one live row each, in every case
AXES: dict[str, list] = {
    "dtype": list(DTYPES),
    "vocab": list(VOCABS),
    "beta": [0.0, 0.3, 0.5, 1.0, "rows"],
    "temperature": [0.7, 1.0, 2.0],
    "softcap": ["none", "student", "both"],
    # unlabelled: neither labels nor weights. labels: -100 marks rows that hold NaN. zeros: so do weights of 0.
    "weights": ["unlabelled", "labels", "zeros"],
}
SOFTCAPS = {"none": (None, None), "student": (20.0, None), "both": (20.0, 12.0)}
FIELDS = ("divergence", "student_logprob", "teacher_logprob", "student_entropy", "teacher_entropy")
DEAD = (1, 4)  # of seven rows, where a case has dead ones

# By how much a statistic in float32 may be off, relative to max(1, |it|).
VALUE = 4e-6
# Likewise a gradient, relative to the sum of its terms' magnitudes. The exponents u reach 40 (log2 units) before the
# softcap's factor; rounding one of 40 by half an ulp changes 2^u by 1.3e-6.
GRADIENT = 8e-6
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-25}  # half the distance of the least numbers


def grid(full: bool) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """The cases by (dtype, vocab): every combination, or few that hold every pair of values of two axes."""
    if full:
        cases = [dict(zip(AXES, values, strict=True)) for values in product(*AXES.values())]
    else:
        cases = pairwise(**AXES)
    return {(d, v): [c for c in cases if (c["dtype"], c["vocab"]) == (d, v)] for d in DTYPES for v in VOCABS}


class Batch(NamedTuple):
    """Arguments of one call."""

    student: Tensor
    teacher: Tensor
    labels: Tensor | None
    weights: Tensor | None
    live: Tensor  # [N] bool: rows of weight > 0
    options: dict[str, Any]


class Upstream(NamedTuple):
    """What flows into loss, divergence, student_logprob and student_entropy."""

    loss: float
    divergence: Tensor
    student_logprob: Tensor
    student_entropy: Tensor


def make(case: dict[str, Any], device: torch.device) -> tuple[Batch, Upstream]:
    """The rows of a case, and upstream gradients of either sign away from 0 and 1."""
    seed = zlib.crc32(repr(sorted(case.items())).encode())
    g = torch.Generator().manual_seed(seed)
    vocab, dtype = case["vocab"], DTYPES[case["dtype"]]
    sides = [logits(kind, 1, vocab, dtype, "cpu", seed=seed + i) for i, kind in enumerate(KINDS)]
    student, teacher = (torch.cat(rows) for rows in zip(*sides, strict=True))
    n = len(KINDS)
    live = torch.ones(n, dtype=torch.bool)
    labels = weights = None
    if case["weights"] != "unlabelled":
        n = len(KINDS) + len(DEAD)
        live = torch.ones(n, dtype=torch.bool)
        live[list(DEAD)] = False
        full = [torch.full((n, vocab), torch.nan, dtype=dtype) for _ in range(2)]
        full[0][live], full[1][live] = student, teacher
        student, teacher = full
        labels = torch.randint(0, vocab, (n,), generator=g)
        labels[0], labels[-1] = 0, vocab - 1
        if case["weights"] == "labels":
            labels[~live] = -100
        else:
            weights = (torch.rand(n, generator=g) + 0.25) * live
            labels[3] = -100  # of a row that counts: an explicit weight overrides the label's
    beta = torch.randint(0, 2, (n,), generator=g).float() if case["beta"] == "rows" else case["beta"]
    cap_s, cap_t = SOFTCAPS[case["softcap"]]
    options = {
        "beta": beta.to(device) if isinstance(beta, Tensor) else beta,
        "temperature": case["temperature"],
        "student_softcap": cap_s,
        "teacher_softcap": cap_t,
    }
    sign = torch.randint(0, 2, (3, n), generator=g) * 2.0 - 1
    flows = sign * (1.25 + torch.rand(3, n, generator=g))
    batch = Batch(
        student.to(device),
        teacher.to(device),
        None if labels is None else labels.to(device),
        None if weights is None else weights.to(device),
        live,
        options,
    )
    return batch, Upstream(-1.5, *flows)


class Truth(NamedTuple):
    fields: dict[str, Tensor]
    loss: Tensor
    gradient: Tensor
    magnitude: Tensor  # [N, V]: the gradient's terms, added up without their signs


def truth(batch: Batch, upstream: Upstream) -> Truth:
    """In float64, by autograd through the definitions. Dead rows give 0."""
    live = batch.live
    rows = {name: side.detach().cpu().double() for name, side in (("s", batch.student), ("t", batch.teacher))}
    for side in rows.values():
        side[~live] = 0.0
    student = rows["s"].requires_grad_()
    labels = None if batch.labels is None else batch.labels.cpu()
    options = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in batch.options.items()}
    found = statistics(student, rows["t"], labels, **options)
    weights = live.double() if batch.weights is None else batch.weights.cpu().double()
    loss = weighted_mean(found[0], weights)
    total = upstream.loss * loss
    for flow, value in ((upstream[1], found[0]), (upstream[2], found[1]), (upstream[3], found[3])):
        if value is not None:
            total = total + torch.where(live, flow.double() * value, 0.0).sum()
    (gradient,) = torch.autograd.grad(total, student)
    fields = {
        name: torch.where(live, value.detach(), 0.0)
        for name, value in zip(FIELDS, found, strict=True)
        if value is not None
    }
    flow = upstream.divergence.double() + upstream.loss * weights / weights.sum()
    return Truth(
        fields, loss.detach(), gradient, magnitude(student.detach(), rows["t"], labels, options, flow, upstream)
    )


def magnitude(student, teacher, labels, options, flow, upstream) -> Tensor:
    """[N, V] sum of the magnitudes of the terms whose sum is the gradient, from its closed form."""
    temperature, cap = options["temperature"], options["student_softcap"]
    ls, lt = (
        log_probs(z, temperature, options[f"{side}_softcap"])
        for z, side in ((student, "student"), (teacher, "teacher"))
    )
    ps, pt = ls.exp(), lt.exp()
    beta = options["beta"]
    if isinstance(beta, Tensor) or beta in (0, 1):
        ratio, share = ls - lt, 1.0
    else:
        b = torch.tensor(beta, dtype=torch.float64)
        ratio, share = ls - torch.logaddexp(b.log() + lt, (1 - b).log() + ls), 1 - beta
    reverse = beta.view(-1, 1) if isinstance(beta, Tensor) else float(beta > 0)
    terms = (1 - reverse) * (ps + pt) + reverse * share * ps * (ratio.abs() + (ps * ratio).sum(-1, keepdim=True).abs())
    found = flow.abs().view(-1, 1) * terms
    entropy = -(ps * ls).sum(-1, keepdim=True)
    found += upstream.student_entropy.double().abs().view(-1, 1) * ps * (ls.abs() + entropy)
    if labels is not None:
        rest = ps.clone()
        rest.scatter_add_(-1, labels.clamp(min=0).view(-1, 1), torch.ones_like(rest[:, :1]))
        found += upstream.student_logprob.double().abs().view(-1, 1) * rest
    slope = 1.0 if cap is None else 1 - (student / cap).tanh().square()
    return found * slope / temperature


def run(batch: Batch, upstream: Upstream, backend: str) -> tuple[Any, Tensor]:
    """The outputs of ``distillation_loss`` and the gradient of the student's logits."""
    from caop_fast import distillation_loss

    leaf = batch.student.clone().requires_grad_()
    out = distillation_loss(leaf, batch.teacher, batch.labels, weights=batch.weights, backend=backend, **batch.options)
    flows = [(out.loss, torch.tensor(upstream.loss)), (out.divergence, upstream.divergence)]
    flows += [(out.student_logprob, upstream.student_logprob)] if batch.labels is not None else []
    flows += [(out.student_entropy, upstream.student_entropy)]
    torch.autograd.backward(*zip(*((t, flow.to(t)) for t, flow in flows), strict=True))
    return out, leaf.grad


def complaints(batch: Batch, upstream: Upstream, backend: str) -> list[str]:
    """What is wrong with the results of one case."""
    out, gradient = run(batch, upstream, backend)
    want = truth(batch, upstream)
    wrong = []
    for name in FIELDS:
        got = getattr(out, name)
        if name not in want.fields:
            if got is not None:
                wrong.append(f"{name} without labels")
            continue
        exact = want.fields[name]
        error = (got.detach().cpu().double() - exact).abs() / exact.abs().clamp(min=1)
        if got.dtype != torch.float32 or not bool((error <= VALUE).all()):
            wrong.append(f"{name} {got.dtype} off by {error.tolist()} relative to {exact.tolist()}")
        if bool((got.detach().cpu()[~batch.live] != 0).any()):
            wrong.append(f"{name} is not 0 in rows of weight 0")
    error = float((out.loss.detach().cpu().double() - want.loss).abs() / want.loss.abs().clamp(min=1))
    if not error <= VALUE:
        wrong.append(f"loss off by {error}")
    got = gradient.cpu().double()
    dtype = gradient.dtype
    allowed = UNIT_ROUNDOFF[dtype] * want.gradient.abs() + GRADIENT * want.magnitude + SMALLEST[dtype]
    excess = (got - want.gradient).abs() / allowed.clamp(min=1e-300)
    excess = torch.where(batch.live.view(-1, 1), excess, 0.0)
    if dtype != batch.student.dtype or not bool((excess <= 1).all()):
        wrong.append(f"gradient off by {excess.amax(-1).tolist()} times what is allowed")
    if bool((got[~batch.live] != 0).any()):
        wrong.append("gradient is not 0 in rows of weight 0")
    return wrong
