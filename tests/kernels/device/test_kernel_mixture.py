"""The mixture divergence's second read against float64: accuracy, no underflow, edge values, independence of rows."""

from __future__ import annotations

import pytest
import torch

import caop_kernels
from helpers.kernel_gradients import exact_gradient, kernel_gradient, upstream
from helpers.row_oracle import logits

INF, NAN = float("inf"), float("nan")


def mixture(student, teacher, *, beta, vocab_size=None, weights=None, **scalars):
    """(divergence, saved_statistics) [N] of each row."""
    found = caop_kernels.row_statistics(
        student, teacher, weights=weights, vocab_size=vocab_size, statistics=(), saved_statistics=True, **scalars
    )
    n_cols = vocab_size or student.shape[1]
    divergence = caop_kernels.mixture_divergence(
        student, teacher, found.saved_statistics, beta=beta, n_cols=n_cols, weights=weights, **scalars
    )
    return divergence, found.saved_statistics


def exact(student, teacher, **options):
    flows = upstream(student.shape[0], "divergence")
    return exact_gradient(student, teacher, flows=flows, **options)[1]


def assert_close(found, expected, tolerance=3e-6):
    torch.testing.assert_close(found.double().cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["normal", "near", "peaked", "student_peaked", "teacher_peaked"])
@pytest.mark.parametrize("beta", [0.01, 0.3, 0.5, 0.99])
@pytest.mark.parametrize(("dtype", "v"), [(torch.float32, 1031), (torch.bfloat16, 2048), (torch.float64, 1000)])
def test_matches_oracle(device, dtype, v, beta, kind):
    student, teacher = logits(kind, 3, v, dtype, device)
    options = {"beta": beta, "temperature": 0.7, "student_softcap": 20.0, "teacher_softcap": 12.0}
    divergence, saved_statistics = mixture(student, teacher, **options)
    assert divergence.dtype == saved_statistics.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(divergence, exact(student, teacher, **options), 1e-11 if dtype == torch.float64 else 3e-6)
    # The last field is what the gradient subtracts: E_s[log p_s - log m].
    a, b = (
        (cap * torch.tanh(z.double().cpu() / cap) / 0.7).log_softmax(-1)
        for z, cap in ((student, 20.0), (teacher, 12.0))
    )
    m = beta * b.exp() + (1 - beta) * a.exp()
    assert_close(saved_statistics[5], (a.exp() * (a - m.log())).sum(-1), 1e-9 if dtype == torch.float64 else 3e-6)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_nothing_underflows(device, beta):
    """Where one side gives e^-300 a mixture in probability space is 0 and its logarithm -inf or NaN."""
    student = torch.tensor([[0.0, -300.0, 2.0], [300.0, 0.0, 0.0], [-2e3, 0.0, 2e3]], device=device)
    teacher = torch.tensor([[-300.0, 0.0, -400.0], [0.0, 300.0, 0.0], [2e3, 0.0, -2e3]], device=device)
    flows = upstream(3, "divergence", device=device)
    got, divergence = kernel_gradient(student, teacher, beta=beta, flows=flows)
    want, expected = exact_gradient(student, teacher, beta=beta, flows=flows)
    assert_close(divergence, expected)
    assert (want.abs() < 1e-12).all()
    assert (got.double().cpu().abs() < 1e-7).all()  # 1 - p, where p is 1 to the last digit


def test_equal_rows_give_zero_and_nearly_equal_ones_keep_their_digits(device):
    student, teacher = logits("peaked", 3, 20000, torch.bfloat16, device)
    divergence, _ = mixture(student, student.clone(), beta=0.3)
    assert torch.equal(divergence, torch.zeros_like(divergence))
    g = torch.Generator().manual_seed(5)
    student = (3.0 * torch.randn(3, 32768, generator=g)).to(device)
    teacher = student + 1e-3 * torch.randn(3, 32768, generator=g).to(device)
    divergence, _ = mixture(student, teacher, beta=0.5)
    truth = exact(student, teacher, beta=0.5)
    assert 5e-8 < truth.mean() < 2e-7
    assert ((divergence.double().cpu() - truth).abs() < 4e-8).all()
    assert (divergence >= 0).all()


@pytest.mark.parametrize("v", [1031, 20000])
def test_excluded_columns(device, v):
    """Both sides: nothing. One side: a finite term, -log(1 - beta) or -log(beta) of the other's mass."""
    student, teacher = logits("normal", 4, v, torch.float32, device)
    student[0, 1::2], teacher[0, 1::2] = -INF, -INF
    student[1, : v - 5], teacher[1, : v - 5] = -INF, -INF
    student[2, 7], teacher[2, 9] = -INF, -INF
    student[3, 5:], teacher[3, :5] = -INF, -INF  # disjoint: D = -b log b - (1-b) log(1-b)
    divergence, _ = mixture(student, teacher, beta=0.3)
    assert_close(divergence, exact(student, teacher, beta=0.3))
    b = torch.tensor(0.3, dtype=torch.float64)
    assert_close(divergence[3], -(b * b.log() + (1 - b) * (1 - b).log()))


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("bad", [NAN, INF, "all -inf"])
def test_a_bad_row_poisons_only_itself(device, bad, side):
    sides = logits("normal", 3, 1031, torch.float32, device)
    clean, _ = mixture(*sides, beta=0.5)
    if bad == "all -inf":
        sides[side][1] = -INF
    else:
        sides[side][1, 1030] = bad
    divergence, saved_statistics = mixture(*sides, beta=0.5)
    assert torch.equal(divergence[[0, 2]], clean[[0, 2]])
    assert divergence[1].isnan()
    assert saved_statistics[5, 1].isnan()
    weights = torch.tensor([1.0, 0.0, 1.0], device=device)
    divergence, saved_statistics = mixture(*sides, beta=0.5, weights=weights)
    assert divergence[1] == 0
    assert (saved_statistics[:, 1] == 0).all()
    assert torch.equal(divergence[[0, 2]], clean[[0, 2]])


def test_a_row_does_not_depend_on_the_others(device):
    student, teacher = logits("normal", 5, 17000, torch.float32, device)
    whole, _ = mixture(student, teacher, beta=0.3)
    order = torch.tensor([3, 0, 4, 1], device=device)
    assert torch.equal(mixture(student[order], teacher[order], beta=0.3)[0], whole[order])
    assert torch.equal(mixture(student[3:4], teacher[3:4], beta=0.3)[0], whole[3:4])
    assert torch.equal(mixture(student, teacher, beta=0.3)[0], whole)


def test_columns_past_vocab_size_are_not_read(device):
    student, teacher = logits("normal", 2, 20000, torch.float32, device)
    expected = exact(student[:, :1031], teacher[:, :1031], beta=0.5)
    student[:, 1031:], teacher[:, 1031:] = NAN, NAN
    assert_close(mixture(student, teacher[:, :1500].contiguous(), beta=0.5, vocab_size=1031)[0], expected)


@pytest.mark.parametrize("n", [0, 1, 130])
def test_any_number_of_rows(device, n):
    student, teacher = logits("normal", n, 33, torch.float32, device)
    assert_close(mixture(student, teacher, beta=0.5)[0], exact(student, teacher, beta=0.5))
