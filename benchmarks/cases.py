"""The cases: shapes of real models, and the selections that a run measures, most important first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from benchmarks.records import Record, Shape

LINEAR = ("linear", "linear-topk", "linear-confidence", "linear-tokens")
LOGITS = ("logits", "topk", "confidence", "tokens")
SUITES = (*LOGITS, *LINEAR)
DISTILLATION = ("logits", "linear", "topk", "linear-topk")  # the suites that have a beta
TOP_K = 64  # ids that a sparse teacher lists
CANDIDATES = 21  # confidence values 0.00 ... 1.00

SIZES = (256, 1024, 4096, 8192, 32768)  # N
BETAS = (0.0, 0.5, 1.0)
MASKED = 0.4  # share of the tokens


@dataclass(frozen=True)
class Head:
    """A published output head: vocabulary size, features, and the softcap of its logits."""

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
LLAMA_2 = Head(32000, 4096)  # for the scaling with V: as many features as Qwen3-8B and Llama-3-8B


@dataclass(frozen=True)
class Case:
    """One set of inputs of one suite.

    Attributes:
        suite: one of ``SUITES``.
        model: whose head it is, or "small" where no published one fits the machine.
        n, v, h: tokens, vocabulary size, features (unused by losses on logits).
        dtype: "float32" or "bfloat16", of logits or of hidden states and heads.
        beta: of the divergence (unused by suites without one).
        head_trained: whether the head gets a gradient (unused by losses on logits).
        masked: share of the tokens whose label is -100.
        softcap: of both models' logits.
    """

    suite: str
    model: str
    n: int
    v: int
    h: int
    dtype: str
    beta: float = 0.0
    head_trained: bool = True
    masked: float = 0.0
    softcap: float | None = None

    @property
    def linear(self) -> bool:
        """Whether the loss takes hidden states and heads instead of logits."""
        return self.suite in LINEAR

    @property
    def kind(self) -> str:
        """The suite without "linear-"; "logits" for the dense distillation losses, on logits or not."""
        return {"linear": "logits"}.get(self.suite, self.suite.removeprefix("linear-"))

    @property
    def shape(self) -> Shape:
        """What applies to the suite."""
        return Shape(
            self.model,
            self.dtype,
            self.n,
            self.v,
            self.h if self.linear else None,
            beta=self.beta if self.suite in DISTILLATION else None,
            head_trained=self.head_trained if self.linear else None,
            masked=self.masked,
        )

    @property
    def name(self) -> str:
        """Unique within the suite."""
        shape = self.shape
        parts = [self.model, f"N={self.n}", f"V={self.v}"]
        parts += [] if shape.h is None else [f"H={shape.h}"]
        parts += [self.dtype]
        parts += [] if shape.beta is None else [f"beta={shape.beta:g}"]
        parts += ["frozen"] if shape.head_trained is False else []
        parts += [f"masked={self.masked:g}"] if self.masked else []
        return " ".join(parts)

    @property
    def products(self) -> int:
        """Matrix products of 2 N V H operations that the loss needs at least; 0 for losses on logits."""
        return 0 if not self.linear else (2 if self.suite == "linear" else 1) + 1 + self.head_trained

    def record(self, impl: str) -> Record:
        """The record of an implementation, nothing measured yet."""
        return Record(self.suite, self.name, impl, shape=self.shape)


def case(
    suite: str,
    model: str,
    n: int,
    dtype: str = "bfloat16",
    *,
    beta: float = 0.0,
    head_trained: bool = True,
    masked: float = 0.0,
) -> Case:
    """A case with the head of a published model."""
    head = HEADS[model]
    return Case(suite, model, n, head.vocab, head.hidden, dtype, beta, head_trained, masked, head.softcap)


def small(
    suite: str,
    n: int,
    v: int,
    h: int,
    dtype: str = "float32",
    *,
    beta: float = 0.0,
    head_trained: bool = True,
    masked: float = 0.0,
) -> Case:
    """A case for machines that are too small for a published head."""
    return Case(suite, "small", n, v, h, dtype, beta, head_trained, masked)


def gpu() -> list[Case]:
    """For a GPU, most important first: the cases of the targets, then each axis by itself, then all combinations."""
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
    for model in HEADS:  # at one N: scaling with V and H
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
    """All shapes of the distillation losses, then the other losses with their defaults."""
    for dtype, n, model in product(("bfloat16", "float32"), (8192, 4096, 1024, 256, 32768), HEADS):
        for beta, masked in product(BETAS, (0.0, MASKED)):
            yield case("logits", model, n, dtype, beta=beta, masked=masked)
            for trained in (True, False):
                yield case("linear", model, n, dtype, beta=beta, masked=masked, head_trained=trained)
    for dtype, n, model, suite in product(("bfloat16", "float32"), (8192, 1024, 32768), HEADS, SUITES):
        yield case(suite, model, n, dtype)


def cpu() -> list[Case]:
    """For a CPU: the vocabularies of real models with few features, and sweeps of N, V and H."""
    qwen = HEADS["Qwen3-8B"].vocab
    cases = [
        small("linear", 1024, qwen, 256),
        small("logits", 256, qwen, 256),
        *(small(suite, 128, qwen, 256) for suite in SUITES),
        *(small("linear", 128, qwen, 256, beta=beta) for beta in BETAS[1:]),
        small("linear", 128, qwen, 256, head_trained=False),
        small("linear", 128, qwen, 256, masked=MASKED),
        small("linear", 64, 32000, 64, dtype="bfloat16"),  # 100 times slower without AVX-512
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
    """Every suite once on a CPU, within two minutes."""
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
    """The cases of ``suites``, in their order."""
    wanted = set(suites)
    return [c for c in cases if c.suite in wanted]
