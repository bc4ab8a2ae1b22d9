"""Checks of ``token_statistics`` and ``linear_token_statistics``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor

import caop_fast
from helpers.loss_checks import definitions, samples
from helpers.loss_checks.check import Check, Setting, Spec, TokenOptions
from helpers.loss_checks.closeness import verify

ALL = ("logprob", "entropy", "lse")
SPECS = (
    Spec(labels=True, flows=("logprob",)),
    Spec("bfloat16", labels=True, flows=ALL, vocab="even"),
    Spec("bfloat16", labels=True, flows=("logprob",), inplace=True, temperature=0.7, logits="peaked"),
    Spec(labels=True, flows=ALL, weights="nan", softcap=9.0),
    Spec("float16", flows=("entropy",), temperature=0.7),
    Spec(flows=("lse",), vocab="even", extra=16),
    Spec(flows=("entropy", "lse"), excluded="both", strided=True),
    Spec(n=0, labels=True, flows=ALL),
    Spec("bfloat16", n=1, labels=False, flows=("entropy",), vocab="even"),
    Spec("bfloat16", vocab="large", labels=True, flows=ALL, logits="peaked", n=2),
    Spec("float16", vocab="large", labels=True, flows=ALL, softcap=9.0, rare=True),
)
LINEAR_SPECS = (
    Spec(labels=True, flows=("logprob",)),
    Spec("bfloat16", labels=True, flows=ALL, vocab="even", weights="nan", chunk_size=2),
    Spec(labels=True, flows=ALL, bias=True, scale=0.5, softcap=9.0, temperature=0.7),
    Spec(labels=True, flows=ALL, blocks=True),
    Spec("float16", flows=("entropy",), frozen=True, vocab="even"),
    Spec("bfloat16", flows=("lse",), extra=11),
    Spec(n=0, labels=True, flows=ALL),
    Spec("bfloat16", vocab="large", labels=True, flows=ALL, logits="peaked", rare=True),
)


def checks() -> Iterator[Check]:
    for spec in SPECS:
        yield Check(f"token_statistics: {spec}", partial(logits, spec), spec.rare)


def linear_checks() -> Iterator[Check]:
    for spec in LINEAR_SPECS:
        yield Check(f"linear_token_statistics: {spec}", partial(linear, spec), spec.rare)


def logits(spec: Spec, setting: Setting) -> None:
    """From logits."""
    device, g = setting.device, samples.generator(spec)
    n, vocab = spec.tokens(setting.sizes), spec.columns(setting.sizes)
    rows = samples.rows(spec, n, vocab, device, g)
    leaf = samples.stored(samples.logits(spec, n, vocab + spec.extra, g)[0], spec, device, rows.off)
    leaf = samples.apart(leaf) if spec.strided else leaf
    options: TokenOptions = {"temperature": spec.temperature, "softcap": spec.softcap}

    def ours(leaves: dict[str, Tensor]) -> dict[str, Tensor | None]:
        z = samples.within(leaves["logits"]) if spec.strided else leaves["logits"]
        return caop_fast.token_statistics(
            z.clone() if spec.inplace else z, rows.labels, weights=rows.weights, inplace=spec.inplace,
            vocab_size=vocab if spec.extra else None, backend=setting.backend, **options,
        )._asdict()  # fmt: skip

    def defined(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        z = samples.within(leaves["logits"]) if spec.strided else leaves["logits"]
        return definitions.tokens(z[:, :vocab], rows.labels, rows.weights, **options)

    verify(ours, defined, {"logits": leaf}, spec.flows)


def linear(spec: Spec, setting: Setting) -> None:
    """From hidden states and a head."""
    device, g = setting.device, samples.generator(spec)
    n, vocab = spec.tokens(setting.sizes), spec.columns(setting.sizes)
    rows = samples.rows(spec, n, vocab, device, g)
    model, _ = samples.projections(spec, setting, n, vocab, g, rows.off)
    leaves = {"hidden": model.hidden}
    if not spec.frozen:
        leaves["weight"] = model.weight
        if model.bias is not None:
            leaves["bias"] = model.bias
    options: TokenOptions = {"temperature": spec.temperature, "softcap": spec.softcap}

    def ours(given: dict[str, Tensor]) -> dict[str, Tensor | None]:
        return caop_fast.linear_token_statistics(
            given["hidden"], given.get("weight", model.weight), rows.labels, bias=given.get("bias", model.bias),
            scale=spec.scale, weights=rows.weights, vocab_size=vocab if spec.extra else None,
            chunk_size=spec.chunk_size, backend=setting.backend, **options,
        )._asdict()  # fmt: skip

    def defined(given: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden = given["hidden"]
        hidden = definitions.clean(hidden, definitions.effective(rows.weights, rows.labels, hidden))
        weight, bias = given.get("weight", model.weight), given.get("bias", model.bias)
        z = definitions.projected(hidden, weight, bias, spec.scale)[:, :vocab]
        return definitions.tokens(z, rows.labels, rows.weights, **options)

    with spec.block_sizes():
        verify(ours, defined, leaves, spec.flows, rows=True)
