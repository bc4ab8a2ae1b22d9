"""What is measured: shapes of real models, and the selections of them that a run takes, most important first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

LINEAR = ("linear", "linear-topk", "linear-confidence", "linear-tokens")
LOGITS = ("logits", "topk", "confidence", "tokens")
SUITES = (*LOGITS, *LINEAR)
DISTILLATION = ("logits", "linear", "topk", "linear-topk")  # those that have a beta
LISTED = 64  # k of the sparse teacher
CANDIDATES = 21  # confidence values 0.00 ... 1.00

SIZES = (256, 1024, 4096, 8192, 32768)  # N
BETAS = (0.0, 0.5, 1.0)
MASKED = 0.4


@dataclass(frozen=True)
class Head:
    """A published output head: V ids, H features, and the softcap of its logits."""

    vocab: int
    hidden: int
    softcap: float | None = None


HEADS = {
    "Qwen3-0.6B": Head(151936, 1024),
    "Qwen3-1.7B": Head(151936, 2048),
    "Qwen3-8B": Head(151936, 4096),
    "Llama-3-8B": Head(128256, 4096),
    "Gemma-2-2B": Head(256000, 2304, softcap=30.0),
}
LLAMA_2 = Head(32000, 4096)  # for the growth with V alone: the H of Qwen3-8B and Llama-3-8B with a small vocabulary


@dataclass(frozen=True)
class Case:
    """One set of inputs of one suite.

    Attributes:
        suite: of ``SUITES``.
        model: whose head it is, or "small" where no published one fits the machine.
        n, v, h: tokens, vocabulary, features (``h`` is None at logits level).
        dtype: "float32" or "bfloat16", of logits or of hidden states and heads.
        beta: of the divergence; None for suites without one.
        head_trained: the head gets a gradient; None at logits level.
        masked: share of the tokens whose label is -100.
        softcap: of both models' logits.
    """

    suite: str
    model: str
    n: int
    v: int
    h: int | None
    dtype: str
    beta: float | None = None
    head_trained: bool | None = None
    masked: float = 0.0
    softcap: float | None = None

    @property
    def linear(self) -> bool:
        return self.suite in LINEAR

    @property
    def name(self) -> str:
        """Unique within the suite."""
        parts = [self.model, f"N={self.n}", f"V={self.v}"]
        parts += [f"H={self.h}"] if self.linear else []
        parts += [self.dtype]
        parts += [] if self.beta is None else [f"beta={self.beta:g}"]
        parts += ["frozen"] if self.head_trained is False else []
        parts += [f"masked={self.masked:g}"] if self.masked else []
        return " ".join(parts)

    @property
    def units(self) -> int:
        """Matrix products of 2 N V H operations that cannot be left out (0 at logits level)."""
        if not self.linear:
            return 0
        return (2 if self.suite == "linear" else 1) + 1 + bool(self.head_trained)


def case(suite: str, model: str, n: int, dtype: str = "bfloat16", **options: object) -> Case:
    """A case with the head of ``model``; ``beta=0`` and a trained head where the suite has them."""
    head = HEADS[model]
    linear = suite in LINEAR
    made = Case(
        suite,
        model,
        n,
        head.vocab,
        head.hidden if linear else None,
        dtype,
        beta=0.0 if suite in DISTILLATION else None,
        head_trained=True if linear else None,
        softcap=head.softcap,
    )
    return replace(made, **options)


def small(suite: str, n: int, v: int, h: int, dtype: str = "float32", **options: object) -> Case:
    """A case that no published model has, for machines that are too small for one."""
    linear = suite in LINEAR
    made = Case(
        suite,
        "small",
        n,
        v,
        h if linear else None,
        dtype,
        beta=0.0 if suite in DISTILLATION else None,
        head_trained=True if linear else None,
    )
    return replace(made, **options)


def gpu() -> list[Case]:
    """Everything for a GPU, most important first: what the targets are about, then each axis by itself, then all."""
    return list(dict.fromkeys([*_targets(), *_axes(), *_product()]))


def _targets() -> Iterator[Case]:
    yield case("linear", "Qwen3-8B", 8192)
    yield case("logits", "Qwen3-8B", 8192)
    yield case("linear", "Qwen3-8B", 8192, head_trained=False)
    yield case("linear-tokens", "Qwen3-8B", 8192)
    yield case("tokens", "Qwen3-8B", 8192)
    yield case("topk", "Qwen3-8B", 8192)
    yield case("confidence", "Qwen3-8B", 1024)


def _axes() -> Iterator[Case]:
    for suite in ("linear", "logits"):
        for n in SIZES:
            yield case(suite, "Qwen3-8B", n)
    for suite in ("linear", "logits"):
        for beta in (0.5, 1.0):
            yield case(suite, "Qwen3-8B", 8192, beta=beta)
    yield case("linear", "Qwen3-8B", 8192, masked=MASKED)
    for suite in ("linear-topk", "linear-confidence"):
        yield case(suite, "Qwen3-8B", 8192 if suite == "linear-topk" else 1024)
    for model in HEADS:  # at one N, so V and H vary
        yield case("linear", model, 8192)
    yield replace(case("linear", "Llama-3-8B", 8192), model="Llama-2-7B", v=LLAMA_2.vocab)
    yield case("linear", "Qwen3-8B", 8192, dtype="float32")
    yield case("logits", "Qwen3-8B", 8192, dtype="float32")
    for n in SIZES:
        yield case("linear", "Qwen3-0.6B", n)
    for suite in ("tokens", "topk", "linear-tokens", "linear-topk"):
        for n in SIZES:
            yield case(suite, "Qwen3-8B", n)


def _product() -> Iterator[Case]:
    """All shapes of the distillation losses, then of the others with their defaults."""
    for dtype, n, model in product(("bfloat16", "float32"), (8192, 4096, 1024, 256, 32768), HEADS):
        for beta, masked in product(BETAS, (0.0, MASKED)):
            yield case("logits", model, n, dtype, beta=beta, masked=masked)
            for trained in (True, False):
                yield case("linear", model, n, dtype, beta=beta, masked=masked, head_trained=trained)
    for dtype, n, model, suite in product(("bfloat16", "float32"), (8192, 1024, 32768), HEADS, SUITES):
        yield case(suite, model, n, dtype)


def cpu() -> list[Case]:
    """For a CPU: the vocabularies of real models with few features, and a sweep of N, V and H each."""
    qwen = HEADS["Qwen3-8B"].vocab
    cases = [
        small("linear", 1024, qwen, 256),
        small("logits", 256, qwen, 256),
        *(small(suite, 128, qwen, 256) for suite in SUITES),
        *(small("linear", 128, qwen, 256, beta=beta) for beta in BETAS[1:]),
        small("linear", 128, qwen, 256, head_trained=False),
        small("linear", 128, qwen, 256, masked=MASKED),
        small("linear", 64, 32000, 64, dtype="bfloat16"),  # without AVX-512 a CPU multiplies these 100 times slower
        *(small("logits", 128, qwen, 256, beta=beta) for beta in BETAS[1:]),
        small("logits", 128, qwen, 256, masked=MASKED),
        small("logits", 128, qwen, 256, dtype="bfloat16"),
        case("linear", "Qwen3-0.6B", 128, "float32"),
        *(small("linear", n, 32000, 256) for n in (64, 128, 256, 512, 1024, 2048)),
        *(small("linear", 128, v, 256) for v in (8000, 16000, 64000, 128256)),
        *(small("linear", 128, 32000, h) for h in (64, 128, 512, 1024)),
        *(small("logits", n, 32000, 256) for n in (64, 128, 256, 512, 1024)),
        *(small("logits", 128, v, 256) for v in (8000, 16000, 64000)),
    ]
    return list(dict.fromkeys(cases))


def quick() -> list[Case]:
    """A look at every suite on a CPU, within two minutes."""
    return [
        small("logits", 64, 32000, 128),
        small("linear", 128, 32000, 128),
        small("linear", 64, 32000, 128, beta=0.5, head_trained=False, masked=MASKED),
        *(small(suite, 64, 32000, 128) for suite in SUITES if suite not in ("linear", "logits")),
    ]


def tiny() -> list[Case]:
    """Shapes for Triton's interpreter: every suite, both dtypes at logits level, every beta, masks, odd V."""
    return [
        *(small("logits", 6, 300, 16, beta=beta) for beta in BETAS),
        small("logits", 6, 301, 16, dtype="bfloat16", masked=MASKED),
        *(small("linear", 6, 300, 16, beta=beta) for beta in (0.0, 0.5)),
        small("linear", 6, 301, 16, head_trained=False, masked=MASKED),
        *(small(suite, 5, 300, 16) for suite in SUITES if suite not in ("linear", "logits")),
    ]


SELECTIONS = {"gpu": gpu, "cpu": cpu, "quick": quick, "tiny": tiny}


def of_suites(cases: Iterable[Case], suites: Iterable[str]) -> list[Case]:
    """Those of ``suites``, in their order."""
    wanted = set(suites)
    return [c for c in cases if c.suite in wanted]
