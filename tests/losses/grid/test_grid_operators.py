"""The operators as PyTorch sees them: opcheck, torch.compile, and what the host reads back from a device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from caop_fast import distillation_loss
from caop_fast.losses import distillation
from caop_fast.losses.batches import DistillationBatch, DistillationGrads
from caop_fast.losses.options import DivergenceOptions, ExecutionConfig
from helpers.opcheck import opcheck

# What makes the host wait for an accelerator: reading a value, or a shape that depends on values.
READS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::masked_select"}


def reads(call: Callable[[], object]) -> Counter[str]:
    """How often ``call`` makes the host read a value of a tensor, also inside of operators; by name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    seen = Counter({event.key: event.count for event in profile.key_averages()})
    assert seen["aten::mul"] > 0  # it was watching
    return Counter({name: count for name, count in seen.items() if name in READS})


def rows(place, n=3, vocab=12):
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(n, vocab, generator=g).to(place.device) for _ in range(2))
    labels = torch.tensor([0, -100, vocab - 1], device=place.device)[:n]
    weights = torch.tensor([1.0, 0.5, 0.0], device=place.device)[:n]
    return student, teacher, labels, weights


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, "rows"])
@pytest.mark.parametrize("inplace", [False, True])
def test_the_host_reads_nothing_back(place, beta, inplace):
    if place.backend == "torch" and place.device.type == "cpu":
        pytest.skip("on the CPU the PyTorch path looks at values on purpose: there they cost nothing")
    student, teacher, labels, weights = rows(place)
    chosen = torch.tensor([0.0, 1, 1], device=place.device) if beta == "rows" else beta
    leaf = student.requires_grad_()

    def step(validate: bool) -> None:
        out = distillation_loss(
            leaf * 1, teacher, labels, beta=chosen, weights=weights, inplace=inplace, validate=validate,
            backend=place.backend,
        )  # fmt: skip
        (out.loss + out.student_logprob.sum() + out.student_entropy.sum()).backward()

    assert not reads(lambda: step(False))
    assert reads(lambda: step(True))["aten::_local_scalar_dense"] >= 2 + (beta == "rows")  # checks of values do read


@pytest.mark.parametrize("case", ["labelled", "bare", "rows"])
def test_opcheck(place, case):
    student, teacher, labels, weights = rows(place)
    options, vocab = DivergenceOptions(0.0, 1.5), 12
    if case == "bare":
        labels, weights, vocab = None, None, 11
        options = DivergenceOptions(0.5, 1.5, student_softcap=4.0)
    if case == "rows":
        options = DivergenceOptions(torch.tensor([1.0, 0.0, 1.0], device=place.device), 1.5)
    batch = DistillationBatch(student.requires_grad_(), teacher, labels, weights)
    inputs = distillation.DistillationInputs(batch, options, vocab, ExecutionConfig(place.backend, validate=True))
    opcheck(distillation.distillation_rows, inputs)
    found = distillation.distillation_rows(inputs)
    saved = found.saved._replace(student_entropy=found.student_entropy.detach())
    grads = DistillationGrads(torch.randn(3, device=place.device), torch.randn(3, device=place.device), None)
    if labels is None:
        grads = grads._replace(student_logprob=None)
    inputs = inputs._replace(batch=batch._replace(student=student.detach()))
    opcheck(distillation.distillation_gradient, distillation.GradientInputs(inputs, saved, grads))


@pytest.mark.parametrize("beta", [0.0, 0.5, "rows"])
def test_fullgraph(place, beta):
    student, teacher, labels, weights = rows(place)
    chosen = torch.tensor([0.0, 1, 0], device=place.device) if beta == "rows" else beta

    def total(logits):
        out = distillation_loss(logits, teacher, labels, beta=chosen, weights=weights, backend=place.backend)
        return 2 * out.loss - out.student_logprob.sum() + 0.3 * out.student_entropy.sum()

    student.requires_grad_()
    eager = total(student)
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")(student)
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)
    (want,), (got,) = torch.autograd.grad(eager, student), torch.autograd.grad(compiled, student)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_another_column_stride(place):
    """Copied for the kernels; the gradient comes back in the order of the original, also in place."""
    student, teacher, labels, _ = rows(place, vocab=40)
    want_in = student.clone().requires_grad_()
    distillation_loss(want_in, teacher, labels, beta=0.5, backend=place.backend).loss.backward()
    for inplace in (False, True):
        leaf = student.t().contiguous().requires_grad_()
        logits = (leaf * 1).t()
        assert logits.stride(1) == 3
        out = distillation_loss(
            logits, teacher.t().contiguous().t(), labels, beta=0.5, inplace=inplace, backend=place.backend
        )
        out.loss.backward()
        torch.testing.assert_close(leaf.grad.t(), want_in.grad, rtol=1e-6, atol=1e-8)
        assert torch.equal(logits.detach(), leaf.grad.t()) == inplace
