"""Checks of ``confidence_loss``, ``confidence_loss_from_logprobs`` and ``linear_confidence_loss``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import caop_fast
from helpers.loss_checks import definitions, samples
from helpers.loss_checks.check import Check, ScoreOptions, Setting, Spec
from helpers.loss_checks.closeness import FACTOR, verify

ALL = ("loss", "expected", "variance", "outside_mass")
CANDIDATES = 21
# The Brier score's gradient is a multiple of E - target, so one rounding error decides about a whole row: with few rows
# plain PyTorch's error may happen to be small in all of them.
FACTORS = {"brier": 16.0}


@dataclass(frozen=True)
class Score:
    """How the candidates are scored."""

    kind: str = "cross_entropy"
    outside_weight: float = 1.0
    eps: float = 1e-6

    def __str__(self) -> str:
        return f"{self.kind}, outside_weight {self.outside_weight:g}"

    def options(self, reduction: str) -> ScoreOptions:
        return {
            "kind": self.kind, "outside_weight": self.outside_weight, "eps": self.eps, "reduction": reduction,
        }  # fmt: skip


BRIER, EXPECTED, BERNOULLI = Score("brier", 0.0), Score("expected_brier", 0.5), Score("bernoulli_nll")
CASES = (
    (Score(), Spec()),
    (Score("brier"), Spec("bfloat16", vocab="even", temperature=0.7)),
    (EXPECTED, Spec(weights="nan", softcap=9.0)),
    (BERNOULLI, Spec("float16", reduction="sum")),
    (BRIER, Spec(logits="peaked", vocab="even")),
    (Score(outside_weight=0.0), Spec("bfloat16", flows=ALL, weights="nan")),
    (BERNOULLI, Spec(flows=ALL, extra=11, reduction="none")),
    (EXPECTED, Spec("bfloat16", flows=("expected", "variance"), vocab="even")),
    (BRIER, Spec(flows=("outside_mass",), strided=True)),
    (Score(), Spec(n=0)),
    (Score(), Spec("bfloat16", n=1)),
    (BERNOULLI, Spec(weights="zero")),
    (Score(), Spec("bfloat16", vocab="large", n=2, logits="peaked")),
    (EXPECTED, Spec("float16", vocab="large", flows=ALL, rare=True)),
)
LOGPROB_CASES = (
    (Score(), Spec()),
    (Score("brier"), Spec("bfloat16", weights="nan")),
    (EXPECTED, Spec("float16", flows=ALL)),
    (BERNOULLI, Spec(reduction="sum", flows=ALL)),
    (BRIER, Spec(reduction="none")),
    (Score(), Spec(n=0)),
)
LINEAR_CASES = (
    (Score(), Spec()),
    (Score("brier"), Spec("bfloat16", vocab="even", weights="nan", chunk_size=2)),
    (EXPECTED, Spec(bias=True, scale=0.5, softcap=9.0, flows=ALL)),
    (BERNOULLI, Spec("float16", frozen=True, temperature=0.7, reduction="sum")),
    (Score(), Spec("bfloat16", n=1, extra=11)),
    (Score(), Spec(n=0)),
    (Score(), Spec("bfloat16", vocab="large", logits="peaked", rare=True)),
)


def checks() -> Iterator[Check]:
    for score, spec in CASES:
        yield Check(f"confidence_loss: {score}, {spec}", partial(logits, score, spec), spec.rare)


def logprob_checks() -> Iterator[Check]:
    for score, spec in LOGPROB_CASES:
        yield Check(f"confidence_loss_from_logprobs: {score}, {spec}", partial(logprobs, score, spec), spec.rare)


def linear_checks() -> Iterator[Check]:
    for score, spec in LINEAR_CASES:
        yield Check(f"linear_confidence_loss: {score}, {spec}", partial(linear, score, spec), spec.rare)


@dataclass(frozen=True)
class Scored:
    """Candidates in random order, and the targets, the first of which is a candidate's value."""

    ids: Tensor
    values: Tensor
    target: Tensor


def scored(n: int, vocab: int, off: Tensor | None, device: torch.device, g: torch.Generator) -> Scored:
    ids = torch.randperm(vocab, generator=g)[:CANDIDATES].to(device)
    values = torch.linspace(0, 1, CANDIDATES)[torch.randperm(CANDIDATES, generator=g)].to(device)
    target = torch.rand(n, generator=g).to(device)
    target[:1] = 0.25
    return Scored(ids, values, target if off is None else target.masked_fill(off, float("nan")))


def logits(score: Score, spec: Spec, setting: Setting) -> None:
    """From logits."""
    device, g = setting.device, samples.generator((score, spec))
    n, vocab = spec.tokens(setting.sizes), spec.columns(setting.sizes)
    weights = samples.rows(spec, n, vocab, device, g)
    found = scored(n, vocab, weights.off, device, g)
    student, _ = samples.logits(spec, n, vocab + spec.extra, g)
    if spec.logits == "peaked":  # at the candidates, as in a trained model
        student[:, found.ids.cpu()] += samples.PEAK
    leaf = samples.stored(student, spec, device, weights.off)
    leaf = samples.apart(leaf) if spec.strided else leaf
    options = score.options(spec.reduction)

    def ours(leaves: dict[str, Tensor]) -> dict[str, Tensor | None]:
        return caop_fast.confidence_loss(
            samples.within(leaves["logits"]) if spec.strided else leaves["logits"],
            found.ids, found.values, found.target, weights=weights.weights, temperature=spec.temperature,
            softcap=spec.softcap, vocab_size=vocab if spec.extra else None, backend=setting.backend, **options,
        )._asdict()  # fmt: skip

    def defined(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        z = samples.within(leaves["logits"]) if spec.strided else leaves["logits"]
        return _of_logits(z[:, :vocab], spec, found, weights, options)

    verify(ours, defined, {"logits": leaf}, spec.flows, factor=FACTORS.get(score.kind, FACTOR))


def _of_logits(z: Tensor, spec: Spec, found: Scored, weights: samples.Rows, options: ScoreOptions) -> dict[str, Tensor]:
    z = definitions.clean(z, definitions.effective(weights.weights, None, z))
    log_p = definitions.log_softmax(definitions.tempered(z, spec.temperature, spec.softcap))[:, found.ids]
    return definitions.confidence(log_p, found.values, found.target, weights.weights, **options)


def logprobs(score: Score, spec: Spec, setting: Setting) -> None:
    """From the candidates' log-probabilities."""
    device, g = setting.device, samples.generator((score, spec))
    n = spec.tokens(setting.sizes)
    weights = samples.rows(spec, n, CANDIDATES, device, g)
    found = scored(n, CANDIDATES, weights.off, device, g)
    log_p = (2 * torch.randn(n, CANDIDATES + 3, generator=g, dtype=torch.float64)).log_softmax(-1)[:, :CANDIDATES]
    leaf = samples.stored(log_p, spec, device, weights.off)
    options = score.options(spec.reduction)

    def ours(leaves: dict[str, Tensor]) -> dict[str, Tensor | None]:
        return caop_fast.confidence_loss_from_logprobs(
            leaves["candidate_logprobs"], found.values, found.target, weights=weights.weights,
            backend=setting.backend, **options,
        )._asdict()  # fmt: skip

    def defined(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        given = leaves["candidate_logprobs"]
        return definitions.confidence(given, found.values, found.target, weights.weights, **options)

    verify(ours, defined, {"candidate_logprobs": leaf}, spec.flows, factor=FACTORS.get(score.kind, FACTOR))


def linear(score: Score, spec: Spec, setting: Setting) -> None:
    """From hidden states and a head."""
    device, g = setting.device, samples.generator((score, spec))
    n, vocab = spec.tokens(setting.sizes), spec.columns(setting.sizes)
    weights = samples.rows(spec, n, vocab, device, g)
    found = scored(n, vocab, weights.off, device, g)
    model, _ = samples.projections(spec, setting, n, vocab, g, weights.off)
    leaves = {"hidden": model.hidden}
    if not spec.frozen:
        leaves["weight"] = model.weight
        if model.bias is not None:
            leaves["bias"] = model.bias
    options = score.options(spec.reduction)

    def ours(given: dict[str, Tensor]) -> dict[str, Tensor | None]:
        return caop_fast.linear_confidence_loss(
            given["hidden"], given.get("weight", model.weight), found.ids, found.values, found.target,
            bias=given.get("bias", model.bias), scale=spec.scale, softcap=spec.softcap, weights=weights.weights,
            temperature=spec.temperature, vocab_size=vocab if spec.extra else None, chunk_size=spec.chunk_size,
            backend=setting.backend, **options,
        )._asdict()  # fmt: skip

    def defined(given: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden = given["hidden"]
        hidden = definitions.clean(hidden, definitions.effective(weights.weights, None, hidden))
        weight, bias = given.get("weight", model.weight), given.get("bias", model.bias)
        z = definitions.projected(hidden, weight, bias, spec.scale)[:, :vocab]
        return _of_logits(z, spec, found, weights, options)

    verify(ours, defined, leaves, spec.flows, rows=True)
