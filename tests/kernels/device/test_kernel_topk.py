"""The kernels against a sparse teacher: the cases of every backend, then tiles, chunks, guard pages and bits."""

from __future__ import annotations

import ctypes
import mmap
from functools import partial

import pytest
import torch

import caop_kernels
from caop_fast.losses.topk import topk_distillation_loss
from caop_kernels import topk_tail
from helpers.topk_cases import *  # noqa: F403
from helpers.topk_edge_cases import *  # noqa: F403
from helpers.topk_oracle import NAMES, make, oracle


@pytest.fixture
def thorough(device):
    return device.type != "cpu"


@pytest.fixture
def loss(device):
    """The function on the kernels; tensors go to the device and results come back, through autograd."""
    if device.type == "cpu":
        return partial(topk_distillation_loss, backend="triton")

    def on_device(*tensors, **options):
        options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        options.setdefault("validate", True)
        out = topk_distillation_loss(*(t.to(device) for t in tensors), backend="triton", **options)
        return type(out)(*(None if value is None else value.cpu() for value in out))

    return on_device


WANTED = ("divergence", "student_logprob", "student_entropy")


def both(loss, student, ids, logprobs, labels, **options):
    """(result, gradient) of the kernels and of the oracle, with something flowing into everything."""
    mix = torch.linspace(0.5, 2.0, student.shape[0], dtype=torch.float64)
    found = student.clone().requires_grad_()
    out = loss(found, ids, logprobs, labels, **options)
    truth = student.double().requires_grad_()
    want = oracle(truth, ids, logprobs, labels, **options)
    for names in ((out.divergence, out.student_logprob, out.student_entropy), [want[n] for n in WANTED]):
        sum((f * mix * x.double()).sum() for f, x in zip((0.7, -1.3, 0.4), names, strict=True)).backward()
    return (out, found.grad), (want, truth.grad)


def assert_agree(found, expected, rounding=0.0):
    (out, gradient), (want, truth) = found, expected
    for name in NAMES:
        torch.testing.assert_close(
            getattr(out, name).detach().double(), want[name].detach(), rtol=4e-6, atol=4e-6, equal_nan=True
        )
    torch.testing.assert_close(gradient.double(), truth, rtol=1e-5 + rounding, atol=3e-7)


PLACES = {
    "ends of tiles": [0, 255, 256, 511, 2047, 2048, 4095, 16383, 16384, 18431, 18432, 18999],
    "one tile": list(range(2048 + 100, 2048 + 356)),
    "first columns": list(range(256)),
    "masked end": list(range(18432, 18432 + 256)),
    "last column": [18999],
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "unaligned", "one warp"])
def test_listed_columns_anywhere(loss, monkeypatch, place, kind):
    """Listed logits stand out, so that one that stays in the tail, or a tail column that is dropped, shows."""
    if kind == "one warp":  # of 32 threads, as on NVIDIA; the interpreter takes wider tiles
        monkeypatch.setattr(topk_tail, "backend_of", lambda device: "cuda")
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    vocab = 19000 + 8 * (kind != "unaligned")
    g = torch.Generator().manual_seed(1)
    student = torch.randn(2, vocab, generator=g)
    ids = torch.tensor([PLACES[place]] * 2)
    ids[1] = ids[1].flip(0)
    student.scatter_add_(-1, ids, 4 + torch.rand(ids.shape, generator=g))
    logprobs = (torch.randn(ids.shape, generator=g).log_softmax(-1) - 0.7).float()
    labels = torch.tensor([PLACES[place][-1], 1])
    assert_agree(
        *both(loss, student.to(dtype), ids, logprobs, labels, beta=0.5), rounding=2.0**-8 * (kind == "bfloat16")
    )


@pytest.mark.parametrize("k", [1, 15, 16, 31, 63, 127, 255, 256])
def test_lists_of_every_width(loss, k):
    """Around the powers of two, where the lane of the tail is the last or the first of a wider vector."""
    student, ids, logprobs, labels = make(3, 700, k, seed=k, ragged=True)
    for tail in ("bucket", "renormalize", "ignore"):
        assert_agree(*both(loss, student, ids, logprobs, labels, tail=tail, beta=1.0))


@pytest.mark.parametrize("v", [1, 2, 2047, 2048, 2049, 16384, 16385, 34817])
def test_boundaries_of_tiles_and_chunks(loss, v):
    student, ids, logprobs, labels = make(2, v, 1 if v == 1 else 2, seed=2)
    assert_agree(*both(loss, student, ids, logprobs, labels, beta=0.5))


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "ignore"])
def test_a_row_does_not_depend_on_the_others(loss, tail):
    """Bits: alone, permuted and repeated; and from run to run."""
    for v, dtype in ((1031, torch.bfloat16), (17000, torch.float32)):
        student, ids, logprobs, labels = make(5, v, 9, dtype, ragged=True)

        def run(rows, student=student, ids=ids, logprobs=logprobs, labels=labels):
            leaf = student[rows].clone().requires_grad_()
            out = loss(leaf, ids[rows], logprobs[rows], labels[rows], tail=tail, beta=0.3)
            (out.divergence.sum() + out.student_entropy.sum() + out.student_logprob.sum()).backward()
            return [*(getattr(out, n).detach().nan_to_num(7.0) for n in NAMES), leaf.grad]

        whole = run(torch.arange(5))
        order = torch.tensor([3, 0, 4, 2, 1, 0])
        for rows in (order, torch.tensor([3]), torch.arange(5)):
            for part, value in zip(run(rows), whole, strict=True):
                assert torch.equal(part, value[rows])


def guarded(rows: int, columns: int) -> torch.Tensor:
    """Float32 [rows, columns] with an unreadable page right before its first and right after its last byte."""
    page, size = mmap.PAGESIZE, rows * columns * 4
    assert size % page == 0
    area = mmap.mmap(-1, size + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    libc = ctypes.CDLL(None, use_errno=True)
    for address in (start, start + page + size):
        assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(page), 0) == 0
    return torch.frombuffer(area, dtype=torch.float32, count=rows * columns, offset=page).view(rows, columns)


def test_ids_and_labels_out_of_range_touch_nothing(device):
    """The process would die of a segmentation fault if an id reached past the logits, reading or writing."""
    if device.type != "cpu":
        pytest.skip("guard pages exist for host memory only")
    rows, columns = 4, 1280
    values, ids, logprobs, labels = make(rows, columns, 5)
    logits = guarded(rows, columns)
    for bad in (-2, -100, columns, columns + 3, 2**31 - 1, -(2**31), 2**40, -(2**40), 2**62, -(2**63), 2**63 - 1):
        logits.copy_(values)
        wrong, wrong_labels = ids.clone(), labels.clone()
        wrong[0, 1] = wrong[3, 4] = bad
        wrong_labels[1] = bad if bad != -100 else -1
        found = caop_kernels.topk_statistics(logits, wrong, logprobs, wrong_labels)
        assert found.divergence.isnan().tolist() == [True, False, False, True]
        assert found.student_logprob.isnan().tolist() == [True, True, False, True]
        # The in-place gradient is written where the guards are.
        ones = torch.ones(rows)
        caop_kernels.topk_statistics_gradient(
            logits, wrong, logprobs, wrong_labels, found.saved_statistics, found.student_entropy,
            grad_divergence=ones, grad_logprob=ones, out=logits,
        )  # fmt: skip
        assert logits.isnan().any(-1).tolist() == [True, True, False, True]


def test_offsets_beyond_two_to_the_31(loss, device):
    """Four rows 2^30 elements apart; the memory between them is reserved but never touched."""
    if device.type != "cpu":
        pytest.skip("the rows are compared on the CPU, which would touch the memory between them")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    apart = torch.frombuffer(mmap.mmap(-1, 2 * (3 * 2**30 + 64), flags=flags), dtype=torch.float16)
    source, ids, logprobs, labels = make(4, 40, 5, torch.float16)
    rows = apart.as_strided((4, 40), (2**30, 1))
    rows.copy_(source)
    out, want = (loss(x, ids, logprobs, labels) for x in (rows, source))
    for name in NAMES:
        torch.testing.assert_close(getattr(out, name), getattr(want, name), equal_nan=True)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_common_offset_of_1e4_costs_no_digits(loss, beta):
    student, ids, logprobs, labels = make(4, 1031, 7)
    student = student + 1e4  # rounded: the oracle sees the same
    assert_agree(*both(loss, student, ids, logprobs, labels, beta=beta, temperature=0.7))
