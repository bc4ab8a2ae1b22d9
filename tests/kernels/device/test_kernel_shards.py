"""Mergeable states on the kernels: shards against the float64 oracle of whole rows, and against the PyTorch states."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from caop_fast import finish_state, merge_states, row_state
from helpers.row_oracle import FIELDS, logits, oracle


def sharded(student, teacher, labels, cuts, *, merge="triton", **options):
    parts = []
    for a, b in pairwise(cuts):
        own = torch.where(labels < 0, labels, labels - a)
        parts.append(row_state(student[:, a:b], teacher[:, a:b], own, backend="triton", **options))
    return finish_state(merge_states(parts, backend=merge), labels, backend=merge)


@pytest.mark.parametrize("merge", ["triton", "torch"])
@pytest.mark.parametrize("kind", ["normal", "near", "student_peaked", "teacher_peaked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_shards_equal_the_whole(device, kind, dtype, merge):
    """A state is the same thing in both backends: what the kernel wrote, plain PyTorch can merge and finish."""
    student, teacher = logits(kind, 4, 20000, dtype, device)
    labels = torch.tensor([0, 19999, -100, 17001], device=device)
    options = {"temperature": 0.7, "student_softcap": 30.0}
    found = sharded(student, teacher, labels, [0, 16384, 17001, 17002, 20000], merge=merge, **options)
    want = oracle(student, teacher, labels, **options)
    tolerance = 1e-11 if dtype == torch.float64 else 5e-6
    for name in FIELDS:
        got = getattr(found, name).double().cpu()
        torch.testing.assert_close(got, want[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_excluded_columns_nan_and_foreign_labels(device):
    student, teacher = logits("normal", 6, 3000, torch.float32, device)
    inf = float("inf")
    student[0, :1000], teacher[0, :1000] = -inf, -inf
    student[1, 2000] = -inf
    teacher[2, 5] = -inf
    student[3, 7] = float("nan")
    labels = torch.tensor([1500, 2000, 5, 8, 5000, -7], device=device)
    found = sharded(student, teacher, labels, [0, 1000, 3000])
    want = oracle(student, teacher, labels)
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(found, name).double().cpu(), want[name], rtol=5e-6, atol=5e-6, equal_nan=True, msg=name
        )
    assert found.student_logprob.isnan().tolist() == [False, False, False, True, True, True]
    assert found.student_logprob[1] == -inf


def test_a_row_does_not_depend_on_the_others(device):
    student, teacher = logits("normal", 5, 2000, torch.bfloat16, device)
    labels = torch.tensor([0, 1, 2, 3, 1999], device=device)
    cuts = [0, 700, 2000]
    whole = sharded(student, teacher, labels, cuts)
    order = torch.tensor([3, 0, 4], device=device)
    part = sharded(student[order], teacher[order], labels[order], cuts)
    for a, b in zip(part, whole, strict=True):
        assert torch.equal(a, b[order])
    assert sharded(student[:0], teacher[:0], labels[:0], cuts).forward_kl.shape == (0,)
