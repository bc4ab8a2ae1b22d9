from __future__ import annotations

import pytest
import torch

from caop_fast.training import EmaTeacher


def nudge(model, amount):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(amount)


def test_the_average_moves_rate_of_the_way_from_the_first_update_on(model):
    start = [p.detach().clone() for p in model.parameters()]
    teacher = EmaTeacher(model, 0.1)
    nudge(model, 1.0)
    for updates in (1, 2, 3):
        teacher.update(model)
        for p, s in zip(teacher.model.parameters(), start, strict=True):
            torch.testing.assert_close(p, s + (1 - 0.9**updates), atol=1e-5, rtol=1e-5)


def test_rate_zero_never_moves(model):
    teacher = EmaTeacher(model, 0.0)
    before = [p.clone() for p in teacher.model.parameters()]
    nudge(model, 1.0)
    teacher.update(model)
    assert all(torch.equal(p, b) for p, b in zip(teacher.model.parameters(), before, strict=True))


def test_the_copy_shares_nothing_and_takes_no_gradient(model):
    teacher = EmaTeacher(model, 0.5)
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in teacher.model.parameters()}
    assert teacher.model.lm_head.weight is teacher.model.model.embed_tokens.weight  # tied, as the student's


@pytest.mark.parametrize("rate", [-0.1, 1.0, 2])
def test_rate_out_of_range(model, rate):
    with pytest.raises(ValueError, match="rate must lie in"):
        EmaTeacher(model, rate)
