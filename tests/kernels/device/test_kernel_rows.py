"""Row statistics against the float64 oracle, and the rounding error against ordinary PyTorch."""

from __future__ import annotations

import math

import pytest
import torch

import caop_kernels
from helpers.row_oracle import FIELDS, logits, oracle, plain

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
KINDS = ("normal", "near", "peaked", "student_peaked", "teacher_peaked")

CAPS = ((None, None), (30.0, None), (None, 20.0), (30.0, 50.0))

# dtype, V, kind, temperature, (student cap, teacher cap): every dtype meets every V, the rest varies along.
GRID = [
    (dtype, v, KINDS[(i + 2 * j) % 5], (0.7, 1.0, 2.0)[(i + j) % 3], CAPS[(i + j + j // 2) % 4])
    for i, dtype in enumerate(DTYPES)
    for j, v in enumerate((8, 1000, 1031, 20000))
]
GRID += [
    (dtype, 1031, kind, temperature, caps)
    for dtype in ("fp32", "bf16")
    for kind in KINDS
    for temperature, caps in ((0.7, CAPS[0]), (1.0, CAPS[3]))
]


def check(found, expected, double):
    for name in FIELDS:
        value = getattr(found, name)
        assert value.dtype == (torch.float64 if double else torch.float32), name
        scale = expected[name].abs().clamp(min=1.0)
        tolerance = (1e-11 if double else 4e-6) * scale
        error = (value.double().cpu() - expected[name]).abs()
        assert torch.all(error <= tolerance), (name, error.max().item(), value, expected[name])


@pytest.mark.parametrize(("dtype", "v", "kind", "temperature", "caps"), GRID)
def test_matches_oracle(device, dtype, v, kind, temperature, caps):
    student, teacher = logits(kind, 4, v, DTYPES[dtype], device)
    labels = torch.tensor([0, v - 1, -100, v // 2], device=device)
    options = {"temperature": temperature, "student_softcap": caps[0], "teacher_softcap": caps[1]}
    found = caop_kernels.row_statistics(student, teacher, labels, **options)
    check(found, oracle(student, teacher, labels, **options), dtype == "fp64")


@pytest.mark.parametrize(("first", "second"), [("fp32", "bf16"), ("bf16", "fp32"), ("fp16", "fp64"), ("fp16", "bf16")])
@pytest.mark.parametrize("v", [1031, 4096])
def test_mixed_dtypes(device, first, second, v):
    student, teacher = logits("normal", 3, v, torch.float64, device)
    student, teacher = student.to(DTYPES[first]), teacher.to(DTYPES[second])
    labels = torch.tensor([5, 6, 7], device=device)
    found = caop_kernels.row_statistics(student, teacher, labels)
    check(found, oracle(student, teacher, labels), "fp64" in (first, second))


@pytest.mark.parametrize("v", [1, 2, 2047, 2048, 2049, 16384, 16385, 34817])
def test_boundaries_of_tiles_and_chunks(device, v):
    student, teacher = logits("normal", 2, v, torch.float32, device)
    labels = torch.tensor([v - 1, 0], device=device)
    check(caop_kernels.row_statistics(student, teacher, labels), oracle(student, teacher, labels), False)


@pytest.mark.parametrize("kind", ["normal", "peaked", "near", "large"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_error_is_that_of_plain_pytorch(device, kind, dtype):
    """RMS and largest error over 64 rows: at most 1.2 times plain float32 PyTorch's, plus 2 ulp of the result."""
    if kind == "large" and dtype == "fp16":
        kind = "student_peaked"  # 1e4 + noise needs more range than float16 has
    v = 1031 if kind in ("normal", "large") else 2048
    student, teacher = logits(kind, 64, v, DTYPES[dtype], device, seed=3)
    labels = torch.randint(0, v, (64,), generator=torch.Generator().manual_seed(1)).to(device)
    found = caop_kernels.row_statistics(student, teacher, labels, temperature=0.7)
    yardstick = plain(student, teacher, labels, temperature=0.7)
    for name, truth in oracle(student, teacher, labels, temperature=0.7).items():
        ours = getattr(found, name).double().cpu() - truth
        theirs = yardstick[name].double().cpu() - truth
        ulp = torch.finfo(torch.float32).eps * truth.abs().max()
        assert ours.square().mean().sqrt() <= 1.2 * theirs.square().mean().sqrt() + 2 * ulp, name
        assert ours.abs().max() <= 1.2 * theirs.abs().max() + 2 * ulp, name


@pytest.mark.parametrize("spread", [1e-3, 1e-4])
def test_nearly_equal_rows_keep_their_digits(device, spread):
    """True KL 5e-7 (and 5e-9) over V = 32768: off by less than 1e-7 (5e-8), never negative."""
    g = torch.Generator().manual_seed(5)
    student = 3.0 * torch.randn(4, 32768, generator=g)
    teacher = (student + spread * torch.randn(4, 32768, generator=g)).to(device)
    student = student.to(device)
    found = caop_kernels.row_statistics(student, teacher)
    truth = oracle(student, teacher)
    assert 0.1 * spread**2 < truth["forward_kl"].mean() < spread**2
    for name in ("forward_kl", "reverse_kl"):
        value = getattr(found, name).double().cpu()
        assert torch.all((value - truth[name]).abs() < (1e-7 if spread == 1e-3 else 5e-8)), name
        assert torch.all(value >= 0), name


def test_a_common_offset_of_1e6_costs_no_digits(device):
    """There a product rounded before the subtraction is off by 0.06, a tenth of these divergences."""
    student, teacher = logits("normal", 4, 1031, torch.float32, device)
    student, teacher = student + 1e6, teacher + 1e6
    found, truth = caop_kernels.row_statistics(student, teacher), oracle(student, teacher)
    for name in ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy"):
        torch.testing.assert_close(getattr(found, name).double().cpu(), truth[name], rtol=3e-6, atol=0.0)


def test_identical_rows_have_zero_divergence(device):
    student, _ = logits("peaked", 8, 20000, torch.bfloat16, device)
    found = caop_kernels.row_statistics(student, student.clone())
    assert torch.equal(found.forward_kl, torch.zeros_like(found.forward_kl))
    assert torch.equal(found.reverse_kl, torch.zeros_like(found.reverse_kl))


@pytest.mark.parametrize(
    "asked",
    [
        ("forward_kl",),
        ("reverse_kl",),
        ("student_entropy",),
        ("teacher_entropy", "student_lse"),
        ("student_logprob",),
        ("forward_kl", "teacher_logprob"),
    ],
)
def test_a_subset_of_statistics_equals_the_whole(device, asked):
    student, teacher = logits("normal", 3, 20000, torch.float32, device)
    labels = torch.tensor([1, 2, 3], device=device)
    whole = caop_kernels.row_statistics(student, teacher, labels)
    part = caop_kernels.row_statistics(student, teacher, labels, statistics=asked)
    for name in FIELDS:
        if name in asked:
            # Compiled alone, a sum may be fused differently: equal to rounding, not to the bit.
            torch.testing.assert_close(getattr(part, name), getattr(whole, name), rtol=2e-6, atol=1e-6)
        else:
            assert getattr(part, name) is None


def test_without_labels_there_are_no_log_probabilities(device):
    student, teacher = logits("normal", 2, 8, torch.float32, device)
    found = caop_kernels.row_statistics(student, teacher)
    assert found.student_logprob is None
    assert found.teacher_logprob is None


STUDENT = ("student_lse", "student_logprob", "student_entropy")


@pytest.mark.parametrize("cap", [None, 12.0])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("v", [1031, 20000])
def test_the_student_alone(device, v, dtype, cap):
    student, _ = logits("peaked", 4, v, DTYPES[dtype], device)
    labels = torch.tensor([0, v - 1, -100, v], device=device)
    options = {"temperature": 0.7, "student_softcap": cap}
    found = caop_kernels.row_statistics(student, None, labels, saved_statistics=True, **options)
    expected = oracle(student, student, labels, **options)
    tolerance = 1e-11 if dtype == "fp64" else 4e-6
    for name in FIELDS:
        if name not in STUDENT:
            assert getattr(found, name) is None, name
            continue
        value = getattr(found, name).double().cpu()
        torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance, equal_nan=True, msg=name)
    lse = (found.saved_statistics[0] * math.log(2) + found.saved_statistics[2].log()).double().cpu()
    torch.testing.assert_close(lse, expected["student_lse"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("v", [1031, 20000])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_beta_chooses_the_divergence_of_each_row(device, dtype, v):
    student, teacher = logits("normal", 5, v, DTYPES[dtype], device)
    beta = torch.tensor([1.0, 0.0, 0.5, 1.0, float("nan")], dtype=torch.float64, device=device)
    beta = beta if dtype == "fp64" else beta.float()
    found = caop_kernels.row_statistics(student, teacher, beta=beta, statistics=("student_lse",))
    assert found.forward_kl is None
    assert found.reverse_kl is None
    expected = oracle(student, teacher)
    want = torch.where(beta.cpu() == 0, expected["forward_kl"], expected["reverse_kl"])
    want[[2, 4]] = torch.nan
    tolerance = 1e-11 if dtype == "fp64" else 4e-6
    torch.testing.assert_close(found.divergence.double().cpu(), want, rtol=tolerance, atol=tolerance, equal_nan=True)
    # The two KLs are those that are computed when asked for by name: to the bit, with the same sums compiled in.
    both = caop_kernels.row_statistics(student, teacher, statistics=("forward_kl", "reverse_kl", "student_lse"))
    assert torch.equal(found.divergence[[0, 3]], both.reverse_kl[[0, 3]])
    assert torch.equal(found.divergence[1], both.forward_kl[1])


@pytest.mark.parametrize("kind", ["normal", "near", "student_peaked"])
def test_saved_statistics(device, kind):
    """Maxima (log2 units), partition sums relative to them, the log of their quotient, and E_s[log p_s - log p_t]."""
    student, teacher = logits(kind, 3, 20000, torch.float32, device)
    options = {"temperature": 0.7, "teacher_softcap": 12.0}
    found = caop_kernels.row_statistics(student, teacher, saved_statistics=True, **options)
    expected = oracle(student, teacher, **options)
    m_s, m_t, z_s, z_t, lr, mean = found.saved_statistics.double().cpu()
    for m, z, lse in ((m_s, z_s, "student_lse"), (m_t, z_t, "teacher_lse")):
        torch.testing.assert_close(m * math.log(2) + z.log(), expected[lse], rtol=2e-6, atol=2e-6)
        assert (z >= 1 - 1e-6).all()
    torch.testing.assert_close(lr, z_s.log() - z_t.log(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(mean, expected["reverse_kl"], rtol=4e-6, atol=4e-6)
