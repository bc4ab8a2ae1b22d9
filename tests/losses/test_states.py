"""Mergeable states: shards of a vocabulary give the statistics of the whole, in either backend."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from caop_fast import finish_state, merge_states, row_state
from caop_fast.losses import states
from caop_fast.losses.batches import DistillationBatch
from caop_fast.losses.options import DivergenceOptions
from helpers.opcheck import opcheck
from helpers.oracle import log_probs

CUTS = ([0, 1031], [0, 500, 1031], [0, 1, 2, 700, 703, 1031])


def make(n=6, vocab=1031, near=None, peak=3.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(4)
    student = torch.randn(n, vocab, generator=g, dtype=torch.float64) * peak
    noise = torch.randn(n, vocab, generator=g, dtype=torch.float64)
    teacher = student + near * noise if near else noise * peak
    return student.to(dtype), teacher.to(dtype), torch.randint(0, vocab, (n,), generator=g)


def sharded(student, teacher, labels, cuts, **options):
    parts = [
        row_state(
            student[:, a:b], teacher[:, a:b], None if labels is None else torch.where(labels < 0, labels, labels - a),
            **options,
        )
        for a, b in pairwise(cuts)
    ]  # fmt: skip
    return finish_state(merge_states(parts), labels)


def truth(student, teacher, labels, temperature=1.0, caps=(None, None)):
    ls, lt = log_probs(student, temperature, caps[0]), log_probs(teacher, temperature, caps[1])
    ps, pt = ls.exp(), lt.exp()

    def lse(z, cap):
        z = z.double()
        return ((z if cap is None else cap * torch.tanh(z / cap)) / temperature).logsumexp(-1)

    picked = [torch.where(labels < 0, 0.0, x.gather(-1, labels.clamp(min=0)[:, None])[:, 0]) for x in (ls, lt)]
    return {
        "forward_kl": (pt * (lt - ls)).sum(-1),
        "reverse_kl": (ps * (ls - lt)).sum(-1),
        "student_lse": lse(student, caps[0]),
        "teacher_lse": lse(teacher, caps[1]),
        "student_logprob": picked[0],
        "teacher_logprob": picked[1],
        "student_entropy": -(ps * ls).sum(-1),
        "teacher_entropy": -(pt * lt).sum(-1),
    }


@pytest.mark.parametrize("cuts", CUTS, ids=lambda c: f"{len(c) - 1} shards")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("temperature", "caps"), [(1.0, (None, None)), (0.7, (8.0, None)), (2.0, (5.0, 20.0))])
def test_shards_equal_the_whole(cuts, dtype, temperature, caps):
    student, teacher, labels = make(dtype=dtype)
    labels[2] = -100
    options = {"temperature": temperature, "student_softcap": caps[0], "teacher_softcap": caps[1]}
    found = sharded(student, teacher, labels, cuts, **options)
    tolerance = 1e-11 if dtype == torch.float64 else 4e-6
    for name, want in truth(student, teacher, labels, temperature, caps).items():
        got = getattr(found, name)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n} {m}")


@pytest.mark.parametrize("near", [1e-3, 3e-2])
def test_near_equal_shards_keep_their_digits(near):
    student, teacher, labels = make(vocab=30000, near=near, peak=2.0)
    found = sharded(student, teacher, labels, [0, 9000, 20001, 30000])
    want = truth(student, teacher, labels)
    for name in ("forward_kl", "reverse_kl"):
        assert (getattr(found, name) >= 0).all()
        assert (getattr(found, name).double() - want[name]).abs().max() < 1e-7


def test_merging_takes_any_order_and_grouping():
    student, teacher, labels = make()
    cuts = [0, 300, 301, 900, 1031]
    parts = [row_state(student[:, a:b], teacher[:, a:b], labels - a) for a, b in pairwise(cuts)]
    whole = finish_state(merge_states(parts), labels)
    grouped = finish_state(merge_states([merge_states(parts[2:]), merge_states(parts[:2])]), labels)
    stacked = finish_state(merge_states(torch.stack(parts[::-1])), labels)
    for other in (grouped, stacked):
        for a, b in zip(whole, other, strict=True):
            torch.testing.assert_close(a, b, rtol=3e-6, atol=3e-6)


def test_excluded_columns_and_shards_without_a_finite_logit():
    student, teacher, labels = make(n=5)
    student[0, :500], teacher[0, :500] = -math.inf, -math.inf  # a whole shard, on both sides
    student[1, 700] = -math.inf  # forward KL infinite, decided in one shard only
    teacher[2, 3] = -math.inf
    student[3] = -math.inf
    student[4, 9] = math.nan
    found = sharded(student, teacher, labels, [0, 500, 1031])
    kept = truth(student[:1, 500:], teacher[:1, 500:], torch.tensor([0]))
    for name in ("forward_kl", "reverse_kl", "student_lse", "teacher_entropy"):
        torch.testing.assert_close(getattr(found, name)[:1].double(), kept[name], rtol=4e-6, atol=4e-6)
    assert found.forward_kl[1] == math.inf
    assert found.reverse_kl[1].isfinite()
    assert found.reverse_kl[2] == math.inf
    assert found.forward_kl[2].isfinite()
    for row in (3, 4):
        assert all(
            getattr(found, n)[row].isnan() for n in ("forward_kl", "reverse_kl", "student_lse", "student_entropy")
        )
        assert found.teacher_lse[row].isfinite()


def test_labels_nobody_holds_and_no_labels():
    student, teacher, _ = make(n=4)
    labels = torch.tensor([5, -100, 4000, -7])
    found = sharded(student, teacher, labels, [0, 500, 1031])
    for value in (found.student_logprob, found.teacher_logprob):
        assert value.isnan().tolist() == [False, False, True, True]
        assert value[1] == 0
    bare = sharded(student, teacher, None, [0, 500, 1031])
    assert bare.student_logprob is None
    assert bare.teacher_logprob is None
    assert torch.equal(bare.forward_kl, found.forward_kl)


def test_the_largest_logit_as_label_is_held():
    """Rounding leaves its exponent a little above the maximum's in every other row."""
    g = torch.Generator().manual_seed(0)
    student = torch.randn(500, 64, generator=g) * 5
    labels = student.argmax(-1)
    found = sharded(student, student + 0.1, labels, [0, 30, 64])
    want = truth(student, student + 0.1, labels)
    torch.testing.assert_close(found.student_logprob.double(), want["student_logprob"], rtol=4e-6, atol=4e-6)
    torch.testing.assert_close(found.teacher_logprob.double(), want["teacher_logprob"], rtol=4e-6, atol=4e-6)


def test_shapes_and_no_rows():
    student, teacher, labels = make(n=6)
    flat = row_state(student, teacher, labels)
    shaped = row_state(student.view(2, 3, -1), teacher.view(2, 3, -1), labels.view(2, 3))
    assert flat.shape == (12, 6)
    assert torch.equal(shaped, flat.view(12, 2, 3))
    assert finish_state(merge_states([shaped, shaped]), labels.view(2, 3)).forward_kl.shape == (2, 3)
    empty = finish_state(merge_states([row_state(student[:0], teacher[:0])]))
    assert empty.forward_kl.shape == (0,)
    student.requires_grad_()
    assert not finish_state(row_state(student, teacher)).forward_kl.requires_grad


def test_compiles_as_one_graph():
    student, teacher, labels = make()

    def f(s):
        return finish_state(merge_states([row_state(s, teacher, labels), row_state(s * 2, teacher)]), labels)

    for a, b in zip(f(student), torch.compile(f, fullgraph=True, backend="aot_eager")(student), strict=True):
        assert torch.equal(a, b)
    batch = DistillationBatch(student, teacher, labels, None)
    opcheck(states._row_state, states.StateInputs(batch, DivergenceOptions(0.0, 0.7, 5.0, None), 1000, "torch"))
    state = row_state(student, teacher, labels)
    opcheck(states._merge_states, states.MergeInputs(torch.stack([state, state]), "torch"))
    opcheck(states._finish_state, states.FinishInputs(state, labels, "torch"))
    opcheck(states._finish_state, states.FinishInputs(state, None, "torch"))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: row_state([[1.0]], s), TypeError, "student_logits"),
        (lambda s: row_state(s, s[:1]), ValueError, "teacher_logits"),
        (lambda s: row_state(s, s[:, :5]), ValueError, "vocab_size"),
        (lambda s: row_state(s, s, torch.zeros(2)), TypeError, "labels"),
        (lambda s: row_state(s, s, temperature=-1.0), ValueError, "temperature"),
        (lambda s: merge_states([]), TypeError, "states"),
        (lambda s: merge_states([torch.zeros(12, 2), torch.zeros(12, 3)]), ValueError, "states must have one shape"),
        (lambda s: merge_states(torch.zeros(12, 2)), ValueError, r"states must have shape \[S, 12, ...\]"),
        (lambda s: merge_states(torch.zeros(0, 12, 2)), ValueError, "states must hold at least one"),
        (lambda s: finish_state(torch.zeros(10, 2)), ValueError, r"state must have shape \[12, ...\]"),
        (lambda s: finish_state(torch.zeros(12, 2, dtype=torch.bfloat16)), TypeError, "state must be float32"),
        (lambda s: finish_state(torch.zeros(12, 2), torch.zeros(3, dtype=torch.int64)), ValueError, "labels"),
        (lambda s: row_state(s, s, backend="gpu"), ValueError, "backend"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 8))
