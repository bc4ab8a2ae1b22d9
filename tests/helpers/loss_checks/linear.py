"""Checks of ``linear_distillation_loss`` and ``linear_distillation_rows``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor

import caop_fast
from caop_fast import DistillationOutput
from helpers.loss_checks import definitions, samples
from helpers.loss_checks.check import Check, DenseOptions, Setting, Spec
from helpers.loss_checks.closeness import verify

ROWWISE = ("divergence", "student_logprob", "student_entropy")
LOSS_SPECS = (
    Spec(memory="balanced", labels=True),
    Spec("bfloat16", memory="balanced", vocab="even", labels=True),
    Spec("bfloat16", memory="min", beta=1.0, vocab="even"),
    Spec(memory="min", beta=0.3, temperature=0.7, chunk_size=130),
    Spec("bfloat16", memory="balanced", beta=0.3, weights="nan", labels=True, chunk_size=2),
    Spec(memory="balanced", beta=1.0, bias=True, scale=0.5, softcap=9.0, chunk_size=4, vocab="even"),
    Spec("bfloat16", memory="min", bias=True, scale=0.5, softcap=9.0, labels=True, weights="nan"),
    Spec("bfloat16", memory="balanced", vocab="large", logits="peaked", labels=True, beta=1.0, n=2),
    Spec(memory="balanced", shared=True, beta=0.3, labels=True),
    Spec("bfloat16", memory="min", shared=True, beta=1.0, vocab="even", scale=0.5),
    Spec("float16", memory="balanced", logits="peaked", vocab="even"),
    Spec("float16", memory="min", beta=0.3, labels=True),
    Spec(memory="balanced", logits="near"),
    Spec("bfloat16", memory="balanced", beta=1.0, frozen=True, reduction="sum", weights="nan"),
    Spec(memory="balanced", beta=0.3, logits="near", vocab="even", temperature=0.7),
    Spec(memory="balanced", beta="per token", labels=True, extra=11),
    Spec("bfloat16", memory="min", beta="per token", extra=16, vocab="even"),
    Spec(memory="min", frozen=True, reduction="sum", weights="nan", labels=True),
    Spec(memory="balanced", leading=True, labels=True),
    Spec(memory="balanced", n=0, labels=True),
    Spec("bfloat16", memory="balanced", n=1, beta=0.3, vocab="even"),
    Spec(memory="min", n=1, beta=1.0),
    Spec(memory="balanced", weights="zero"),
    Spec(memory="min", weights="zero", labels=True),
    Spec("bfloat16", memory="balanced", blocks=True, beta=0.3, weights="nan", labels=True),
    Spec("bfloat16", memory="min", vocab="large", beta=0.3, labels=True, rare=True),
    Spec("float16", memory="balanced", beta=1.0, weights="nan", chunk_size=5, rare=True),
    Spec("bfloat16", memory="min", beta=1.0, logits="near", rare=True),
    Spec("bfloat16", memory="balanced", beta=0.3, logits="near", shared=True, rare=True),
)
ROWS_SPECS = (
    Spec(flows=("divergence",), beta=1.0),
    Spec("bfloat16", flows=ROWWISE, labels=True, vocab="even"),
    Spec(flows=ROWWISE, labels=True, beta=0.3, weights="nan", chunk_size=2),
    Spec(flows=("student_logprob",), labels=True, bias=True, temperature=0.7),
    Spec(flows=ROWWISE, labels=True, blocks=True),
    Spec("bfloat16", flows=ROWWISE, labels=True, blocks=True, beta=0.3, weights="nan", bias=True, extra=11),
    Spec("bfloat16", flows=("student_entropy",), shared=True, softcap=9.0, vocab="even"),
    Spec("float16", flows=("divergence", "student_entropy"), beta="per token", labels=True, extra=11, frozen=True),
    Spec(n=0, labels=True, flows=ROWWISE),
    Spec("bfloat16", flows=ROWWISE, labels=True, vocab="large", beta=0.3, logits="peaked", rare=True),
)


def checks() -> Iterator[Check]:
    for spec in LOSS_SPECS:
        yield Check(f"linear_distillation_loss: {spec.named('beta')}", partial(distillation, spec), spec.rare)


def rows_checks() -> Iterator[Check]:
    for spec in ROWS_SPECS:
        yield Check(f"linear_distillation_rows: {spec.named('beta')}", partial(distillation, spec), spec.rare)


def distillation(spec: Spec, setting: Setting) -> None:
    """Loss, statistics, and gradients of hidden states, head and bias for one set of options."""
    device, g = setting.device, samples.generator(spec)
    n, vocab = spec.tokens(setting.sizes), spec.columns(setting.sizes)
    rows = samples.rows(spec, n, vocab, device, g)
    student, teacher = samples.projections(spec, setting, n, vocab, g, rows.off)
    options: DenseOptions = {
        "beta": rows.beta,
        "temperature": spec.temperature,
        "student_softcap": spec.softcap,
        "teacher_softcap": None if spec.softcap is None else 2 * spec.softcap,
    }
    leaves = {"student_hidden": student.hidden}
    if not spec.frozen:
        leaves["student_weight"] = student.weight
        if student.bias is not None:
            leaves["student_bias"] = student.bias
    call: Callable[..., DistillationOutput] = caop_fast.linear_distillation_rows
    if spec.memory:
        call = partial(caop_fast.linear_distillation_loss, memory=spec.memory, reduction=spec.reduction)

    def ours(given: dict[str, Tensor]) -> dict[str, Tensor | None]:
        weight = given.get("student_weight", student.weight)
        found = call(
            spec.shaped(given["student_hidden"]),
            weight,
            spec.shaped(teacher.hidden),
            weight if spec.shared else teacher.weight,
            None if rows.labels is None else spec.shaped(rows.labels),
            student_bias=given.get("student_bias", student.bias),
            teacher_bias=teacher.bias,
            student_scale=spec.scale,
            teacher_scale=1.5 * spec.scale,
            weights=rows.weights,
            vocab_size=vocab if spec.extra else None,
            chunk_size=spec.chunk_size,
            backend=setting.backend,
            **options,
        )._asdict()
        return spec.flattened(found)

    def defined(given: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden = given["student_hidden"]
        w = definitions.effective(rows.weights, rows.labels, hidden)
        weight = given.get("student_weight", student.weight.to(hidden.dtype))
        bias = given.get("student_bias", student.bias)
        teacher_weight = weight.detach() if spec.shared else teacher.weight
        found = definitions.dense(
            definitions.projected(definitions.clean(hidden, w), weight, bias, spec.scale)[:, :vocab],
            definitions.projected(
                definitions.clean(teacher.hidden.to(hidden.dtype), w), teacher_weight, teacher.bias, 1.5 * spec.scale
            )[:, :vocab],
            rows.labels,
            rows.weights,
            reduction=spec.reduction,
            **options,
        )
        return found if spec.memory else {k: v for k, v in found.items() if k != "loss"}

    with spec.block_sizes():
        verify(ours, defined, leaves, spec.flows, rows=True)
