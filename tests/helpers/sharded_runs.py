"""One rank of ``test_linear_sharded.py``: vocabularies cut over two and four ranks; prints nothing, reports as JSON.

Ranks 0 and 1, and 2 and 3, are the groups of two; each pair has inputs of its own, so that a collective over the wrong
group cannot go unnoticed.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from caop_fast import (
    VocabularyShards,
    linear_confidence_loss,
    linear_distillation_loss,
    linear_token_statistics,
    linear_topk_distillation_loss,
)
from caop_fast.losses.linear import chunking
from helpers import gpu_arithmetic
from helpers.ranks import report
from helpers.sharded_cases import (
    DISTILLATION,
    WAYS,
    Case,
    all_cases,
    call,
    cut,
    digest,
    fields,
    interpreted_cases,
    make,
    trouble,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


COLLECTIVES = ("all_gather", "all_gather_into_tensor", "all_gather_single", "all_reduce", "broadcast", "barrier")


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts collectives ("gathers", "sums", others by name), and the elements that this rank gives away to gather."""
    seen: Counter[str] = Counter()

    def counting(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def run(*tensors: Any, **options: Any) -> Any:
            short = "gathers" if name.startswith("all_gather") else {"all_reduce": "sums"}.get(name, name)
            seen[short] += 1
            seen["elements"] += tensors[1].numel() if short == "gathers" else 0
            return collective(*tensors, **options)

        return run

    with ExitStack() as stack:
        for name in COLLECTIVES:
            if hasattr(dist, name):
                stack.enter_context(patch.object(dist, name, counting(name, getattr(dist, name))))
        yield seen


def rank_of(group: Any) -> int:
    return dist.get_rank(group)


def agrees(case: Case, group: Any, seed: int) -> dict[str, Any]:
    """A call on this rank's rows, against float64; what must be equal on all ranks of the group, as a digest."""
    i, rank = make(case, seed), rank_of(group)
    leaves, out, total = call(case, i, rank, group, "triton" if INTERPRETED else "torch")
    total.backward()
    return {
        "trouble": trouble(case, i, leaves, out, rank),
        "common": digest(*fields(out).values(), leaves.hidden.grad),
    }


def twice(case: Case, group: Any) -> dict[str, Any]:
    """A call made twice, and once with a ``VocabularyShards``: bits of everything, and what each exchanged."""
    i, rank = make(case), rank_of(group)
    shards = VocabularyShards(group, i.rows[rank], i.teacher_rows[rank] if case.distils else None)
    found: dict[str, Any] = {"bits": [], "forward": [], "backward": []}
    for given in (group, group, shards):
        with counted() as forward:
            leaves, out, total = call(case, i, rank, given)
        with counted() as backward:
            total.backward()
        found["bits"].append(digest(*fields(out).values(), *(None if t is None else t.grad for t in leaves)))
        found["forward"].append(forward)
        found["backward"].append(backward)
    live = int((i.live > 0).sum())
    return {**found, "live": live, "chunks": 1 if i.chunk is None else -(-live // i.chunk)}


def no_tokens(way: str, group: Any) -> dict[str, Any]:
    """Calls on no tokens at all: the ranks have nothing to tell each other."""
    case = Case(dist.get_world_size(group), way, "zero", {"topk": "bucket", "confidence": "brier"}.get(way, 0.4))
    i, rank = make(case), rank_of(group)
    none = slice(0, 0)
    i = i._replace(
        hidden=i.hidden[none], teacher_hidden=i.teacher_hidden[none], target=i.target[none], live=i.live[none],
        labels=None if i.labels is None else i.labels[none], weights=None, mix=i.mix[:, none],
        listed=(i.listed[0][none], i.listed[1][none]),
    )  # fmt: skip
    shards = VocabularyShards(group, i.rows[rank], i.teacher_rows[rank] if case.distils else None)
    with counted() as seen:
        leaves, out, total = call(case, i, rank, shards)
        total.backward()
    wrong = [f"collectives: {dict(seen)}"] if seen else []
    wrong += [n for n, t in zip(leaves._fields, leaves, strict=True) if t is not None and t.grad.shape != t.shape]
    wrong += [n for n, t in zip(leaves._fields, leaves, strict=True) if t is not None and bool((t.grad != 0).any())]
    wrong += [n for n, v in fields(out).items() if v.shape != (() if n == "loss" else (0,))]
    return {"trouble": wrong}


def uneven_chunks(way: str, group: Any) -> dict[str, Any]:
    """Ranks of very different widths, without ``chunk_size``: all must still cut the tokens alike."""
    rank = rank_of(group)
    g = torch.Generator().manual_seed(5)
    hidden, weight = torch.randn(300, 4, generator=g), torch.randn(400, 4, generator=g)
    labels = torch.randint(0, 400, (300,), generator=g)
    mine = cut(weight, [397, 3], rank)
    kept = chunking.CPU_CHUNK_BYTES
    chunking.CPU_CHUNK_BYTES = 2 * 397 * 4 * 64  # two sides of 64 tokens on the wider rank
    try:
        whole = _one_call(way, hidden, weight, labels)
        got = _one_call(way, hidden, mine, labels, process_group=group)
    finally:
        chunking.CPU_CHUNK_BYTES = kept
    return {"trouble": [] if torch.allclose(got, whole, rtol=1e-5, atol=1e-5) else [f"{got} is not {whole}"]}


def _one_call(way: str, hidden: Any, weight: Any, labels: Any, **options: Any) -> torch.Tensor:
    if way == "tokens":
        return linear_token_statistics(hidden, weight, labels, **options).entropy
    if way == "topk":
        ids, logprobs = torch.tensor([[3, 7]]).expand(300, 2), torch.tensor([[-1.0, -2.0]]).expand(300, 2)
        return linear_topk_distillation_loss(hidden, weight, ids, logprobs, labels, **options).divergence
    if way == "confidence":
        return linear_confidence_loss(hidden, weight, [3, 7], [0.0, 1.0], torch.full((300,), 0.3), **options).expected
    return linear_distillation_loss(hidden, weight, hidden.flip(0), weight, labels, **options).divergence


def narrow(group: Any) -> dict[str, Any]:
    """Logits in bfloat16 and float16 are gathered as they are."""
    rank, wrong = rank_of(group), []
    i = make(Case(2, "topk", "chunk", "bucket"))
    hidden, weight, labels = i.hidden.float().nan_to_num(0, 0, 0), i.weight.float(), torch.zeros(7, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float16):
        options = {"logits_dtype": dtype, "weights": i.weights}
        got = linear_topk_distillation_loss(
            hidden, cut(weight, i.rows, rank), *i.listed, labels, process_group=group, **options
        )
        want = linear_topk_distillation_loss(hidden, weight, *i.listed, labels, **options)
        if not torch.allclose(got.divergence, want.divergence, rtol=1e-4, atol=1e-4):
            wrong.append(f"{dtype}: {got.divergence.tolist()}, not {want.divergence.tolist()}")
    return {"trouble": wrong}


def compiled(group: Any) -> dict[str, Any]:
    """One graph with VocabularyShards; with a bare group an error that says so."""
    case, rank = Case(2, "balanced", "chunk", 0.0), rank_of(group)
    i = make(case)
    shards = VocabularyShards(group, i.rows[rank], i.teacher_rows[rank])
    right = without_mistakes(case, i, rank, shards)

    def loss(student_weight: torch.Tensor, given: Any) -> torch.Tensor:
        changed = {"student_weight": student_weight, "process_group": given, "weights": i.weights}
        return linear_distillation_loss(**{**right, **changed}).loss

    graph = torch.compile(loss, backend="aot_eager", fullgraph=True)
    made = []
    for function in (loss, graph):
        weight = right["student_weight"].clone().requires_grad_()
        value = function(weight, shards)
        value.backward()
        made.append(digest(value, weight.grad))
    try:
        graph(right["student_weight"], group)
        refused = "no error"
    except Exception as error:
        refused = str(error)
    wrong = [] if made[0] == made[1] else ["the graph computes something else"]
    return {"trouble": wrong + ([] if "pass VocabularyShards" in refused else [refused])}


def without_mistakes(case: Case, i: Any, rank: int, group: Any) -> dict[str, Any]:
    """Arguments of a right call, to be spoiled."""
    return {
        "student_hidden": i.hidden,
        "student_weight": cut(i.weight, i.rows, rank),
        "teacher_hidden": i.teacher_hidden,
        "teacher_weight": cut(i.teacher_weight, i.teacher_rows, rank),
        "labels": torch.zeros(len(i.hidden), dtype=torch.int64),
        "process_group": group,
    }


def mistakes(group: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls that are wrong on every rank; the name says how."""
    case, rank, n_ranks = Case(dist.get_world_size(group), "balanced", "chunk", 0.0), rank_of(group), 4
    i = make(case)
    right = without_mistakes(case, i, rank, group)
    shards = VocabularyShards(group, i.rows[rank], i.teacher_rows[rank])
    mesh = init_device_mesh("cpu", (n_ranks,))
    other = [1, *i.rows[1:-1], i.rows[-1] + i.rows[0] - 1]
    for name, change in (
        ("cut", {"teacher_weight": cut(i.teacher_weight, other, rank)}),
        ("sizes", {"teacher_weight": right["teacher_weight"][: -1 if rank == n_ranks - 1 else None]}),
        ("told student", {"student_weight": right["student_weight"][:-1], "process_group": shards}),
        ("told teacher", {"teacher_weight": right["teacher_weight"][:-1], "process_group": shards}),
        ("empty", {"student_weight": i.weight[:0], "teacher_weight": i.teacher_weight[:0]}),
        ("kind", {"process_group": "world"}),
        ("mesh", {"process_group": mesh}),
        ("label", {"labels": torch.full((len(i.hidden),), sum(i.rows))}),
        ("label of fewer ids", {"labels": torch.full((len(i.hidden),), 20), "vocab_size": 20}),
        ("many ids", {"vocab_size": sum(i.rows) + 1}),
        ("no ids", {"vocab_size": 0}),
        ("kind of ids", {"vocab_size": 2.5}),
        ("dtensor", {"student_weight": distribute_tensor(i.weight, mesh, [Shard(0)])}),
        ("teacher dtensor", {"teacher_weight": distribute_tensor(i.teacher_weight, mesh, [Shard(0)])}),
        ("dtensor hidden", {"student_hidden": distribute_tensor(i.hidden, mesh, [Shard(0)])}),
        ("dtensor labels", {"labels": distribute_tensor(right["labels"], mesh, [Shard(0)])}),
        ("dtensor bias", {"student_bias": distribute_tensor(torch.zeros(i.rows[rank]), mesh, [Shard(0)])}),
    ):
        yield name, lambda change=change: linear_distillation_loss(**{**right, **change})
    yield "negative rows", lambda: VocabularyShards(group, -1)
    yield "kind of rows", lambda: VocabularyShards(group, 3, "4")
    yield "kind of group", lambda: VocabularyShards(None, 3)
    one = (right["student_hidden"], right["student_weight"])
    yield "tokens", lambda: linear_token_statistics(*one, right["labels"] + 99, process_group=group)
    yield "told tokens", lambda: linear_token_statistics(one[0], one[1][1:], None, process_group=shards)


def caught(spoiled: Callable[[], Any]) -> str:
    """What a wrong call raised."""
    try:
        spoiled()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def cases(rank: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])] if not INTERPRETED else [dist.group.WORLD]
    pair = rank // 2
    for case in interpreted_cases() if INTERPRETED else all_cases():
        group, seed = (pairs[pair], pair) if case.ranks == 2 else (dist.group.WORLD, 0)
        yield case.name, lambda case=case, group=group, seed=seed: agrees(case, group, seed)
    if INTERPRETED:
        return
    for way in WAYS:
        for layout in ("chunk", "fewer"):
            variants = (0.0, 0.4, "tensor") if way in DISTILLATION else (_variant(way),)
            for variant in variants:
                case = Case(4, way, layout, variant)
                yield f"twice-{case.name}", lambda case=case: twice(case, dist.group.WORLD)
        yield f"none-{way}", lambda way=way: no_tokens(way, dist.group.WORLD)
        yield f"uneven-{way}", lambda way=way: uneven_chunks(way, pairs[pair])
    yield "narrow", lambda: narrow(pairs[pair])
    yield "compiled", lambda: compiled(pairs[pair])
    for name, spoiled in mistakes(dist.group.WORLD):
        yield f"mistake-{name}", lambda spoiled=spoiled: caught(spoiled)


def _variant(way: str) -> Any:
    return {"tokens": 0, "topk": "bucket", "confidence": "cross_entropy"}[way]


if __name__ == "__main__":
    if INTERPRETED:
        gpu_arithmetic.install()
    report(cases)
