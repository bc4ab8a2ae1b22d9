"""Checks of ``distillation_loss`` and of the mergeable states, on logits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

import caop_fast
from helpers.loss_checks import definitions, samples
from helpers.loss_checks.check import Check, DenseOptions, Setting, Spec
from helpers.loss_checks.closeness import verify
from helpers.loss_checks.definitions import IGNORE_INDEX

ROWWISE = ("divergence", "student_logprob", "student_entropy")
SPECS = (
    Spec(labels=True),
    Spec("bfloat16", vocab="even"),
    Spec(beta=1.0, weights="nan", vocab="even"),
    Spec(beta=0.3, labels=True),
    Spec("bfloat16", vocab="large", logits="peaked", labels=True, n=2),
    Spec("bfloat16", beta=0.3, temperature=0.7, weights="nan", labels=True),
    Spec("float16", beta=1.0, softcap=9.0, labels=True, vocab="even"),
    Spec(logits="near"),
    Spec(beta=1.0, logits="near", vocab="even"),
    Spec(beta=0.3, logits="near", temperature=0.7),
    Spec(beta="per token", labels=True, temperature=0.7),
    Spec("bfloat16", beta="per token", weights="nan", vocab="even"),
    Spec("bfloat16", inplace=True, labels=True),
    Spec(beta=0.3, inplace=True, softcap=9.0, vocab="even"),
    Spec(labels=True, flows=("student_logprob",)),
    Spec(flows=("student_entropy",), vocab="even", softcap=9.0),
    Spec(beta=1.0, flows=("divergence",), temperature=0.7),
    Spec(labels=True, weights="nan", flows=ROWWISE),
    Spec("bfloat16", beta=0.3, labels=True, flows=("loss", *ROWWISE), vocab="even"),
    Spec("float16", labels=True, flows=ROWWISE, temperature=0.7),
    Spec(reduction="sum", weights="nan"),
    Spec(beta=1.0, reduction="none", labels=True),
    Spec(extra=11, labels=True),
    Spec("bfloat16", beta=0.3, extra=16, vocab="even", logits="peaked"),
    Spec(excluded="both", labels=True),
    Spec("bfloat16", beta=1.0, excluded="student", vocab="even"),
    Spec(excluded="teacher"),
    Spec(beta=0.3, excluded="student"),
    Spec(excluded="student", flows=()),
    Spec(beta=1.0, excluded="teacher", flows=()),
    Spec(strided=True, labels=True),
    Spec("bfloat16", beta=0.3, strided=True, vocab="even"),
    Spec(leading=True, labels=True, beta=1.0),
    Spec(n=0, labels=True),
    Spec("bfloat16", n=1, beta=0.3),
    Spec(n=1, logits="peaked", weights=None, vocab="even"),
    Spec(weights="zero", labels=True),
    Spec(vocab="large", beta=0.3, logits="peaked", labels=True),
    Spec("bfloat16", vocab="large", beta=1.0, flows=ROWWISE, labels=True, temperature=0.7, rare=True),
    Spec("float16", vocab="large", softcap=9.0, rare=True),
    Spec("bfloat16", beta=1.0, logits="near", rare=True),
    Spec("float16", beta=0.3, logits="peaked", weights="nan", rare=True),
    Spec(beta=1.0, logits="peaked", softcap=30.0, vocab="even", rare=True),
    Spec("bfloat16", beta=1.0, labels=True, flows=("student_entropy",), rare=True),
)


def checks() -> Iterator[Check]:
    for spec in SPECS:
        yield Check(f"distillation_loss: {spec.named('beta')}", partial(distillation, spec), spec.rare)


def state_checks() -> Iterator[Check]:
    for spec in STATES:
        yield Check(f"row_state, merge_states, finish_state: {spec}", partial(states, spec), spec.rare)


def distillation(spec: Spec, setting: Setting) -> None:
    """Loss, statistics and gradient for one set of options."""
    device, g = setting.device, samples.generator(spec)
    n, vocab = spec.tokens(setting.sizes), spec.columns(setting.sizes)
    rows = samples.rows(spec, n, vocab, device, g)
    student, teacher = samples.logits(spec, n, vocab + spec.extra, g)
    leaf = samples.stored(student, spec, device, rows.off)
    teacher = samples.stored(teacher, spec, device, rows.off)[:, :vocab]
    leaf = samples.apart(leaf) if spec.strided else leaf
    cap = spec.softcap
    options: DenseOptions = {
        "beta": rows.beta,
        "temperature": spec.temperature,
        "student_softcap": cap,
        "teacher_softcap": None if cap is None else 2 * cap,
    }

    def narrowed(leaves: dict[str, Tensor]) -> Tensor:
        return samples.within(leaves["student"]) if spec.strided else leaves["student"]

    def ours(leaves: dict[str, Tensor]) -> dict[str, Tensor | None]:
        logits = narrowed(leaves)
        logits = logits.clone() if spec.inplace else logits  # a leaf cannot be modified in place
        found = caop_fast.distillation_loss(
            spec.shaped(logits), spec.shaped(teacher), None if rows.labels is None else spec.shaped(rows.labels),
            weights=rows.weights, inplace=spec.inplace, vocab_size=vocab if spec.extra else None,
            reduction=spec.reduction, backend=setting.backend, **options,
        )._asdict()  # fmt: skip
        return spec.flattened(found)

    def defined(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        return definitions.dense(
            narrowed(leaves)[:, :vocab], teacher, rows.labels, rows.weights, reduction=spec.reduction, **options
        )

    verify(ours, defined, {"student": leaf}, spec.flows)


STATES = (
    Spec(labels=True, flows=()),
    Spec("bfloat16", labels=True, softcap=9.0, temperature=0.7, vocab="even", flows=()),
    Spec(labels=True, logits="near", vocab="even", flows=()),
    Spec("float16", labels=True, logits="peaked", flows=()),
    Spec("bfloat16", labels=True, vocab="large", flows=(), rare=True),
)


def states(spec: Spec, setting: Setting) -> None:
    """States of uneven shards, merged and finished, against the statistics of whole rows."""
    device, g = setting.device, samples.generator(spec)
    n, vocab = spec.tokens(setting.sizes), spec.columns(setting.sizes)
    labels = samples.rows(spec, n, vocab, device, g).labels
    assert labels is not None
    student, teacher = (samples.stored(t, spec, device) for t in samples.logits(spec, n, vocab, g))
    cuts = (0, 1, vocab // 3, vocab)

    def ours(leaves: dict[str, Tensor]) -> dict[str, Tensor | None]:
        shards = [
            caop_fast.row_state(
                leaves["student"][:, a:b], teacher[:, a:b],
                torch.where(labels == IGNORE_INDEX, IGNORE_INDEX, labels - a),
                temperature=spec.temperature, student_softcap=spec.softcap, teacher_softcap=spec.softcap,
                backend=setting.backend,
            )
            for a, b in pairwise(cuts)
        ]  # fmt: skip
        merged = caop_fast.merge_states(shards, backend=setting.backend)
        return caop_fast.finish_state(merged, labels, backend=setting.backend)._asdict()

    def defined(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        return definitions.states(leaves["student"], teacher, labels, spec.temperature, spec.softcap)

    verify(ours, defined, {"student": student}, ())
