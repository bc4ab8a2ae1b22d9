"""The records of a results file by case, and the order in which cases and implementations are shown."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from benchmarks.records import OURS, Record, Shape

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

SUITES = {  # in the order they are shown
    "linear": "distillation loss from hidden states and heads",
    "logits": "distillation loss from logits",
    "linear-topk": "top-k distillation loss from hidden states and a head",
    "topk": "top-k distillation loss from logits",
    "linear-confidence": "confidence loss from hidden states and a head",
    "confidence": "confidence loss from logits",
    "linear-tokens": "token statistics from hidden states and a head",
    "tokens": "token statistics from logits",
    "step": "a whole training step",
}
IMPLS = (
    *(OURS, "caop_fast-min", "caop_fast-inplace", "caop_fast-rows", "caop_fast-bf16-logits"),
    *("official", "official-compiled", "plain", "plain-compiled"),
    *("trl-chunked", "trl-chunked-logprob", "trl-logprob-entropy"),
    *("liger-fused-linear-jsd", "liger-chunked-jsd", "liger-jsd", "liger-kl-div"),
    *("cut-cross-entropy", "flash-attn-ce"),
)
DTYPES = ("bfloat16", "float32")
TARGET = ("Qwen3-8B", 8192)  # model and N that the targets are stated for


@dataclass(frozen=True)
class Group:
    """A case of a suite, and its records by implementation, in the order of ``impl_order``.

    ``shape`` is that of a record that knows it.
    """

    suite: str
    case: str
    shape: Shape
    records: dict[str, Record]

    def ok(self, impl: str) -> Record | None:
        """The record of ``impl`` if it was measured."""
        record = self.records.get(impl)
        return record if record is not None and record.status == "ok" and record.time_ms else None

    @property
    def measured(self) -> list[Record]:
        return [record for impl in self.records if (record := self.ok(impl)) is not None]

    @property
    def peers(self) -> list[Record]:
        """Those measured that are not caop_fast or a variant of it."""
        return [record for record in self.measured if is_peer(record.impl)]

    @property
    def size(self) -> int:
        return (self.shape.n or 0) * (self.shape.v or 0) * (self.shape.h or 1)

    @property
    def plainness(self) -> tuple[bool, bool, float]:
        """Larger for plainer cases: no mask, a trained head, a small beta."""
        return not self.shape.masked, self.shape.head_trained is not False, -(self.shape.beta or 0.0)


def is_peer(impl: str) -> bool:
    return not impl.startswith(OURS)


def impl_order(impl: str) -> tuple[int, str]:
    """caop_fast and its variants, what it replaces, then packages; unknown ones after them, by name."""
    if impl in IMPLS:
        return IMPLS.index(impl), impl
    return IMPLS.index("official") - 1 if impl.startswith(OURS) else len(IMPLS), impl


def suite_order(suite: str) -> tuple[int, str]:
    names = list(SUITES)
    return names.index(suite) if suite in SUITES else len(names), suite


def dtype_order(dtype: str | None) -> tuple[int, str]:
    return DTYPES.index(dtype) if dtype in DTYPES else len(DTYPES), dtype or ""


def groups(records: Iterable[Record]) -> list[Group]:
    """One for each case; the order depends on what was measured, not on when."""
    found = by(records, lambda record: (record.suite, record.case))
    return sorted((_group(*key, same) for key, same in found.items()), key=_order)


def _group(suite: str, case: str, same: Sequence[Record]) -> Group:
    same = sorted(same, key=lambda record: impl_order(record.impl))
    known = next((record for record in same if record.shape.n is not None), same[0])  # a crash leaves names only
    return Group(suite, case, known.shape, {record.impl: record for record in same})


def _order(group: Group) -> tuple[Any, ...]:
    s = group.shape
    return suite_order(group.suite), setting_order(s), s.model or "", s.v or 0, s.h or 0, s.n or 0, group.case


def setting_order(shape: Shape) -> tuple[tuple[int, str], float, bool, float]:
    """Plain settings first."""
    beta = -1.0 if shape.beta is None else shape.beta
    return dtype_order(shape.dtype), beta, shape.head_trained is False, shape.masked


def by(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Lists of ``items`` with the same key, in order of appearance."""
    found: dict[K, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def impls(found: Iterable[Group]) -> list[str]:
    """Names of the implementations with a record, in order."""
    return sorted({impl for group in found for impl in group.records}, key=impl_order)


def largest_common(found: Iterable[Group]) -> Group | None:
    """Of the cases with a time of caop_fast, those with the most peers; of these the largest."""
    able = [group for group in found if group.ok(OURS)]
    return max(able, key=lambda g: (len(g.peers), g.size, g.plainness, g.case), default=None)


def target_case(found: Iterable[Group], dtype: str | None = "bfloat16") -> Group | None:
    """The case that the targets are stated for: trained head, no mask and the smallest beta."""
    model, n = TARGET
    able = [g for g in found if (g.shape.model, g.shape.n, g.shape.dtype) == (model, n, dtype) and not g.shape.masked]
    trained = [g for g in able if g.shape.head_trained is not False]
    return max(trained, key=lambda g: (g.plainness, g.case), default=None)


def setting(shape: Shape) -> list[str]:
    """Its fields other than sizes in words: "bfloat16", "beta 0", "head trained", "40 % masked"."""
    words = [shape.dtype] if shape.dtype is not None else []
    words += [f"beta {shape.beta:g}"] if shape.beta is not None else []
    words += ["head trained" if shape.head_trained else "head frozen"] if shape.head_trained is not None else []
    words += [f"{100 * shape.masked:.0f} % masked"] if shape.masked else []
    return words


def described(group: Group) -> str:
    """A case in words: "Qwen3-8B, N 8192, V 151936, H 4096, bfloat16, beta 0, head trained"."""
    shape = group.shape
    if shape.n is None:
        return group.case
    words = [shape.model] if shape.model else []
    words += [f"{name} {value}" for name, value in (("N", shape.n), ("V", shape.v), ("H", shape.h)) if value]
    return ", ".join([*words, *setting(shape)])
