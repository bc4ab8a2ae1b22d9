"""What the balanced way holds and moves where GEMMs of bfloat16 sum in float32, as on CUDA: found without values.

The code runs on meta tensors of the real sizes. Their storages say what is held, and the operations what is moved; the
products are recorded, and what computes the rows is left out: it allocates nothing of the size of the logits.
"""

from __future__ import annotations

import itertools
import weakref
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from test_linear_cost import allocations, scale_row_blocks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from caop_fast import linear_distillation_loss
from caop_fast.losses.backends.masked_rows import UnmaskedRows
from caop_fast.losses.batches import DistillationRows
from caop_fast.losses.linear import chunking, config, gradients, lm_head, sides
from caop_fast.losses.linear.gradients import (
    LossWithGradients,
    ScaledInputs,
    WeightedRows,
    _scaled,
    compute_with_gradients,
)
from caop_fast.losses.linear.lm_head import LMHead, ProjectedSide
from helpers.mixed_products import NARROW, play

VOCAB = 151936
GB = 1e9


class Product(NamedTuple):
    """A GEMM [rows, inner] [inner, columns]."""

    rows: int
    inner: int
    columns: int
    adds: bool
    out: torch.dtype


class Watch(TorchDispatchMode):
    """Bytes of the storages that are alive beside ``inputs``, and of tensors of ``large`` elements that are moved."""

    def __init__(self, inputs: list[Tensor], large: int) -> None:
        super().__init__()
        self.large, self.held, self.peak, self.moved = large, 0, 0, 0
        self.inputs = [t.untyped_storage() for t in inputs]
        self.known = {id(storage) for storage in self.inputs}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        outputs = [t for t in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(t, Tensor)]
        for tensor in outputs:
            self.hold(tensor.untyped_storage())
        if not function.is_view and "empty" not in function.name():
            operands = {id(t): t for t in (*args, *(kwargs or {}).values(), *outputs) if isinstance(t, Tensor)}
            self.moved += sum(t.nbytes for t in operands.values() if t.numel() >= self.large)
        return out

    def hold(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self.known:
            return
        self.known.add(key)
        size = storage.nbytes()
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.held -= size


class Run(NamedTuple):
    """A forward and backward: bytes beyond the inputs, and the products."""

    forward_peak: int
    kept: int
    backward_peak: int
    forward_moved: int  # of tensors of [V, H] or more
    backward_moved: int
    products: list[Product]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[Product]:
    seen: list[Product] = []

    def record(first: Tensor, second: Tensor, out: Tensor, *, adds: bool) -> Tensor:
        (rows, inner), (_, columns) = first.shape, second.shape
        assert second.shape[0] == inner
        assert out.shape == (rows, columns)
        seen.append(Product(rows, inner, columns, adds, out.dtype))
        return out

    def mm(first: Tensor, second: Tensor, *, out: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        assert out.dtype == (first.dtype if out_dtype is None else out_dtype)
        return record(first, second, out, adds=False)

    def addmm(total: Tensor, first: Tensor, second: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        assert total is out
        assert out.dtype == out_dtype
        return record(first, second, out, adds=True)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(chunking, "_no_autocast", lambda _: nullcontext())  # which has no meta device
    monkeypatch.setattr(sides, "shares_projection", lambda *_: False)  # all meta tensors have one address
    monkeypatch.setattr(lm_head, "_has_addmm", lambda *_: True)
    monkeypatch.setattr(lm_head, "keeps_accumulator", lambda _, operand, result: result != operand)
    monkeypatch.setattr(lm_head, "sums_in_float32", lambda _, dtype: dtype == torch.bfloat16)
    return seen


def run(
    products: list[Product],
    n: int = 8192,
    h: int = 4096,
    vocab: int = VOCAB,
    *,
    dtype: torch.dtype = torch.bfloat16,
    trained: bool = True,
    models: int = 2,
) -> Run:
    """Of ``linear_distillation_loss`` (of one model: against a sparse teacher) on a device that is no CPU."""

    def side() -> ProjectedSide:
        hidden = torch.empty(n, h, device="meta", dtype=dtype, requires_grad=True)
        weight = torch.empty(vocab, h, device="meta", dtype=dtype, requires_grad=trained)
        return ProjectedSide(hidden, LMHead(weight, None, 1.0))

    call = config.prepare(
        dict(zip(("student_", "teacher_"), [side() for _ in range(models)], strict=False)), {}, vocab_size=None,
        logits_dtype=None, chunk_size=None, process_group=None, backend="torch", validate=False,
    )  # fmt: skip
    student, teacher = (*call.sides, None)[:2]
    unmasked = UnmaskedRows.of(None, n)

    def compute(tokens: slice, own: Tensor, other: Tensor | None, out: Tensor, upstream: Tensor | None) -> Any:
        assert own.shape == out.shape == (tokens.stop - tokens.start, vocab)
        column = upstream.new_empty(upstream.shape)
        return DistillationRows(column, None, column, None, column, None, None)

    watch = Watch([t for s in call.sides for t in (s.hidden, s.head.weight)], large=vocab * h)
    with torch.no_grad(), watch:
        rows = WeightedRows(unmasked, None, "mean", labelled=False, dtype=torch.float32)
        found: LossWithGradients = compute_with_gradients(
            sides.unmask_sides(student, teacher, unmasked, call.config), compute, rows, call.config
        )
        forward_peak, kept, forward_moved = watch.peak, watch.held, watch.moved
        watch.peak, watch.moved = watch.held, 0
        pairs = ((found.grad_hidden, student.hidden), (found.grad_weight, student.head.weight))
        made = [
            _scaled(ScaledInputs(total, found.factor, like.dtype, like.shape[0], None))
            for total, like in pairs
            if total is not None
        ]
    assert all(t.dtype == like.dtype for t, (_, like) in zip(made, pairs, strict=False))
    operations = sum(2 * p.rows * p.inner * p.columns for p in products)
    assert operations == (models + 1 + trained) * 2 * n * vocab * h
    return Run(forward_peak, kept, watch.peak, forward_moved, watch.moved, list(products))


def weight_products(found: Run, vocab: int = VOCAB) -> list[Product]:
    return [p for p in found.products if p.rows == vocab]


def test_the_head_of_qwen3_8b(products):
    """docs/linear_losses.md, "Memory" and "What a step costs on a GPU": bytes are those of the page."""
    found = run(products)
    assert 3.8 * GB < found.forward_peak < 3.9 * GB
    assert found.backward_peak < 2.8 * GB
    # grad_weight from one product, as it is kept: nothing set to 0, nothing added, no pass that rounds it.
    assert weight_products(found) == [Product(VOCAB, 8192, 4096, False, torch.bfloat16)]
    assert next(p for p in found.products if p.columns == 4096) == Product(8192, VOCAB, 4096, False, torch.float32)
    assert found.forward_moved == 0
    assert found.backward_moved == 2 * 2 * VOCAB * 4096
    projections = [p for p in found.products if p.columns == VOCAB]
    assert {p[:2] for p in projections} == {(1024, 4096)}
    assert len(projections) == 16


@pytest.mark.parametrize(
    ("options", "peak"),
    [
        ({"trained": False}, 1.7),
        ({"h": 1024}, 3.9),  # Qwen3-0.6B
        ({"models": 1}, 3.9),  # against a sparse teacher
        ({"dtype": torch.float16}, 5.2),  # grad_weight in float32 until the loss is scaled back
        ({"head_dtype": torch.float32}, 6.5),  # as under autocast, with copies of the heads in bfloat16
        ({"h": 4096, "vocab": 32000}, 1.75),  # Llama 2
    ],
)
def test_other_heads(options, peak, products, monkeypatch):
    if "head_dtype" in options:  # what autocast makes of float32 tensors
        options = {"dtype": options["head_dtype"]}
        monkeypatch.setattr(config, "projection_dtypes", lambda *_: (torch.bfloat16, torch.float32))
    found = run(products, **options)
    vocab = options.get("vocab", VOCAB)
    assert 0.9 * peak * GB < found.forward_peak < peak * GB
    assert len(weight_products(found, vocab)) == options.get("trained", True)
    assert not any(p.adds for p in weight_products(found, vocab))


def test_more_tokens_than_fit_are_summed(products):
    """No more is held than with float32 logits of twice the size and no gradient beside them."""
    found = run(products, n=16384)
    made, *added = weight_products(found)
    assert (made.adds, [p.adds for p in added]) == (False, [True, True])
    assert {p.out for p in (made, *added)} == {torch.float32}
    assert found.forward_peak < 5.8 * GB
    assert found.forward_moved == (4 + 2) * VOCAB * 4096  # rounded once
    assert found.kept < 1.6 * GB


def test_the_plan_covers_all_tokens_once(products):
    for n in (0, 1, 63, 64, 1000, 8192, 8193, 20000, 65537):
        for gradient, logits in ((8192, 1088), (64, 64), (100, 7), (70000, 100)):
            chunks = chunking.TokenSizes(logits, gradient, True).chunks(n)
            flat = list(itertools.chain.from_iterable(chunks))
            assert [i for part in flat for i in (part.start, part.stop)][1:-1:2] == [p.start for p in flat[1:]]
            assert (not flat and n == 0) or (flat[0].start, flat[-1].stop) == (0, n)
            assert all(0 < p.stop - p.start <= logits for p in flat)
            assert all(part[-1].stop - part[0].start <= gradient for part in chunks)


def test_what_is_measured_is_what_was_computed(monkeypatch):
    """A sixteenth of tokens, ids and channels: a 256th of all bytes, on a CPU whose products are played."""
    seen = play(monkeypatch)
    n, vocab, h, factor = 512, 9496, 256, 256
    for name in ("CPU_CHUNK_BYTES", "DEVICE_GRADIENT_BYTES"):
        monkeypatch.setattr(chunking, name, getattr(chunking, name.replace("CPU", "DEVICE")) // factor)
    scale_row_blocks(monkeypatch, factor)
    monkeypatch.setattr(gradients, "ROUNDED_ELEMENTS", gradients.ROUNDED_ELEMENTS // factor)
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*s, generator=g).mul(h**-0.25).bfloat16().requires_grad_() for s in ((n, h), (vocab, h))]
    teacher = [torch.randn(*s, generator=g).mul(h**-0.25).bfloat16() for s in ((n, h), (vocab, h))]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        linear_distillation_loss(*leaves, *teacher).loss.backward()

    step()
    assert [kind for kind, _ in seen].count("rounded mm") == 1
    assert {dtype for _, dtype in seen} == {NARROW[0]}
    for leaf in leaves:
        leaf.grad = None
    peak = max(itertools.accumulate(allocations(step)))
    assert 0.97 * 3.87 * GB / factor < peak < 1.03 * 3.87 * GB / factor
