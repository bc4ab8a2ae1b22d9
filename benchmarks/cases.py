"""The cases: shapes of real models, and the selections that a run measures, most important first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

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
# Published output heads: vocabulary size, features, and the softcap of the logits.
HEADS: dict[str, tuple[int, int, float | None]] = {
    "Qwen3-0.6B": (151936, 1024, None),
    "Qwen3-1.7B": (151936, 2048, None),
    "Qwen3-8B": (151936, 4096, None),
    "Llama-3-8B": (128256, 4096, None),
    "Llama-2-7B": (32000, 4096, None),
    "Gemma-2-2B": (256000, 2304, 30.0),
}


@dataclass(frozen=True)
class Case:
    """One set of inputs of one suite."""

    suite: str  # one of ``SUITES``
    model: str  # whose head it is, or "small" where no published one fits the machine
    n: int  # tokens
    v: int  # vocabulary size
    h: int  # features (unused by losses on logits)
    dtype: str  # "float32" or "bfloat16", of logits or of hidden states and heads
    beta: float = 0.0  # of the divergence (unused by suites without one)
    head_trained: bool = True  # whether the head gets a gradient (unused by losses on logits)
    masked: float = 0.0  # share of the tokens whose label is -100
    softcap: float | None = None  # of both models' logits

    @property
    def linear(self) -> bool:
        """Whether the loss takes hidden states and heads instead of logits."""
        return self.suite in LINEAR

    @property
    def kind(self) -> str:
        """The suite without "linear-"; "logits" for the dense distillation losses, on logits or not."""
        return "logits" if self.suite == "linear" else self.suite.removeprefix("linear-")

    @property
    def shape(self) -> Shape:
        """What applies to the suite."""
        h, head_trained = (self.h, self.head_trained) if self.linear else (None, None)
        beta = self.beta if self.suite in DISTILLATION else None
        return Shape(self.model, self.dtype, self.n, self.v, h, beta, head_trained, self.masked)

    @property
    def name(self) -> str:
        """Unique within the suite."""
        shape, parts = self.shape, [self.model, f"N={self.n}", f"V={self.v}"]
        parts += [*([] if shape.h is None else [f"H={shape.h}"]), self.dtype]
        parts += [] if shape.beta is None else [f"beta={shape.beta:g}"]
        parts += ["frozen"] if shape.head_trained is False else []
        return " ".join([*parts, f"masked={self.masked:g}"] if self.masked else parts)

    @property
    def unmasked(self) -> int:
        """Number of tokens that count, about."""
        return max(1, round(self.n * (1 - self.masked)))

    @property
    def products(self) -> int:
        """Matrix products of 2 N V H operations that the loss needs at least; 0 for losses on logits."""
        return 0 if not self.linear else (2 if self.suite == "linear" else 1) + 1 + self.head_trained

    @property
    def input_bytes(self) -> int:
        """Bytes of the inputs and of their gradients, without what is small."""
        models = 2 if self.kind == "logits" else 1
        of_tokens, of_heads = (models + 1) * self.n, (models + self.head_trained) * self.v
        return ((of_tokens + of_heads) * self.h if self.linear else of_tokens * self.v) * self.itemsize

    @property
    def itemsize(self) -> int:
        return {"float32": 4, "bfloat16": 2}[self.dtype]

    def record(self, impl: str) -> Record:
        """The record of an implementation, nothing measured yet."""
        return Record(self.suite, self.name, impl, shape=self.shape)


def case(suite: str, model: str, n: int, dtype: str = "bfloat16", **options: Any) -> Case:
    """A case with the head of a published model; ``options``: beta, head_trained, masked."""
    vocab, hidden, softcap = HEADS[model]
    return replace(Case(suite, model, n, vocab, hidden, dtype, softcap=softcap), **options)


def small(suite: str, n: int, v: int, h: int, dtype: str = "float32", **options: Any) -> Case:
    """A case for machines that are too small for a published head."""
    return replace(Case(suite, "small", n, v, h, dtype), **options)


def targets() -> list[Case]:
    """The reference cases of a GPU."""
    heads = product(("Qwen3-8B", "Qwen3-0.6B"), (True, False))
    first, *others = [case("linear", model, 8192, head_trained=trained) for model, trained in heads]
    return [first, case("logits", "Qwen3-8B", 8192), *others]


def sweep() -> list[Case]:
    """The number of tokens by itself."""
    return [case(suite, "Qwen3-8B", n) for suite in ("linear", "logits") for n in SIZES]


def rest() -> list[Case]:
    """Every other axis by itself, the other losses, and then all combinations, for as long as there is time."""
    return list(dict.fromkeys(_rest()))


def _rest() -> Iterator[Case]:
    yield from (case(suite, "Qwen3-8B", 8192) for suite in ("linear-tokens", "tokens", "topk", "linear-topk"))
    yield from (case(suite, "Qwen3-8B", 1024) for suite in ("confidence", "linear-confidence"))
    yield from (case(suite, "Qwen3-8B", 8192, beta=beta) for suite in ("linear", "logits") for beta in BETAS[1:])
    yield case("linear", "Qwen3-8B", 8192, masked=MASKED)
    yield from (case("linear", model, 8192) for model in HEADS)  # at one N: scaling with V and H
    yield from (case(suite, "Qwen3-8B", 8192, "float32") for suite in ("linear", "logits"))
    yield from (case("linear", "Qwen3-0.6B", n) for n in SIZES)
    yield from (case(s, "Qwen3-8B", n) for s in ("tokens", "topk", "linear-tokens", "linear-topk") for n in SIZES)
    for dtype, n, model in product(("bfloat16", "float32"), (8192, 4096, 1024, 256, 32768), HEADS):
        for beta, masked in product(BETAS, (0.0, MASKED)):
            yield case("logits", model, n, dtype, beta=beta, masked=masked)
            for trained in (True, False):
                yield case("linear", model, n, dtype, beta=beta, masked=masked, head_trained=trained)
    for dtype, n, model, suite in product(("bfloat16", "float32"), (8192, 1024, 32768), HEADS, SUITES):
        yield case(suite, model, n, dtype)


def cpu() -> list[Case]:
    """For a CPU: the vocabularies of real models with few features, and sweeps of N, V and H."""
    qwen = HEADS["Qwen3-8B"][0]
    found = [
        small("linear", 1024, qwen, 256),
        small("logits", 256, qwen, 256),
        *(small(suite, 128, qwen, 256) for suite in SUITES),
        *(small(suite, 128, qwen, 256, beta=beta) for suite in ("linear", "logits") for beta in BETAS[1:]),
        small("linear", 128, qwen, 256, head_trained=False),
        *(small(suite, 128, qwen, 256, masked=MASKED) for suite in ("linear", "logits")),
        small("linear", 64, 32000, 64, "bfloat16"),  # 100 times slower without AVX-512
        small("logits", 128, qwen, 256, "bfloat16"),
        case("linear", "Qwen3-0.6B", 128, "float32"),
        *(small("linear", n, 32000, 256) for n in (64, 128, 256, 512, 1024, 2048)),
        *(small("linear", 128, v, 256) for v in (8000, 16000, 64000, 128256)),
        *(small("linear", 128, 32000, h) for h in (64, 128, 512, 1024)),
        *(small("logits", n, 32000, 256) for n in (64, 128, 256, 512, 1024)),
        *(small("logits", 128, v, 256) for v in (8000, 16000, 64000)),
    ]
    return list(dict.fromkeys(found))


def quick() -> list[Case]:
    """Every suite once on a CPU, within minutes."""
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
        small("logits", 6, 301, 16, "bfloat16", masked=MASKED),
        *(small("linear", 6, 300, 16, beta=beta) for beta in (0.0, 0.5)),
        small("linear", 6, 301, 16, head_trained=False, masked=MASKED),
        *(small(suite, 5, 300, 16) for suite in SUITES if suite not in ("linear", "logits")),
    ]


def profiled() -> list[Case]:
    """A step of four losses, whose kernels are timed one by one."""
    sizes = {"linear": 8192, "logits": 8192, "topk": 8192, "confidence": 1024}
    return [case(suite, "Qwen3-8B", n) for suite, n in sizes.items()]


# By device: the cases of the stages of ``gpu``; those of "targets" are compiled too.
STAGES: dict[str, dict[str, Callable[[], list[Case]]]] = {
    "cuda": {"targets": targets, "profile": profiled, "sweep": sweep, "rest": rest},
    "cpu": {"targets": cpu, "profile": lambda: cpu()[:2], "sweep": list, "rest": list},
    "tiny": {"targets": tiny, "profile": lambda: tiny()[:1], "sweep": list, "rest": list},
}
