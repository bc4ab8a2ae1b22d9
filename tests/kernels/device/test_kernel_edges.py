"""Infinities, NaN, strides, sizes, labels out of range, and the independence of rows."""

from __future__ import annotations

import pytest
import torch

import caop_kernels
from helpers.guarded_memory import far_apart, forbid, guarded
from helpers.row_oracle import FIELDS, logits, oracle

INF = float("inf")


def assert_close(found, expected, names=FIELDS):
    for name in names:
        value = getattr(found, name)
        torch.testing.assert_close(
            value.double().cpu(),
            expected[name],
            rtol=4e-6,
            atol=4e-6,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("v", [1031, 20000])
def test_columns_both_sides_exclude_contribute_nothing(device, v):
    student, teacher = logits("normal", 3, v, torch.float32, device)
    for logit in (student, teacher):
        logit[0, 1::2] = -INF
        logit[1, : v - 5] = -INF  # whole tiles, and at V = 20000 a whole chunk
        logit[2, 5:] = -INF
    labels = torch.tensor([1, v - 1, 0], device=device)
    found = caop_kernels.row_statistics(student, teacher, labels)
    assert_close(found, oracle(student, teacher, labels))
    assert found.student_logprob[0] == -INF
    assert torch.isfinite(found.forward_kl).all()


@pytest.mark.parametrize("gap", [0.0, 20.0, 69.0, 300.0])
def test_a_column_one_side_excludes_makes_that_divergence_infinite(device, gap):
    """However small the other side's probability there is: e^-69 is 1e-30, e^-300 underflows in float32."""
    student, teacher = logits("normal", 3, 20000, torch.float32, device)
    student[0, 7], teacher[0, 7] = -INF, -gap
    student[1, 17000], teacher[1, 17000] = -gap, -INF
    student[2, 7], teacher[2, 7] = -INF, -gap
    student[2, 9], teacher[2, 9] = -gap, -INF
    found = caop_kernels.row_statistics(student, teacher)
    forward, reverse = found.forward_kl.tolist(), found.reverse_kl.tolist()
    assert [forward[0], forward[2]] == [INF, INF]
    assert [reverse[1], reverse[2]] == [INF, INF]
    expected = oracle(student, teacher)
    assert_close(found, expected, ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy", "student_lse"))
    assert 0 < forward[1] < 100
    assert 0 < reverse[0] < 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_mask_of_finfo_min_acts_as_minus_infinity(device, dtype):
    student, teacher = logits("normal", 2, 1031, dtype, device)
    kept = student[:, :500].clone(), teacher[:, :500].clone()
    student[:, 500:] = torch.finfo(torch.bfloat16).min
    teacher[:, 500:] = torch.finfo(torch.bfloat16).min
    assert_close(caop_kernels.row_statistics(student, teacher, None), oracle(*kept), FIELDS[:4] + FIELDS[6:])


@pytest.mark.parametrize("bad", [float("nan"), INF])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_a_bad_row_poisons_only_itself(device, bad, side, softcap):
    student, teacher = logits("normal", 4, 1031, torch.float32, device)
    labels = torch.tensor([3, 4, 5, 6], device=device)
    options = {"student_softcap": softcap, "teacher_softcap": softcap}
    clean = caop_kernels.row_statistics(student, teacher, labels, **options)
    if side != "teacher":
        student[1, 1030] = bad
    if side != "student":
        teacher[1, 1030] = bad
    found = caop_kernels.row_statistics(student, teacher, labels, **options)
    others = torch.tensor([0, 2, 3], device=device)
    for name in FIELDS:
        assert torch.equal(getattr(found, name)[others], getattr(clean, name)[others]), name
        if bad == INF and softcap:
            continue  # softcap(+inf) is the cap, an ordinary logit
        touched = name.endswith("_kl") or side == "both" or name.startswith(side)
        assert bool(getattr(found, name)[1].isnan()) == touched, name


def test_a_row_of_minus_infinity_is_nan(device):
    student, teacher = logits("normal", 3, 1031, torch.float32, device)
    student[0], teacher[1] = -INF, -INF
    found = caop_kernels.row_statistics(student, teacher, torch.tensor([1, 1, 1], device=device))
    for name in FIELDS:
        value = getattr(found, name)
        divergence = name.endswith("_kl")
        assert bool(value[0].isnan()) == (divergence or name.startswith("student")), name
        assert bool(value[1].isnan()) == (divergence or name.startswith("teacher")), name
        assert not value[2].isnan(), name


def test_a_row_does_not_depend_on_the_others(device):
    """Bits: alone, permuted, and with rows added in front or taken away; and from run to run."""
    for v, dtype in ((1031, torch.bfloat16), (17000, torch.float32)):
        student, teacher = logits("normal", 5, v, dtype, device)
        labels = torch.tensor([0, 1, 2, 3, v - 1], device=device)
        whole = caop_kernels.row_statistics(student, teacher, labels)
        order = torch.tensor([3, 0, 4, 2, 1, 0], device=device)
        permuted = caop_kernels.row_statistics(student[order], teacher[order], labels[order])
        alone = caop_kernels.row_statistics(student[3:4], teacher[3:4], labels[3:4])
        again = caop_kernels.row_statistics(student, teacher, labels)
        for name in FIELDS:
            value = getattr(whole, name)
            assert torch.equal(getattr(permuted, name), value[order]), name
            assert torch.equal(getattr(alone, name), value[3:4]), name
            assert torch.equal(getattr(again, name), value), name


@pytest.mark.parametrize(("columns", "pad"), [(1024, 16), (1024, 7), (1031, 3)])
def test_strided_rows(device, columns, pad):
    student, teacher = logits("normal", 4, columns + pad, torch.float32, device)
    labels = torch.tensor([0, 1, 2, columns - 1], device=device)
    views = student[::2, pad:], teacher[1::2, :columns]  # the first starts off a 16-byte boundary
    found = caop_kernels.row_statistics(*views, labels[:2])
    assert_close(found, oracle(*views, labels[:2]))
    one = teacher[:1, :columns].expand(4, columns)  # row stride 0
    assert_close(
        caop_kernels.row_statistics(student[:, :columns], one, labels), oracle(student[:, :columns], one, labels)
    )


@pytest.mark.parametrize("kind", ["column of a matrix", "expanded", "every third"])
def test_strided_labels(device, kind):
    student, teacher = logits("normal", 4, 1031, torch.float32, device)
    table = torch.arange(4 * 3, device=device).view(4, 3) * 7
    labels = {
        "column of a matrix": table[:, 0],
        "expanded": torch.tensor([7], device=device).expand(4),
        "every third": table.t().reshape(-1)[::3],
    }[kind]
    assert not labels.is_contiguous()
    found = caop_kernels.row_statistics(student, teacher, labels)
    assert_close(found, oracle(student, teacher, labels.clone()))


def test_unequal_vocabularies_compare_the_shared_ids(device):
    student, teacher = logits("normal", 3, 1100, torch.float32, device)
    student = student[:, :1040].contiguous()
    student[:, 1031:] = float("nan")  # padding is not even looked at
    labels = torch.tensor([1030, 1031, 5], device=device)
    found = caop_kernels.row_statistics(student, teacher, labels, vocab_size=1031)
    expected = oracle(student[:, :1031], teacher[:, :1031], labels)
    assert_close(found, expected)
    assert found.student_logprob[1].isnan()


def test_no_rows_and_one_row(device):
    student, teacher = logits("normal", 1, 1000, torch.float32, device)
    label = torch.tensor([4], device=device)
    assert_close(caop_kernels.row_statistics(student, teacher, label), oracle(student, teacher, label))
    empty = caop_kernels.row_statistics(student[:0], teacher[:0], label[:0])
    assert all(getattr(empty, name).shape == (0,) for name in FIELDS)


def test_a_label_out_of_range_reads_nothing(device):
    """The process would die of a segmentation fault if a label reached past the logits."""
    if device.type != "cpu":
        pytest.skip("guard pages exist for host memory only")
    rows, columns = 4, 1280  # not a whole tile: the masked tail ends at the guard as well
    student, teacher = guarded(rows, columns), guarded(rows, columns)
    student.copy_(torch.randn(rows, columns))
    teacher.copy_(torch.randn(rows, columns))
    for bad in (-1, -99, -101, columns, columns + 5, 2**40, -(2**40), 2**62, -(2**63), 2**63 - 1):
        labels = torch.tensor([bad, 2, -100, bad])
        found = caop_kernels.row_statistics(student, teacher, labels)
        expected = oracle(student, teacher, labels)
        for name in ("student_logprob", "teacher_logprob"):
            assert getattr(found, name).isnan().tolist() == [True, False, False, True], bad
            assert getattr(found, name)[2] == 0
        assert_close(found, expected)


def test_offsets_beyond_two_to_the_31(device):
    """Four rows 2^30 elements apart; the memory between them is reserved but never touched."""
    student = far_apart(4, 40, 2**30, torch.float16, device)
    source, teacher = logits("normal", 4, 40, torch.float16, device)
    student.copy_(source)
    labels = torch.tensor([0, 1, 2, 39], device=device)
    assert_close(caop_kernels.row_statistics(student, teacher, labels), oracle(source, teacher, labels))


@pytest.mark.parametrize("asked", [FIELDS, ("forward_kl",), ("student_logprob", "teacher_entropy")])
def test_rows_of_weight_zero_report_zero_and_are_not_read(device, asked):
    """Interpreted, their logits lie in memory that must not be read: the process would die."""
    student, teacher = logits("normal", 4, 1024, torch.float32, device)
    weights = torch.tensor([0.25, 0.0, 3.0, 0.0], device=device)
    labels = torch.tensor([5, 2**40, -100, 6], device=device)
    live = torch.tensor([0, 2], device=device)
    expected = oracle(student[live], teacher[live], labels[live])
    if device.type == "cpu":
        fenced = guarded(4, 1024), guarded(4, 1024)
        for area, side in zip(fenced, (student, teacher), strict=True):
            area.copy_(side)
            forbid(area[1])
            forbid(area[3])
        student, teacher = fenced
    else:
        student[1], teacher[3], student[3] = float("nan"), INF, float("nan")
    found = caop_kernels.row_statistics(
        student, teacher, labels, weights=weights, statistics=asked, saved_statistics=True
    )
    for name in asked:
        value = getattr(found, name)
        assert value[[1, 3]].tolist() == [0, 0], name
        torch.testing.assert_close(value[live].double().cpu(), expected[name], rtol=4e-6, atol=4e-6)
    assert (found.saved_statistics[:, [1, 3]] == 0).all()
    assert found.saved_statistics[:, live].isfinite().all()


def test_weights_change_nothing_but_which_rows_count(device):
    student, teacher = logits("normal", 3, 1031, torch.float32, device)
    plain = caop_kernels.row_statistics(student, teacher)
    weighted = caop_kernels.row_statistics(student, teacher, weights=torch.tensor([0.1, 7.0, 1e-30], device=device))
    for name in ("forward_kl", "reverse_kl", "student_lse", "student_entropy"):
        assert torch.equal(getattr(weighted, name), getattr(plain, name)), name


GOOD = {"student_logits": torch.zeros(2, 8), "teacher_logits": torch.zeros(2, 8), "labels": torch.tensor([0, 1])}
BAD = {
    "dtype": {"teacher_logits": torch.zeros(2, 8, dtype=torch.int32)},
    "dimensions": {"student_logits": torch.zeros(8)},
    "no column": {"student_logits": torch.zeros(2, 0), "teacher_logits": torch.zeros(2, 0)},
    "rows": {"teacher_logits": torch.zeros(3, 8)},
    "columns": {"teacher_logits": torch.zeros(2, 9)},
    "column stride": {"teacher_logits": torch.zeros(8, 2).t()},
    "device": {"teacher_logits": torch.zeros(2, 8, device="meta")},
    "dtype of labels": {"labels": torch.tensor([0, 1], dtype=torch.int32)},
    "number of labels": {"labels": torch.tensor([0, 1, 2])},
    "device of labels": {"labels": torch.tensor([0, 1], device="meta")},
    "temperature 0": {"temperature": 0.0},
    "temperature NaN": {"temperature": float("nan")},
    "softcap": {"student_softcap": -1.0},
    "softcap 0": {"teacher_softcap": 0.0},
    "no vocabulary": {"vocab_size": 0},
    "vocabulary beyond the logits": {"vocab_size": 9},
    "number of weights": {"weights": torch.zeros(3)},
    "shape of beta": {"beta": torch.zeros(2, 1)},
    "beta without a teacher": {"beta": torch.zeros(2), "teacher_logits": None},
    "statistics without a teacher": {"teacher_logits": None, "statistics": ("forward_kl",)},
    "unknown statistics": {"statistics": ("forward",)},
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_what_would_read_out_of_bounds_or_be_silently_wrong_is_asserted(device, change):
    arguments = {
        n: a.to(device) if isinstance(a, torch.Tensor) and a.device.type != "meta" else a
        for n, a in {**GOOD, **change}.items()
    }
    with pytest.raises(AssertionError):
        caop_kernels.row_statistics(**arguments)
