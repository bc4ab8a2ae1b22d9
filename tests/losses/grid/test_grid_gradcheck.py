"""Gradients in float64 against finite differences, on every backend."""

from __future__ import annotations

import pytest
import torch

from caop_fast import distillation_loss

OPTIONS = {
    "plain": {},
    "everything": {"temperature": 0.8, "student_softcap": 3.0, "teacher_softcap": 4.0, "vocab_size": 4},
}


@pytest.mark.parametrize(
    ("beta", "options"), [(0.3, "plain"), *((beta, "everything") for beta in (0.0, 0.3, 1.0, "rows"))]
)
def test_gradcheck(place, beta, options):
    g = torch.Generator().manual_seed(2)
    student = (2 * torch.randn(3, 5, generator=g, dtype=torch.float64)).to(place.device).requires_grad_()
    teacher = (2 * torch.randn(3, 5, generator=g, dtype=torch.float64)).to(place.device)
    labels = torch.tensor([0, 3, -100], device=place.device)
    weights = torch.tensor([0.5, 1.0, 2.0], device=place.device)
    if options == "everything":
        weights[0] = 0
        student.data[0], teacher[0] = 1.0, torch.nan
    chosen = torch.tensor([0.0, 1.0, 0.0], device=place.device) if beta == "rows" else beta

    def outputs(logits):
        found = distillation_loss(
            logits, teacher, labels, beta=chosen, weights=weights, backend=place.backend, **OPTIONS[options]
        )
        return found.loss, found.divergence, found.student_logprob, found.student_entropy

    assert torch.autograd.gradcheck(outputs, (student,))
    assert sum(value.abs().sum() for value in outputs(student)[1:]) > 0.1
