"""What the linear losses cost on a CPU: products, passes over the logits and, beside plain PyTorch, memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.measure import allocations
from benchmarks.measure import peak as peak_memory
from benchmarks.peers import plain_loss
from caop_fast import (
    linear_confidence_loss,
    linear_distillation_loss,
    linear_distillation_rows,
    linear_token_statistics,
    linear_topk_distillation_loss,
)
from caop_fast.losses.backends import row_blocks
from caop_fast.losses.linear import chunking
from caop_fast.losses.linear.lm_head import ID_MULTIPLE, TOKEN_MULTIPLE, even_slices
from helpers.passes import passes

FIRST_FACTOR = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}  # where the first matrix stands


def make(n: int, vocab: int, h: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, h, generator=g), torch.randn(vocab, h, generator=g) / h**0.5
    return {
        "student_hidden": hidden.requires_grad_(),
        "student_weight": weight.requires_grad_(),
        "teacher_hidden": hidden.detach() + 0.2 * torch.randn(n, h, generator=g),
        "teacher_weight": weight.detach() + 0.02 * torch.randn(vocab, h, generator=g),
    }


def one_model(t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return t["student_hidden"], t["student_weight"]


def run_topk(t: dict[str, Tensor]) -> Tensor:
    n, vocab = t["student_hidden"].shape[0], t["student_weight"].shape[0]
    ids = torch.arange(4).expand(n, 4) * (vocab // 4)
    return linear_topk_distillation_loss(*one_model(t), ids, torch.full((n, 4), -3.0)).loss


def run_rows(t: dict[str, Tensor]) -> Tensor:
    out = linear_distillation_rows(**t, beta=0.4)
    return (out.divergence * 2 + out.student_entropy).sum()


def run_tokens(t: dict[str, Tensor]) -> Tensor:
    return linear_token_statistics(
        *one_model(t), torch.zeros(t["student_hidden"].shape[0], dtype=torch.int64)
    ).logprob.sum()


def run_confidence(t: dict[str, Tensor]) -> Tensor:
    target = torch.full((t["student_hidden"].shape[0],), 0.7)
    return linear_confidence_loss(*one_model(t), [0, 1, 2], [0.0, 0.5, 1.0], target).loss


RUNS: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "balanced": lambda t: linear_distillation_loss(**t).loss,
    "balanced-interior": lambda t: linear_distillation_loss(**t, beta=0.5).loss,
    "min": lambda t: linear_distillation_loss(**t, memory="min").loss,
    "min-interior": lambda t: linear_distillation_loss(**t, memory="min", beta=0.5).loss,
    "rows": run_rows,
    "topk": run_topk,
    "tokens": run_tokens,
    "confidence": run_confidence,
}
# In units of 2 N V H operations: with a trained head, with a frozen one, without gradients.
UNITS = {
    "balanced": (4, 3, 2),
    "balanced-interior": (4, 3, 2),
    "min": (6, 5, 2),
    "min-interior": (8, 7, 4),
    "rows": (6, 5, 2),
    "topk": (3, 2, 1),
    "tokens": (4, 3, 1),
    "confidence": (4, 3, 1),
}
# Per element of the student's logits, forward and backward: exponentials and logarithms, passes of any operation.
PASSES = {
    "balanced": (2, 23),
    "balanced-interior": (6, 58),
    "min": (4, 41),
    "min-interior": (10, 85),
    "rows": (8, 66),
    "topk": (2, 15),
    "tokens": (2, 14),
    "confidence": (3, 16),
}
TRANSCENDENTAL = ("exp", "exp2", "expm1", "log", "log1p")


def scale_budgets(monkeypatch: pytest.MonkeyPatch, factor: int) -> None:
    """Divide the bytes that are chosen for chunks and blocks: what they bound is shown at so much smaller shapes."""
    for name in ("CPU_CHUNK_BYTES", "CPU_BLOCK_BYTES", "LOW_MEMORY_BLOCK_BYTES"):
        monkeypatch.setattr(chunking, name, getattr(chunking, name) // factor)
    scale_row_blocks(monkeypatch, factor)


def scale_row_blocks(monkeypatch: pytest.MonkeyPatch, factor: int) -> None:
    monkeypatch.setattr(row_blocks, "CPU_BLOCK_ELEMENTS", row_blocks.CPU_BLOCK_ELEMENTS // factor)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a machine busy with other work, several threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def flops(call: Callable[[], object]) -> int:
    """Operations in matrix products. From their shapes: the profiler's own count leaves ``addmm_`` out."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        call()
    total = 0
    for event in profile.events():
        if event.name in FIRST_FACTOR:
            (rows, inner), (_, columns) = event.input_shapes[FIRST_FACTOR[event.name] :][:2]
            total += 2 * rows * inner * columns
        assert event.name not in ("aten::bmm", "aten::baddbmm", "aten::matmul_backward")  # not counted
    return total


@pytest.mark.parametrize("name", RUNS)
def test_operations(name):
    n, vocab, h = 96, 512, 32
    unit = 2 * n * vocab * h
    t = make(n, vocab, h)
    call = RUNS[name]
    trained = flops(lambda: call(t).backward())
    t["student_weight"].requires_grad_(False)
    frozen = flops(lambda: call(t).backward())
    with torch.no_grad():
        nothing = flops(lambda: call(t))
    assert (trained / unit, frozen / unit, nothing / unit) == UNITS[name]


@pytest.mark.parametrize("name", RUNS)
def test_passes_over_the_logits(name, monkeypatch):
    """What time is spent on beside the products."""
    scale_row_blocks(monkeypatch, 16)
    n, vocab = 64, 4096
    t = make(n, vocab, 4)
    found = passes(lambda: RUNS[name](t).backward())
    transcendental, total = PASSES[name]
    assert round(sum(found.by_name[kind] for kind in TRANSCENDENTAL) / (n * vocab), 1) == transcendental, found
    assert round(found.total / (n * vocab)) <= total, found
    if name != "confidence":  # the others work on blocks that stay in the cache; beyond it they take twice as long
        assert found.largest <= row_blocks.CPU_BLOCK_ELEMENTS < n * vocab


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("way", ["balanced", "min", "rows"])
def test_a_head_that_serves_both_is_read_once(way, autocast):
    """One product of stacked hidden states in place of two, each time the logits are computed."""
    t = make(96, 512, 32)
    shared = {**t, "teacher_weight": t["student_weight"]}
    calls = {"min": RUNS["min"], "balanced": RUNS["balanced"], "rows": run_rows}
    counts = []
    for models in (t, shared):
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile,
        ):
            calls[way](models).backward()
        events = [e.input_shapes[:2] for e in profile.events() if e.name == "aten::mm"]
        counts.append([sum(e == [[n, 32], [32, 512]] for e in events) for n in (96, 192)])
    passes = 1 if way == "balanced" else 2
    assert counts == [[2 * passes, 0], [0, passes]]


def test_blocks_on_a_device_fit_what_the_page_says():
    """Sizes that no CPU test reaches: the head of Qwen3-8B at 8192 tokens."""
    cuda, one = torch.device("cuda"), torch.float32
    n, vocab = 8192, 151936
    assert 8 * n * chunking.block_ids(n, 2, one, cuda, low_memory=True) <= 192 << 20
    assert 8 * n * chunking.block_ids(n, 2, one, cuda, low_memory=False) <= 1280 << 20
    for adds, budget in ((True, 2560), (False, 1280)):
        chunk = chunking.chunk_tokens(vocab, 2, one, cuda, adds_weight_gradient=adds)
        assert 1000 < chunk <= (budget << 20) / (8 * vocab)


def test_the_count_of_operations_is_right():
    t = make(96, 512, 32)
    assert flops(lambda: t["student_hidden"] @ t["student_weight"].t()) == 2 * 96 * 512 * 32


def test_the_count_of_passes_is_right():
    x = torch.randn(8, 4, requires_grad=True)
    found = passes(lambda: (x.view(4, 8).exp() * 2).sum())
    assert found.by_name == {"exp": 32, "mul": 32, "sum": 32}
    assert found.largest == 32


@pytest.mark.parametrize("name", RUNS)
def test_no_tensor_of_all_logits_is_ever_made(name, monkeypatch):
    """Also none of half of them, and never as much at a time beside the gradients."""
    for budget in ("CPU_CHUNK_BYTES", "CPU_BLOCK_BYTES"):
        monkeypatch.setattr(chunking, budget, 4 << 20)
    scale_row_blocks(monkeypatch, 8)
    n, vocab, h = 1024, 8000, 4
    t = make(n, vocab, h)
    gradients = 2 * 4 * (n + vocab) * h  # as they are added up, and as they are returned

    def step() -> None:
        t["student_hidden"].grad = t["student_weight"].grad = None
        RUNS[name](t).backward()

    sizes = allocations(step)
    logits = 4 * n * vocab
    assert max(sizes) < logits / 2
    assert max(itertools.accumulate(sizes)) < logits / 4 + gradients


@pytest.mark.parametrize("name", RUNS)
def test_nor_with_the_sizes_that_are_chosen(name, monkeypatch):
    """For 2048 tokens and 32000 ids; here a quarter of each."""
    scale_budgets(monkeypatch, 16)
    n, vocab, h = 512, 8000, 16
    t = make(n, vocab, h)
    assert max(allocations(lambda: RUNS[name](t).backward())) < 4 * n * vocab


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", ["balanced", "balanced-interior", "min", "rows", "topk", "tokens"])
def test_the_peak_is_what_the_table_says(name, trained, monkeypatch):
    """docs/linear_losses.md, "Memory", on a CPU in float32, from both sides; in units of an eighth of a MiB."""
    unit = (1 << 20) // 8
    for budget in ("CPU_CHUNK_BYTES", "CPU_BLOCK_BYTES", "LOW_MEMORY_BLOCK_BYTES"):
        monkeypatch.setattr(chunking, budget, 100 * unit)
    scale_row_blocks(monkeypatch, 8)
    n, vocab, h = 1024, 8000, 128
    t = make(n, vocab, h)
    t["student_weight"].requires_grad_(trained)
    call = RUNS[name]
    sides = 1 if name in ("topk", "tokens") else 2
    weight = 4 * vocab * h * trained
    one = torch.float32
    chunk = chunking.chunk_tokens(vocab, sides, one, torch.device("cpu"), adds_weight_gradient=trained)
    rows = max(p.stop - p.start for p in even_slices(n, chunk, TOKEN_MULTIPLE))
    carried = 4 * n * h + (weight if name in ("balanced", "balanced-interior", "topk") else 0)
    logits = 4 * sides * rows * vocab
    if name in ("min", "rows", "tokens"):
        block = chunking.block_ids(n, sides, one, torch.device("cpu"), low_memory=name == "min")
        ids = max(p.stop - p.start for p in even_slices(vocab, block, ID_MULTIPLE))
        logits = 4 * sides * n * ids if name == "min" else max(logits, 4 * sides * n * ids)
        carried += weight  # grad_weight as it is returned: the table counts beyond it
    peak = max(itertools.accumulate(allocations(lambda: call(t).backward())))
    returned = 4 * n * h + weight
    expected = max(logits + carried, carried + returned)
    assert 0.8 * expected < peak < expected + returned + 30 * unit, (peak / unit, expected / unit)


def test_an_eighth_of_the_memory_of_plain_pytorch(monkeypatch):
    """Of 1024 tokens, 151936 ids and 256 channels; here a half, an eighth and a half: a sixteenth of all bytes."""
    scale_budgets(monkeypatch, 16)
    n, vocab = 512, 18992
    t = make(n, vocab, 128)
    labels = torch.randint(0, vocab, (n,), generator=torch.Generator().manual_seed(1))

    def peak(run: Callable[..., tuple[Tensor, ...]]) -> int:
        t["student_hidden"].grad = t["student_weight"].grad = None
        return peak_memory(lambda: run(*t.values(), labels)[0].backward(), torch.device("cpu"))

    def plain(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return plain_loss(h_s @ w_s.t(), (h_t @ w_t.t()).detach(), labels)

    theirs, ours = peak(plain), peak(linear_distillation_loss)
    assert theirs > 4 * 4 * n * vocab, "the yardstick must hold several tensors of N*V"
    assert ours <= theirs / 8, (ours, theirs)
