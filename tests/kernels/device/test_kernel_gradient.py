"""The gradient kernel against float64: every term alone and mixed, boundaries, edge values, what it may not touch."""

from __future__ import annotations

import pytest
import torch

from helpers.guarded_memory import far_apart, forbid, guarded
from helpers.kernel_gradients import OUTPUTS, assert_gradient, exact_gradient, kernel_gradient, upstream
from helpers.row_oracle import logits

INF, NAN = float("inf"), float("nan")
BETAS = (0.0, 0.3, 1.0, "rows")


def betas(beta, n, device):
    return (torch.arange(n, device=device) % 2).float() if beta == "rows" else beta


def labels_for(n, v, device):
    labels = torch.arange(n, device=device) * 7 % v
    labels[-1] = v - 1
    return labels


def check(student, teacher, labels, *, beta=0.0, flows, dtype=None, **scalars):
    got, divergence = kernel_gradient(student, teacher, labels, beta=beta, flows=flows, **scalars)
    want, exact = exact_gradient(student, teacher, labels, beta=beta, flows=flows, **scalars)
    assert got.dtype == student.dtype
    assert got.shape == student.shape
    assert_gradient(got, want, student)
    return got, divergence, exact


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("beta", BETAS)
def test_each_output_alone(device, beta, output):
    if output != "divergence" and beta != 0.0:
        pytest.skip("beta concerns the divergence only")
    student, teacher = logits("normal", 3, 1031, torch.float32, device)
    labels = labels_for(3, 1031, device) if output == "logprob" else None
    check(student, teacher, labels, beta=betas(beta, 3, device), flows=upstream(3, output, device=device))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("v", [1, 2, 2047, 2048, 2049, 16384, 16385, 34817])
def test_boundaries_of_tiles_and_chunks(device, v, beta):
    if v == 34817 and beta not in (0.3, "rows"):
        pytest.skip("three chunks: two of the four suffice")
    student, teacher = logits("normal", 2, v, torch.float32, device)
    flows = upstream(2, device=device)
    _, divergence, exact = check(
        student, teacher, labels_for(2, v, device), beta=betas(beta, 2, device), flows=flows, temperature=1.3
    )
    torch.testing.assert_close(divergence.double().cpu(), exact, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("float32", "bfloat16"),
        ("bfloat16", "float32"),
        ("float16", "bfloat16"),
        ("float16", "float64"),
        ("bfloat16", "float64"),
        ("float64", "bfloat16"),
    ],
)
@pytest.mark.parametrize("v", [1031, 2048])
def test_mixed_dtypes(device, first, second, v):
    student, teacher = logits("normal", 2, v, torch.float64, device)
    student, teacher = student.to(getattr(torch, first)), teacher.to(getattr(torch, second))
    check(student, teacher, labels_for(2, v, device), beta=0.3, flows=upstream(2, device=device), temperature=0.7)


@pytest.mark.parametrize("beta", BETAS)
def test_columns_past_vocab_size_are_zero_and_not_read(device, beta):
    """Also where whole chunks of the output lie past it; the teacher's vocabulary is another one."""
    for n_cols, v_s, v_t, cap in ((10, 20000, 37, None), (1031, 1040, 1100, 9.0), (16390, 17000, 16390, None)):
        student, teacher = logits("normal", 2, max(v_s, v_t), torch.float32, device)
        student, teacher = student[:, :v_s].contiguous(), teacher[:, :v_t].contiguous()
        student[:, n_cols:], teacher[:, n_cols:] = NAN, NAN
        labels = labels_for(2, n_cols, device)
        options = {"beta": betas(beta, 2, device), "flows": upstream(2, device=device), "student_softcap": cap}
        got, _ = kernel_gradient(student, teacher, labels, vocab_size=n_cols, **options)
        want, _ = exact_gradient(student[:, :n_cols], teacher[:, :n_cols], labels, **options)
        assert torch.equal(got[:, n_cols:], torch.zeros_like(got[:, n_cols:]))
        assert_gradient(got[:, :n_cols], want, student[:, :n_cols])


@pytest.mark.parametrize("beta", BETAS)
def test_excluded_columns(device, beta):
    """-inf on both sides: 0. On the student's: -p_t under the forward KL, else 0. Masks of finfo.min alike."""
    for low in (-INF, torch.finfo(torch.float32).min):
        student, teacher = logits("normal", 4, 1031, torch.float32, device)
        student[:2, 5:900], teacher[:2, 5:900] = low, low
        student[2, 7] = low
        if beta in (0.0, 0.3):
            teacher[3, 9] = low  # the reverse KL is infinite there
        chosen = torch.tensor([0.0, 1.0, 0.0, 1.0], device=device) if beta == "rows" else beta
        if beta == "rows":
            student[2, 7] = 0.0  # else infinite; its gradient is checked with beta 0
        names = ("divergence", "entropy")
        got, _, _ = check(student, teacher, None, beta=chosen, flows=upstream(4, *names, device=device))
        assert torch.equal(got[:2, 5:900], torch.zeros_like(got[:2, 5:900]))
        if beta == 0.0:
            assert got[2, 7] < 0 or got[2, 7] > 0


def test_no_flow_into_an_infinite_divergence_does_no_harm(device):
    student, teacher = logits("normal", 2, 1031, torch.float32, device)
    teacher[1, 3] = -INF
    flows = {"divergence": torch.tensor([2.0, 0.0], device=device), "entropy": torch.tensor([0.5, 0.5], device=device)}
    got, divergence = kernel_gradient(student, teacher, beta=1.0, flows=flows)
    assert divergence[1] == INF
    want, _ = exact_gradient(student[1:], teacher[1:], flows={"entropy": flows["entropy"][1:]})
    assert_gradient(got[1:], want, student[1:])


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("bad", [NAN, INF, "all -inf"])
def test_a_bad_row_poisons_only_itself(device, bad, side, beta):
    student, teacher = logits("normal", 4, 1031, torch.float32, device)
    options = {"beta": betas(beta, 4, device), "flows": upstream(4, device=device)}
    labels = labels_for(4, 1031, device)
    clean, _ = kernel_gradient(student, teacher, labels, **options)
    touched = student if side == "student" else teacher
    if bad == "all -inf":
        touched[1] = -INF
    else:
        touched[1, 1030] = bad
    got, divergence = kernel_gradient(student, teacher, labels, **options)
    others = torch.tensor([0, 2, 3], device=device)
    assert torch.equal(got[others], clean[others])
    assert divergence[1].isnan()
    assert got[1].isnan().all()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("inplace", [False, True])
def test_rows_of_weight_zero_are_zero_and_not_read(device, beta, inplace):
    """Interpreted, their logits lie in memory that must not be read: the process would die."""
    if device.type == "cpu":
        student, teacher = guarded(3, 1024), guarded(3, 1024)  # one row is one page: the middle one can be forbidden
    else:
        student, teacher = (torch.empty(3, 1024, device=device) for _ in range(2))
    source = logits("normal", 3, 1024, torch.float32, device)
    student.copy_(source[0]), teacher.copy_(source[1])
    student[1], teacher[1] = NAN, INF
    labels = torch.tensor([1, 2**40, 3], device=device)
    weights = torch.tensor([0.5, 0.0, 2.0], device=device)
    options = {"beta": betas(beta, 3, device) * 1.0, "flows": upstream(3, device=device), "temperature": 0.7}
    live = torch.tensor([0, 2], device=device)
    part = {"flows": {k: v[live] for k, v in options["flows"].items()}, "temperature": 0.7}
    part["beta"] = options["beta"][live] if beta == "rows" else beta
    want, exact = exact_gradient(source[0][live], source[1][live], labels[live], **part)
    if device.type == "cpu":
        forbid(teacher[1])
        if not inplace:  # in place the row is written
            forbid(student[1])
    got, divergence = kernel_gradient(student, teacher, labels, weights=weights, inplace=inplace, **options)
    assert torch.equal(got[1], torch.zeros_like(got[1]))
    assert divergence[1] == 0
    assert_gradient(got[live], want, source[0][live])
    torch.testing.assert_close(divergence[live].double().cpu(), exact, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_label_out_of_range_touches_nothing(device, inplace):
    """NaN in its row; interpreted, a store or load beyond the logits would end the process."""
    rows, columns = 4, 1280
    student, teacher = (guarded(rows, columns) if device.type == "cpu" else torch.empty(rows, columns, device=device)
                        for _ in range(2))  # fmt: skip
    source = logits("normal", rows, columns, torch.float32, device)
    flows = upstream(rows, "divergence", "logprob", device=device)
    for bad in (-1, -101, columns, 2**32 + 3, 2**40, -(2**40), 2**62, -(2**63), 2**63 - 1):
        student.copy_(source[0]), teacher.copy_(source[1])
        labels = torch.tensor([bad, 2, -100, bad], device=device)
        got, _ = kernel_gradient(student, teacher, labels, flows=flows, inplace=inplace)
        assert got[[0, 3]].isnan().all(), bad
        want, _ = exact_gradient(
            source[0][1:3], source[1][1:3], labels[1:3], flows={k: v[1:3] for k, v in flows.items()}
        )
        assert_gradient(got[1:3], want, source[0][1:3])
    student.copy_(source[0])
    got, _ = kernel_gradient(student, teacher, torch.tensor([columns - 1, 50, 60, 70], device=device),
                             vocab_size=64, flows=flows)  # fmt: skip
    assert got.isnan().any(-1).tolist() == [True, False, False, True]  # inside the logits, beyond the vocabulary
    assert torch.equal(got[1:3, 64:], torch.zeros_like(got[1:3, 64:]))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("columns", "pad"), [(1024, 16), (1024, 7), (1031, 3)])
def test_strided_rows_in_place(device, columns, pad, beta):
    """The same bits as out of place, and nothing outside of the view changes."""
    whole, teacher = logits("normal", 6, columns + pad, torch.float32, device)
    before = whole.clone()
    student, teacher = whole[::2, pad:], teacher[1:2, :columns].expand(3, columns)  # row stride 0
    labels = labels_for(3, columns, device)
    options = {"beta": betas(beta, 3, device), "flows": upstream(3, device=device)}
    want, _, _ = check(student, teacher, labels, **options)
    got, _ = kernel_gradient(student, teacher, labels, inplace=True, **options)
    assert got.data_ptr() == student.data_ptr()
    torch.testing.assert_close(whole[::2, pad:], want, rtol=1e-6, atol=1e-9)
    assert torch.equal(whole[1::2], before[1::2])
    assert torch.equal(whole[::2, :pad], before[::2, :pad])


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("inplace", [False, True])
def test_offsets_beyond_two_to_the_31(device, inplace, beta):
    """Four rows 2^30 elements apart; the memory between them is reserved but never touched."""
    student = far_apart(4, 40, 2**30, torch.float16, device)
    source, teacher = logits("normal", 4, 40, torch.float16, device)
    student.copy_(source)
    labels = torch.tensor([0, 1, 2, 39], device=device)
    flows = upstream(4, device=device)
    got, divergence = kernel_gradient(student, teacher, labels, beta=beta, flows=flows, inplace=inplace)
    want, exact = exact_gradient(source, teacher, labels, beta=beta, flows=flows)
    assert_gradient(got, want, source)
    torch.testing.assert_close(divergence.double().cpu(), exact, rtol=4e-6, atol=4e-6)
    if inplace:
        assert got.data_ptr() == student.data_ptr()


@pytest.mark.parametrize("beta", BETAS)
def test_a_common_offset_of_1e4_costs_no_digits(device, beta):
    student, teacher = logits("near", 3, 1031, torch.float32, device)
    student, teacher = student + 1e4, teacher + 1e4
    flows = upstream(3, "divergence", device=device)
    got, _ = kernel_gradient(student, teacher, beta=betas(beta, 3, device), flows=flows)
    want, _ = exact_gradient(student, teacher, beta=betas(beta, 3, device), flows=flows)
    assert (got.double().cpu() - want).norm() < 1e-3 * want.norm()  # nearly equal: p (1 + 1e-3) - p


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("beta", BETAS)
def test_few_rows(device, n, beta):
    student, teacher = logits("normal", 1, 1000, torch.float32, device)
    student, teacher = student[:n], teacher[:n]
    options = {"beta": betas(beta, n, device), "flows": upstream(n, device=device)}
    got, divergence = kernel_gradient(student, teacher, torch.full((n,), 5, device=device), **options)
    assert got.shape == (n, 1000)
    assert divergence.shape == (n,)
    if n:
        want, _ = exact_gradient(student, teacher, torch.full((n,), 5, device=device), **options)
        assert_gradient(got, want, student)


def test_a_beta_other_than_zero_or_one_is_nan_in_its_row(device):
    student, teacher = logits("normal", 4, 1031, torch.float32, device)
    beta = torch.tensor([0.0, 0.5, 1.0, NAN], device=device)
    got, divergence = kernel_gradient(student, teacher, beta=beta, flows=upstream(4, "divergence", device=device))
    assert divergence.isnan().tolist() == [False, True, False, True]
    assert got[[1, 3]].isnan().all()
    assert got[[0, 2]].isfinite().all()
