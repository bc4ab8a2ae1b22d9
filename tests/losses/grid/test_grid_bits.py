"""The bits of a row: the same alone, permuted, beside other rows, and from run to run."""

from __future__ import annotations

import pytest
import torch

from caop_fast import distillation_loss
from helpers.row_oracle import logits

# Aligned bfloat16 (V divisible by 16), odd strides, and two chunks of columns.
SHAPES = ((1024, torch.bfloat16), (1031, torch.float32), (17000, torch.float32))


def bits(place, beta, rows, student, teacher, labels, weights, flows, **options):
    """Every statistic of some rows and their gradient."""
    leaf = student[rows].clone().requires_grad_()
    out = distillation_loss(
        leaf,
        teacher[rows],
        labels[rows],
        beta=beta[rows] if isinstance(beta, torch.Tensor) else beta,
        weights=weights[rows],
        reduction="none",
        backend=place.backend,
        **options,
    )
    outputs = (out.loss, out.divergence, out.student_logprob, out.student_entropy)
    torch.autograd.backward(outputs, list(flows[:, rows]))
    return [t.detach() for t in (*out, leaf.grad)]


@pytest.mark.parametrize(("vocab", "dtype"), SHAPES, ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.5, "rows"])
def test_a_row_does_not_depend_on_the_others(place, beta, vocab, dtype):
    student, teacher = logits("normal", 6, vocab, dtype, place.device)
    student[4], teacher[4] = torch.nan, torch.inf
    g = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1, -100, vocab - 1, 7, 3], device=place.device)
    weights = torch.tensor([1.0, 0.3, 2.0, 0.7, 0.0, 1.0], device=place.device)
    flows = (torch.randn(4, 6, generator=g) + 3.0).to(place.device)
    if beta == "rows":
        beta = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0], device=place.device)
    rows = [student, teacher, labels, weights, flows]
    whole = bits(place, beta, torch.arange(6, device=place.device), *rows)
    assert all(t.isfinite().all() for t in whole)
    assert (whole[-1][[0, 1, 2, 3, 5]] != 0).any(-1).all()
    for some in ([0, 1, 2, 3, 4, 5], [5, 0, 4, 2, 1, 3, 0], [3], [4, 2]):
        part = bits(place, beta, torch.tensor(some, device=place.device), *rows)
        for got, want in zip(part, whole, strict=True):
            assert torch.equal(got, want[some]), some


def test_rows_far_apart_in_a_large_batch(place):
    """More rows than one program of the merge kernel holds, and than one block of the PyTorch path."""
    n, vocab = (131, 16) if place.backend == "triton" else (700, 1024)
    student, teacher = logits("normal", n, vocab, torch.float32, place.device)
    few = torch.tensor([0, n - 4, 17, n - 3, 127, n - 1], device=place.device)
    leaves = [student.clone().requires_grad_(), student[few].clone().requires_grad_()]
    outs = [
        distillation_loss(leaf, side, beta=0.5, backend=place.backend, reduction="sum")
        for leaf, side in zip(leaves, (teacher, teacher[few]), strict=True)
    ]
    for out in outs:
        out.loss.backward()
    assert torch.equal(outs[0].divergence[few], outs[1].divergence)
    assert torch.equal(outs[0].student_entropy[few], outs[1].student_entropy)
    assert torch.equal(leaves[0].grad[few], leaves[1].grad)
