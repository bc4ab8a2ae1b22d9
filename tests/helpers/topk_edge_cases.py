"""Edges of topk_distillation_loss on every backend: what rows may hold, shapes and strides, reductions, in place.

Run like `topk_cases.py`, with the same fixture ``loss``.
"""

from __future__ import annotations

import math

import pytest
import torch

from helpers.passes import passes
from helpers.topk_oracle import NAMES, make, oracle

INF = math.inf
TAILS = ("bucket", "renormalize", "ignore")


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_row_of_padding_compares_nothing(loss, tail, beta):
    student, ids, logprobs, labels = make(3, 33, 4)
    ids[1], logprobs[1] = -1, 0.5
    found = student.clone().requires_grad_()
    out = loss(found, ids, logprobs, labels, tail=tail, beta=beta)
    assert out.divergence[1] == 0
    assert out.teacher_entropy[1] == 0
    assert out.teacher_logprob[1].isnan()
    out.divergence.sum().backward()
    assert found.grad[1].abs().max() < 1e-8
    assert found.grad[0].abs().max() > 1e-3


@pytest.mark.parametrize("mask", [-INF, torch.finfo(torch.float32).min])
def test_excluded_columns(loss, mask):
    """Row 0: the student excludes a listed id; 1: the teacher does; 2: both; 3: the student excludes one not listed."""
    student, ids, logprobs, _ = make(4, 200, 6)
    student[0, ids[0, 2]] = mask
    logprobs[1, 3] = mask
    student[2, ids[2, 1]] = logprobs[2, 1] = mask
    free = next(j for j in range(200) if j not in ids[3].tolist())
    student[3, free] = mask
    plain_student = student.double().clamp(min=-1e4)
    for tail in TAILS:
        for beta, infinite in (
            (0.0, [True, False, False, False]),
            (1.0, [False, True, False, False]),
            (0.5, [False] * 4),
        ):
            found = student.clone().requires_grad_()
            out = loss(found, ids, logprobs, tail=tail, beta=beta)
            assert (out.divergence == INF).tolist() == infinite, (tail, beta)
            finite = ~torch.tensor(infinite)
            truth = plain_student.clone().requires_grad_()
            want = oracle(truth, ids, logprobs.clamp(min=-1e4), tail=tail, beta=beta)
            torch.testing.assert_close(
                out.divergence[finite].detach().double(), want["divergence"][finite].detach(), rtol=1e-5, atol=1e-6
            )
            torch.testing.assert_close(
                out.student_entropy.detach().double(), want["student_entropy"].detach(), rtol=1e-5, atol=1e-6
            )
            out.divergence[finite].sum().backward()
            want["divergence"][finite].sum().backward()
            torch.testing.assert_close(found.grad.double(), truth.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tail", TAILS)
def test_nan_stays_in_its_row(loss, tail):
    student, ids, logprobs, labels = make(6, 70, 5)
    listed = set(ids[0].tolist())
    student[0, next(j for j in range(70) if j not in listed)] = math.nan
    student[1, ids[1, 2]] = math.nan
    student[2] = -INF
    student[3, 7] = INF
    logprobs[4, 1] = math.nan
    for beta in (0.0, 0.5, 1.0):
        found = student.clone().requires_grad_()
        out = loss(found, ids, logprobs, labels, tail=tail, beta=beta, validate=False)
        assert out.divergence.isnan().tolist() == [True] * 5 + [False]
        assert out.student_entropy.isnan().tolist() == [True] * 4 + [False] * 2
        assert out.teacher_entropy.isnan().tolist() == [False] * 4 + [True, False]
        (out.divergence.sum() + out.student_entropy.sum()).backward()
        assert found.grad.isnan().any(-1).tolist() == [True] * 5 + [False]


def test_rows_of_weight_0_may_hold_anything(loss):
    student, ids, logprobs, labels = make(5, 300, 6)
    clean = student.clone().requires_grad_()
    weights = torch.tensor([1.0, 0, 0, 0, 2])
    want = loss(clean, ids, logprobs, labels, weights=weights)
    (3 * want.loss + want.student_entropy.sum() + want.student_logprob.sum()).backward()
    student[1], ids[1], logprobs[1] = math.nan, 10**6, math.nan
    student[2], ids[2] = INF, -(10**6)
    ids[3], logprobs[3] = 4, 100.0  # the same id six times
    for tail in TAILS:
        for beta in (0.0, 0.3, 1.0):
            found = student.clone().requires_grad_()
            out = loss(found, ids, logprobs, labels, weights=weights, tail=tail, beta=beta)
            for name in NAMES:
                assert getattr(out, name)[1:4].tolist() == [0, 0, 0], name
            (3 * out.loss + out.student_entropy.sum() + out.student_logprob.sum()).backward()
            assert found.grad.isfinite().all()
            assert (found.grad[1:4] == 0).all()
            if tail == "bucket" and beta == 0:
                assert torch.equal(found.grad, clean.grad)
                assert torch.equal(out.loss, want.loss)


@pytest.mark.parametrize("bad", [-2, 90, 91, 2**31, -(2**31) - 1, 2**40 + 5, -(2**62), 2**63 - 1])
def test_an_unvalidated_id_out_of_range_gives_nan_in_its_row(loss, bad):
    student, ids, logprobs, labels = make(3, 90, 4)
    want = loss(student, ids, logprobs, labels)
    ids[1, 2] = bad
    found = student.clone().requires_grad_()
    out = loss(found, ids, logprobs, labels, validate=False)
    for name in NAMES:
        assert getattr(out, name)[1].isnan(), name
        assert torch.equal(getattr(out, name)[::2].nan_to_num(), getattr(want, name)[::2].nan_to_num()), name
    (out.divergence.sum() + out.student_entropy.sum()).backward()
    assert found.grad.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("tail", "dtype"), [("bucket", torch.float32), ("renormalize", torch.float64), ("ignore", torch.bfloat16)]
)
def test_an_unvalidated_id_listed_twice_gives_nan_in_its_row(loss, tail, dtype):
    """Wherever the two stand, however small their share; padding may repeat, and rows of weight 0 hold anything."""
    student, ids, logprobs, labels = make(6, 90, 8, dtype)
    logprobs[:, 5] = -80.0
    ids[0, 1:4] = ids[3, 2:4] = -1
    ids[1, 7], ids[3, 5], ids[4, 4] = ids[1, 0], ids[3, 4], ids[4, 3]
    weights = torch.tensor([1.0, 2, 3, 1, 0, 1])
    found = student.clone().requires_grad_()
    out = loss(found, ids, logprobs, labels, weights=weights, tail=tail, beta=0.3, validate=False)
    twice = [False, True, False, True, False, False]
    for name in ("divergence", "student_logprob", "student_entropy", "teacher_entropy"):
        assert getattr(out, name).isnan().tolist() == twice, name
    assert out.teacher_logprob[[1, 3]].isnan().all()
    assert out.divergence[4] == 0
    assert out.loss.isnan()
    (out.divergence.sum() + out.student_logprob.sum()).backward()
    assert found.grad.isnan().all(-1).tolist() == twice
    assert found.grad[~torch.tensor(twice)].isfinite().all()
    assert (found.grad[4] == 0).all()


@pytest.mark.parametrize("validate", [True, False])
def test_a_call_sorts_the_ids_once(loss, validate):
    """In forward, backward and validation together."""
    student, ids, logprobs, labels = make(4, 90, 8)
    student.requires_grad_()
    found = passes(lambda: loss(student, ids, logprobs, labels, validate=validate).loss.backward())
    assert found.by_name["sort"] == ids.numel()
    assert found.by_name["argsort"] == found.by_name["topk"] == 0


def test_unvalidated_labels_and_betas_give_nan_in_their_rows(loss):
    student, ids, logprobs, labels = make(4, 90, 4)
    labels[0], labels[1] = 90, -1
    beta = torch.tensor([0.0, 1.0, 0.5, -1.0])
    found = student.clone().requires_grad_()
    out = loss(found, ids, logprobs, labels, beta=beta, validate=False)
    assert out.student_logprob.isnan().tolist() == [True, True, False, False]
    assert out.teacher_logprob[:2].isnan().all()
    assert out.divergence.isnan().tolist() == [False, False, True, True]
    out.divergence.sum().backward(retain_graph=True)
    assert found.grad.isnan().any(-1).tolist() == [False, False, True, True]
    found.grad = None
    out.student_logprob.sum().backward()
    assert found.grad.isnan().any(-1).tolist() == [True, True, False, False]


@pytest.mark.parametrize("kind", ["int32", "int16", "transposed", "expanded", "every other"])
def test_ids_of_any_integer_dtype_and_stride(loss, kind):
    student, ids, logprobs, labels = make(4, 100, 6)
    ids[1:], logprobs[1:] = ids[:1], logprobs[:1]
    form = {
        "int32": lambda x: x.to(torch.int32) if x is ids else x,
        "int16": lambda x: x.to(torch.int16) if x is ids else x,
        "transposed": lambda x: x.t().contiguous().t(),
        "expanded": lambda x: x[:1].expand(4, 6),
        "every other": lambda x: torch.stack((x, x), -1).flatten(1)[:, ::2],
    }[kind]
    grads = []
    for these in ((ids, logprobs), (form(ids), form(logprobs))):
        found = student.clone().requires_grad_()
        out = loss(found, *these, labels, beta=0.5)
        out.loss.backward()
        grads.append((out, found.grad))
    assert torch.equal(grads[0][1], grads[1][1])
    assert torch.equal(grads[0][0].divergence, grads[1][0].divergence)


def test_leading_shape_and_strided_logits(loss):
    student, ids, logprobs, labels = make(6, 80, 4)
    flat = loss(student, ids, logprobs, labels)
    wide = torch.randn(2, 3, 100)
    wide[..., 13:93] = student.view(2, 3, 80)
    view = wide.requires_grad_()[..., 13:93]
    out = loss(view, ids.view(2, 3, 4), logprobs.view(2, 3, 4), labels.view(2, 3), reduction="none")
    assert out.loss.shape == out.divergence.shape == out.teacher_logprob.shape == (2, 3)
    torch.testing.assert_close(out.divergence.flatten(), flat.divergence, rtol=2e-6, atol=1e-7)
    out.loss.sum().backward()
    assert (wide.grad[..., :13] == 0).all()
    again = student.clone().requires_grad_()
    loss(again, ids, logprobs, labels, reduction="sum").loss.backward()
    torch.testing.assert_close(wide.grad[..., 13:93].flatten(0, 1), again.grad, rtol=1e-5, atol=1e-7)


def test_columns_apart_in_memory(loss):
    student, ids, logprobs, labels = make(5, 60, 4)
    apart = student.t().contiguous().requires_grad_()
    out = loss(apart.t(), ids, logprobs, labels)
    out.loss.backward()
    dense = student.clone().requires_grad_()
    loss(dense, ids, logprobs, labels).loss.backward()
    torch.testing.assert_close(apart.grad.t(), dense.grad)


@pytest.mark.parametrize("vocab", [1, 1023, 1031])
def test_vocab_size_cuts_the_columns(loss, vocab):
    student, ids, logprobs, labels = make(3, vocab, 1)
    padded = torch.cat((student, torch.full((3, 21), math.nan)), -1).requires_grad_()
    out = loss(padded, ids, logprobs, labels, vocab_size=vocab, beta=0.5)
    want = oracle(student.double(), ids, logprobs, labels, beta=0.5)
    torch.testing.assert_close(out.divergence.detach().double(), want["divergence"], rtol=1e-5, atol=1e-6)
    (out.loss + out.student_entropy.sum()).backward()
    assert (padded.grad[:, vocab:] == 0).all()
    assert padded.grad.isfinite().all()
    ids = torch.full_like(ids, vocab)  # exists, but is not part of the vocabulary
    assert loss(padded, ids, logprobs, vocab_size=vocab, validate=False).divergence.isnan().all()


@pytest.mark.parametrize("n", [0, 1])
def test_no_rows_and_one_row(loss, n):
    student, ids, logprobs, labels = make(2, 50, 3)
    found = student[:n].clone().requires_grad_()
    out = loss(found, ids[:n], logprobs[:n], labels[:n])
    out.loss.backward()
    assert out.divergence.shape == (n,)
    assert found.grad.shape == (n, 50)
    if n == 0:
        assert out.loss == 0
    else:
        want = oracle(student[:1].double(), ids[:1], logprobs[:1])["divergence"]
        torch.testing.assert_close(out.divergence.detach().double(), want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(loss, reduction):
    student, ids, logprobs, _ = make(4, 50, 3)
    weights = torch.tensor([1.0, 0, 2.5, 0.5])
    out = loss(student, ids, logprobs, weights=weights, reduction=reduction)
    weighted = weights * out.divergence
    want = {"mean": weighted.sum() / 4, "sum": weighted.sum(), "none": weighted}[reduction]
    torch.testing.assert_close(out.loss, want)
    if reduction == "mean":
        assert loss(student, ids, logprobs, weights=weights * 0).loss == 0


def test_labels_of_100_have_weight_0_unless_weights_say_otherwise(loss):
    student, ids, logprobs, labels = make(3, 50, 3)
    labels[1] = -100
    out = loss(student, ids, logprobs, labels)
    assert [getattr(out, n)[1].item() for n in NAMES] == [0] * 5
    kept = loss(student, ids, logprobs, labels, weights=torch.ones(3))
    assert kept.divergence[1] > 0
    assert kept.student_logprob[1] == kept.teacher_logprob[1] == 0
    without = loss(student, ids, logprobs)
    assert without.student_logprob is None
    assert without.teacher_logprob is None


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_gives_the_same_gradient(loss, tail, dtype):
    student, ids, logprobs, labels = make(4, 600, 7, dtype, ragged=True)
    grads = []
    for inplace in (False, True):
        leaf = student.clone().requires_grad_()
        logits = leaf * 1
        address = logits.data_ptr()
        out = loss(
            logits, ids, logprobs, labels, tail=tail, beta=1.0, student_softcap=5.0, inplace=inplace,
            weights=torch.tensor([1.0, 0, 2, 3]),
        )  # fmt: skip
        total = out.loss * 3 + out.student_logprob.sum() - out.student_entropy.sum()
        total.backward(retain_graph=True)
        grads.append(leaf.grad.clone())
        if inplace:
            assert logits.data_ptr() == address
            torch.testing.assert_close(logits.detach(), leaf.grad)
            with pytest.raises(RuntimeError):
                total.backward()
        else:
            total.backward()
            torch.testing.assert_close(leaf.grad, 2 * grads[0])
    assert torch.equal(grads[0], grads[1])


def test_double_backward_is_refused(loss):
    student, ids, logprobs, _ = make(2, 30, 3)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(student, ids, logprobs).loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()


def test_autocast_changes_nothing(loss):
    student, ids, logprobs, labels = make(3, 400, 5)
    want = loss(student, ids, logprobs, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = loss(student, ids, logprobs, labels)
    for name in NAMES:
        assert torch.equal(getattr(out, name).nan_to_num(), getattr(want, name).nan_to_num())
