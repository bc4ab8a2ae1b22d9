"""Records of one results file by case: which implementations were measured on it, in which order they are shown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from benchmarks.records import Record

T = TypeVar("T")

OURS = "caop_fast"
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
REFERENCE = ("Qwen3-8B", 8192)  # model and N of the shape the targets are about


@dataclass(frozen=True)
class Group:
    """A case of a suite, and its records by implementation, in the order of ``impl_order``.

    The other fields are those of ``Record``, from a record of the case that knows its shape.
    """

    suite: str
    case: str
    model: str | None
    dtype: str | None
    n: int | None
    v: int | None
    h: int | None
    beta: float | None
    head_trained: bool | None
    masked: float
    records: dict[str, Record]

    def ok(self, impl: str) -> Record | None:
        """The record of ``impl`` where it was measured."""
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
        return (self.n or 0) * (self.v or 0) * (self.h or 1)

    @property
    def plainness(self) -> tuple[bool, bool, float]:
        """Larger where less is out of the ordinary: no mask, a trained head, a small beta."""
        return not self.masked, self.head_trained is not False, -(self.beta or 0.0)


def is_peer(impl: str) -> bool:
    return not impl.startswith(OURS)


def impl_order(impl: str) -> tuple[int, str]:
    """caop_fast and its variants, what it replaces, then the packages; those not known behind, by name."""
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
    found: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        found[record.suite, record.case].append(record)
    return sorted((_group(same) for same in found.values()), key=_order)


def _group(same: Sequence[Record]) -> Group:
    same = sorted(same, key=lambda record: impl_order(record.impl))
    known = next((record for record in same if record.n is not None), same[0])  # a crash leaves a name only
    return Group(
        known.suite,
        known.case,
        known.model,
        known.dtype,
        known.n,
        known.v,
        known.h,
        known.beta,
        known.head_trained,
        known.masked,
        {record.impl: record for record in same},
    )


def _order(group: Group) -> tuple:
    beta = -1.0 if group.beta is None else group.beta
    setting = dtype_order(group.dtype), beta, group.head_trained is False, group.masked
    return suite_order(group.suite), setting, group.model or "", group.v or 0, group.h or 0, group.n or 0, group.case


def by(items: Iterable[T], key: Callable[[T], Hashable]) -> dict[Hashable, list[T]]:
    """Lists of ``items`` with the same key, in order of appearance."""
    found: dict[Hashable, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def impls(found: Iterable[Group]) -> list[str]:
    """Names of the implementations that have a record, in their order."""
    return sorted({impl for group in found for impl in group.records}, key=impl_order)


def largest_common(found: Iterable[Group]) -> Group | None:
    """Of the cases that caop_fast was measured on: of those with the most peers, the largest."""
    able = [group for group in found if group.ok(OURS)]
    return max(able, key=lambda g: (len(g.peers), g.size, g.plainness, g.case), default=None)


def reference(found: Iterable[Group], dtype: str = "bfloat16") -> Group | None:
    """The case of ``REFERENCE`` with a trained head, no mask and the smallest beta."""
    model, n = REFERENCE
    able = [g for g in found if (g.model, g.n, g.dtype) == (model, n, dtype) and not g.masked]
    return max((g for g in able if g.head_trained is not False), key=lambda g: (g.plainness, g.case), default=None)


def setting(
    dtype: str | None = None, beta: float | None = None, head_trained: bool | None = None, masked: float = 0.0
) -> list[str]:
    """What is known of it in words: "bfloat16", "beta 0", "head trained", "40 % masked"."""
    words = [dtype] if dtype is not None else []
    words += [f"beta {beta:g}"] if beta is not None else []
    words += ["head trained" if head_trained else "head frozen"] if head_trained is not None else []
    words += [f"{100 * masked:.0f} % masked"] if masked else []
    return words


def shape(group: Group) -> str:
    """A case in words: "Qwen3-8B, N 8192, V 151936, H 4096, bfloat16, beta 0, head trained"."""
    if group.n is None:
        return group.case
    words = [group.model] if group.model else []
    words += [f"{name} {value}" for name, value in (("N", group.n), ("V", group.v), ("H", group.h)) if value]
    return ", ".join([*words, *setting(group.dtype, group.beta, group.head_trained, group.masked)])
