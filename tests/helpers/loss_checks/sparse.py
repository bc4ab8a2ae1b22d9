"""Checks of ``topk_distillation_loss`` and ``linear_topk_distillation_loss``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import caop_fast
from helpers.loss_checks import definitions, samples
from helpers.loss_checks.check import Check, Setting, Spec, TopkOptions
from helpers.loss_checks.closeness import verify

ROWWISE = ("divergence", "student_logprob", "student_entropy")
SPECS = (
    Spec(tail="bucket", labels=True),
    Spec("bfloat16", tail="bucket", beta=1.0, vocab="even", weights="nan"),
    Spec(tail="bucket", beta=0.3, temperature=0.7, softcap=9.0),
    Spec(tail="renormalize", labels=True, vocab="even"),
    Spec("bfloat16", tail="renormalize", beta=0.3, labels=True),
    Spec(tail="ignore", beta=1.0, padded=True),
    Spec("float16", tail="ignore", labels=True, vocab="even"),
    Spec(tail="bucket", padded=True, labels=True, flows=("loss", *ROWWISE)),
    Spec("bfloat16", tail="bucket", inplace=True, vocab="even", logits="peaked"),
    Spec(tail="renormalize", beta=1.0, padded=True, weights="nan", flows=ROWWISE, labels=True),
    Spec(tail="bucket", beta="per token", extra=11, reduction="none"),
    Spec(tail="ignore", beta=0.3, strided=True, reduction="sum"),
    Spec(n=0, labels=True),
    Spec("bfloat16", n=1, beta=1.0),
    Spec(weights="zero"),
    Spec("bfloat16", vocab="large", labels=True, logits="peaked", n=2),
    Spec("bfloat16", vocab="large", beta=0.3, temperature=0.7, rare=True),
    Spec("float16", tail="renormalize", beta=1.0, vocab="even", softcap=9.0, rare=True),
)
LINEAR_SPECS = (
    Spec(tail="bucket", labels=True),
    Spec("bfloat16", tail="bucket", beta=1.0, vocab="even", weights="nan", chunk_size=2),
    Spec(tail="renormalize", beta=0.3, bias=True, scale=0.5, softcap=9.0),
    Spec("bfloat16", tail="ignore", labels=True, frozen=True, temperature=0.7),
    Spec("float16", tail="bucket", beta="per token", padded=True, vocab="even", extra=16, reduction="sum"),
    Spec(n=0, labels=True),
    Spec("bfloat16", n=1, beta=0.3),
    Spec("bfloat16", vocab="large", labels=True, logits="peaked", rare=True),
)


def checks() -> Iterator[Check]:
    for spec in SPECS:
        yield Check(f"topk_distillation_loss: {spec.named('beta', 'tail')}", partial(logits, spec), spec.rare)


def linear_checks() -> Iterator[Check]:
    for spec in LINEAR_SPECS:
        yield Check(f"linear_topk_distillation_loss: {spec.named('beta', 'tail')}", partial(linear, spec), spec.rare)


def listed_half(rows: samples.Rows, ids: Tensor) -> samples.Rows:
    """In every other row with a label, one that the teacher lists."""
    if rows.labels is None:
        return rows
    known = (rows.labels >= 0) & (ids[:, 0] >= 0) & (torch.arange(len(ids), device=ids.device) % 2 == 0)
    return dataclasses.replace(rows, labels=torch.where(known, ids[:, 0], rows.labels))


def options_of(spec: Spec, rows: samples.Rows) -> TopkOptions:
    return {
        "tail": spec.tail,
        "beta": rows.beta,
        "temperature": spec.temperature,
        "student_softcap": spec.softcap,
        "reduction": spec.reduction,
    }


def logits(spec: Spec, setting: Setting) -> None:
    """From logits."""
    device, g = setting.device, samples.generator(spec)
    n, vocab = spec.tokens(setting.sizes), spec.columns(setting.sizes)
    rows = samples.rows(spec, n, vocab, device, g)
    student, teacher = samples.logits(spec, n, vocab + spec.extra, g)
    ids, logprobs = (t.to(device) for t in samples.teacher_list(spec, teacher[:, :vocab], setting.sizes.listed, g))
    rows = listed_half(rows, ids)
    leaf = samples.stored(student, spec, device, rows.off)
    leaf = samples.apart(leaf) if spec.strided else leaf
    options = options_of(spec, rows)

    def ours(leaves: dict[str, Tensor]) -> dict[str, Tensor | None]:
        z = samples.within(leaves["student"]) if spec.strided else leaves["student"]
        return caop_fast.topk_distillation_loss(
            z.clone() if spec.inplace else z, ids, logprobs, rows.labels, weights=rows.weights, inplace=spec.inplace,
            vocab_size=vocab if spec.extra else None, backend=setting.backend, **options,
        )._asdict()  # fmt: skip

    def defined(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        z = samples.within(leaves["student"]) if spec.strided else leaves["student"]
        return definitions.sparse(z[:, :vocab], ids, logprobs, rows.labels, rows.weights, **options)

    verify(ours, defined, {"student": leaf}, spec.flows)


def linear(spec: Spec, setting: Setting) -> None:
    """From hidden states and a head."""
    device, g = setting.device, samples.generator(spec)
    n, vocab = spec.tokens(setting.sizes), spec.columns(setting.sizes)
    rows = samples.rows(spec, n, vocab, device, g)
    student, teacher = samples.projections(spec, setting, n, vocab, g, None)
    teacher_logits = (teacher.hidden.double() @ teacher.weight.double().t()).cpu()
    ids, logprobs = (t.to(device) for t in samples.teacher_list(spec, teacher_logits, setting.sizes.listed, g))
    rows = listed_half(rows, ids)
    hidden = student.hidden if rows.off is None else student.hidden.masked_fill(rows.off.unsqueeze(-1), float("nan"))
    leaves = {"student_hidden": hidden}
    if not spec.frozen:
        leaves["student_weight"] = student.weight
        if student.bias is not None:
            leaves["student_bias"] = student.bias
    options = options_of(spec, rows)

    def ours(given: dict[str, Tensor]) -> dict[str, Tensor | None]:
        return caop_fast.linear_topk_distillation_loss(
            given["student_hidden"], given.get("student_weight", student.weight), ids, logprobs, rows.labels,
            student_bias=given.get("student_bias", student.bias), student_scale=spec.scale, weights=rows.weights,
            vocab_size=vocab if spec.extra else None, chunk_size=spec.chunk_size, backend=setting.backend, **options,
        )._asdict()  # fmt: skip

    def defined(given: dict[str, Tensor]) -> dict[str, Tensor]:
        z = definitions.clean(
            given["student_hidden"], definitions.effective(rows.weights, rows.labels, given["student_hidden"])
        )
        weight, bias = given.get("student_weight", student.weight), given.get("student_bias", student.bias)
        z = definitions.projected(z, weight, bias, spec.scale)[:, :vocab]
        return definitions.sparse(z, ids, logprobs, rows.labels, rows.weights, **options)

    verify(ours, defined, leaves, spec.flows, rows=True)
