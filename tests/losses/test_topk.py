"""topk_distillation_loss in plain PyTorch: the cases of every backend, then arguments, operators and blocks."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from caop_fast.losses import topk
from caop_fast.losses.backends import row_blocks
from caop_fast.losses.batches import DistillationGrads, SavedTopK, TopKBatch
from caop_fast.losses.linear.topk import linear_topk_distillation_loss
from caop_fast.losses.options import ExecutionConfig, TopKOptions
from caop_fast.losses.topk import topk_distillation_loss
from helpers.opcheck import opcheck
from helpers.passes import passes
from helpers.topk_cases import *  # noqa: F403
from helpers.topk_edge_cases import *  # noqa: F403
from helpers.topk_oracle import NAMES, make, oracle


@pytest.fixture
def loss():
    return partial(topk_distillation_loss, backend="torch")


@pytest.fixture
def thorough():
    return True


def good():
    student, ids, logprobs, labels = make(3, 20, 4)
    return {"student_logits": student, "teacher_ids": ids, "teacher_logprobs": logprobs, "labels": labels}


BAD = [
    ({"student_logits": [[0.0]]}, TypeError, "student_logits"),
    ({"student_logits": torch.zeros(20)}, ValueError, "student_logits"),
    ({"student_logits": torch.zeros(3, 20, dtype=torch.int64)}, TypeError, "student_logits"),
    ({"student_logits": torch.zeros(3, 0)}, ValueError, "student_logits"),
    ({"teacher_ids": [[1, 2]]}, TypeError, "teacher_ids"),
    ({"teacher_ids": torch.zeros(3, 4)}, TypeError, "teacher_ids"),
    ({"teacher_ids": torch.zeros(3, 4, dtype=torch.bool)}, TypeError, "teacher_ids"),
    ({"teacher_ids": torch.arange(4)}, ValueError, "teacher_ids"),
    ({"teacher_ids": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, "teacher_ids"),
    ({"teacher_ids": torch.zeros(3, 0, dtype=torch.int64)}, ValueError, "teacher_ids"),
    ({"teacher_ids": torch.zeros(3, 257, dtype=torch.int64)}, ValueError, "teacher_ids.*256"),
    ({"teacher_ids": torch.arange(4, device="meta").expand(3, 4)}, ValueError, "teacher_ids"),
    ({"teacher_logprobs": None}, TypeError, "teacher_logprobs"),
    ({"teacher_logprobs": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "teacher_logprobs"),
    ({"teacher_logprobs": torch.zeros(3, 5)}, ValueError, "teacher_logprobs"),
    ({"teacher_ids": torch.tensor([[1, 2, 3, 20]] * 3)}, ValueError, r"teacher_ids.*\[0, 20\).*20"),
    ({"teacher_ids": torch.tensor([[1, 2, 3, -2]] * 3)}, ValueError, "teacher_ids.*-2"),
    ({"teacher_ids": torch.tensor([[1, 2, 3, 1]] * 3)}, ValueError, "teacher_ids.*distinct.*1 twice"),
    ({"teacher_logprobs": torch.full((3, 4), 0.125)}, ValueError, "teacher_logprobs.*0.125"),
    ({"teacher_logprobs": torch.full((3, 4), math.nan)}, ValueError, "teacher_logprobs.*nan"),
    ({"labels": torch.tensor([0, 1])}, ValueError, "labels"),
    ({"labels": torch.tensor([0, 1, 20])}, ValueError, "labels.*20"),
    ({"labels": torch.zeros(3)}, TypeError, "labels"),
    ({"tail": "drop"}, ValueError, "tail.*bucket.*drop"),
    ({"tail": None}, ValueError, "tail"),
    ({"beta": 1.5}, ValueError, "beta"),
    ({"beta": math.nan}, ValueError, "beta"),
    ({"beta": torch.tensor([0.0, 0.5, 1.0])}, ValueError, "beta"),
    ({"beta": torch.zeros(2)}, ValueError, "beta"),
    ({"temperature": 0}, ValueError, "temperature"),
    ({"student_softcap": -1.0}, ValueError, "student_softcap"),
    ({"vocab_size": 21}, ValueError, "vocab_size"),
    ({"vocab_size": 5.0}, TypeError, "vocab_size"),
    ({"weights": torch.tensor([1.0, -1.0, 0.0])}, ValueError, "weights"),
    ({"weights": torch.tensor([1.0, math.nan, 0.0])}, ValueError, "weights"),
    ({"weights": torch.ones(2)}, ValueError, "weights"),
    ({"reduction": "batchmean"}, ValueError, "reduction"),
    ({"inplace": 1}, TypeError, "inplace"),
    ({"backend": "cuda"}, ValueError, "backend"),
    ({"validate": 1}, TypeError, "validate"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[f"{i}-{b[2]}" for i, b in enumerate(BAD)])
def test_bad_input_is_refused(change, error, message):
    topk_distillation_loss(**good())
    with pytest.raises(error, match=message):
        topk_distillation_loss(**{**good(), **change})


def test_padding_may_repeat_and_hold_any_logprob():
    arguments = good()
    arguments["teacher_ids"][:, 1:3] = -1
    arguments["teacher_logprobs"][:, 1], arguments["teacher_logprobs"][:, 2] = math.nan, 5.0
    assert topk_distillation_loss(**arguments).divergence.isfinite().all()


def test_a_rounded_logprob_above_0_is_accepted():
    arguments = good()
    arguments["teacher_logprobs"] = torch.tensor([[5e-4, -20.0, -21.0, -30.0]] * 3)
    assert topk_distillation_loss(**arguments, beta=1.0).divergence.isfinite().all()


def test_in_place_on_a_leaf_is_refused():
    arguments = good()
    leaf = arguments["student_logits"].requires_grad_()
    for logits in (leaf, leaf[:, :], leaf.view(3, 20)):
        with pytest.raises(ValueError, match=r"student_logits.*leaf"):
            topk_distillation_loss(**{**arguments, "student_logits": logits}, inplace=True)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "ignore"])
def test_blocks_of_rows_join(monkeypatch, tail):
    student, ids, logprobs, labels = make(7, 100, 5, ragged=True)
    weights = torch.tensor([1.0, 0, 2, 3, 0, 1, 1])
    results = []
    for elements in (1 << 19, 250):  # all rows at once, two rows at a time
        monkeypatch.setattr(row_blocks, "CPU_BLOCK_ELEMENTS", elements)
        found = student.clone().requires_grad_()
        beta = torch.tensor([0.0, 1, 1, 0, 1, 0, 1])
        out = topk_distillation_loss(found, ids, logprobs, labels, tail=tail, beta=beta, weights=weights)
        (out.loss + out.student_entropy.sum() + out.student_logprob.sum()).backward()
        results.append([*(getattr(out, n).nan_to_num() for n in NAMES), found.grad])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "ignore"])
@pytest.mark.parametrize("with_labels", [True, False])
def test_operators_are_registered_soundly(tail, with_labels):
    student, ids, logprobs, _ = make(3, 15, 4, torch.float64)
    labels = ids[:, 0].contiguous() if with_labels else None  # listed: NaN would not equal itself below
    beta = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64) if with_labels else None
    batch = TopKBatch(student.requires_grad_(), ids, logprobs, labels, None)
    options = TopKOptions(tail, 0.3 if beta is None else beta, 1.5, 4.0)
    inputs = topk.TopKInputs(batch, options, 15, ExecutionConfig("torch", validate=True))
    opcheck(topk.topk_rows, inputs)
    found = topk.topk_rows(inputs)
    d = torch.ones(3, dtype=torch.float64)
    inputs = inputs._replace(batch=batch._replace(student=student.detach().clone()))
    saved = SavedTopK(found.saved_statistics, found.student_entropy.detach())
    grads = DistillationGrads(d, d if with_labels else None, None)
    opcheck(topk.topk_gradient, topk.GradientInputs(inputs, saved, grads))


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_without_graph_breaks(inplace):
    student, ids, logprobs, labels = make(4, 50, 5, ragged=True)

    def total(leaf, beta, labels):
        out = topk_distillation_loss(
            leaf * 1.0, ids, logprobs, labels, beta=beta, temperature=0.8, student_softcap=9.0, inplace=inplace
        )
        extra = 0.0 if labels is None else out.student_logprob.sum()
        return 2 * out.loss + out.student_entropy.sum() + extra

    for beta, y in ((0.3, labels), (torch.tensor([0.0, 1, 0, 1]), labels), (1.0, None)):
        torch._dynamo.reset()
        grads, values = [], []
        for function in (total, torch.compile(total, fullgraph=True, backend="aot_eager")):
            leaf = student.clone().requires_grad_()
            value = function(leaf, beta, y)
            value.backward()
            values.append(value.detach())
            grads.append(leaf.grad)
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*grads)


def test_only_the_student_gets_a_gradient():
    student, ids, logprobs, _ = make(2, 20, 3)
    logprobs.requires_grad_()
    out = topk_distillation_loss(student, ids, logprobs)
    assert not out.loss.requires_grad
    out = topk_distillation_loss(student.requires_grad_(), ids, logprobs)
    out.loss.backward()
    assert logprobs.grad is None
    assert not out.teacher_entropy.requires_grad


def test_wide_logprobs_make_wide_statistics():
    student, ids, logprobs, labels = make(3, 40, 4, torch.bfloat16, lp_dtype=torch.float64)
    out = topk_distillation_loss(student, ids, logprobs, labels)
    want = oracle(student.double(), ids, logprobs, labels)
    for name in NAMES:
        assert getattr(out, name).dtype == torch.float64
        torch.testing.assert_close(getattr(out, name), want[name], rtol=1e-12, atol=1e-12, equal_nan=True)


def test_the_linear_loss_sorts_once_and_finds_a_repeated_id_in_any_chunk():
    _, ids, logprobs, _ = make(5, 30, 4)
    ids[3, 2] = ids[3, 0]
    hidden, head = torch.randn(5, 8, requires_grad=True), torch.randn(30, 8)
    outputs = []

    def call():
        outputs.append(
            linear_topk_distillation_loss(hidden, head, ids, logprobs, chunk_size=2, validate=False, backend="torch")
        )
        outputs[0].loss.backward()

    assert passes(call).by_name["sort"] == ids.numel()
    assert outputs[0].divergence.isnan().tolist() == [False, False, False, True, False]
    assert hidden.grad.isnan().all(-1).tolist() == [False, False, False, True, False]


def test_narrow_ids_and_overlapping_logits():
    logits = torch.randn(2, 40000)
    ids = torch.tensor([[13531, 5, 32000], [7, 300, 9]])
    logprobs = torch.tensor([[-1.0, -2.0, -3.0]] * 2)
    want = topk_distillation_loss(logits, ids, logprobs)
    got = topk_distillation_loss(logits, ids.to(torch.int16), logprobs)
    assert torch.equal(want.divergence, got.divergence)
    leaf = torch.randn(1, 60, requires_grad=True)
    for overlapping in ((leaf * 1).expand(2, 60), (leaf[0] * 1).unfold(0, 50, 1)[:2]):
        with pytest.raises(ValueError, match="student_logits is expanded or overlaps"):
            topk_distillation_loss(overlapping, ids % 50, logprobs, inplace=True, validate=False)
