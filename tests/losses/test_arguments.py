"""Bad arguments of distillation_loss raise at once and name the argument."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from caop_fast import distillation_loss
from caop_fast.losses import checks

N, V = 4, 7


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"student_logits": np.zeros((N, V))}, TypeError, "student_logits.*ndarray"),
        ({"student_logits": torch.zeros(N, V, dtype=torch.int64)}, TypeError, "student_logits.*int64"),
        ({"student_logits": torch.zeros(V)}, ValueError, "student_logits.*2 dimensions"),
        ({"student_logits": torch.zeros(N, 0)}, ValueError, "empty"),
        ({"teacher_logits": torch.zeros(N + 1, V)}, ValueError, "teacher_logits"),
        ({"teacher_logits": torch.zeros(N, V + 2)}, ValueError, f"pass vocab_size={V}"),
        ({"teacher_logits": torch.zeros(N, V, device="meta")}, ValueError, "teacher_logits is on meta"),
        ({"labels": torch.zeros(N)}, TypeError, "labels.*float32"),
        ({"labels": [0] * N}, TypeError, "labels.*list"),
        ({"labels": torch.zeros(N + 1, dtype=torch.int64)}, ValueError, "labels.*shape"),
        ({"labels": torch.full((N,), V)}, ValueError, rf"labels.*\[0, {V}\), got {V}"),
        ({"labels": torch.full((N,), -1)}, ValueError, "labels.*got -1"),
        ({"labels": torch.full((N,), 5), "vocab_size": 5}, ValueError, r"labels.*\[0, 5\)"),
        ({"beta": 1.5}, ValueError, r"beta.*\[0, 1\], got 1.5"),
        ({"beta": -0.1}, ValueError, "beta"),
        ({"beta": math.nan}, ValueError, "beta"),
        ({"beta": "forward"}, TypeError, "beta.*str"),
        ({"beta": torch.full((N,), 0.5)}, ValueError, "beta.*got 0.5"),
        ({"beta": torch.zeros(N + 1)}, ValueError, "beta.*shape"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"temperature": -1}, ValueError, "temperature"),
        ({"temperature": math.inf}, ValueError, "temperature"),
        ({"temperature": True}, TypeError, "temperature"),
        ({"temperature": torch.tensor(1.0)}, TypeError, "temperature"),
        ({"weights": torch.full((N,), -1.0)}, ValueError, "weights.*got -1"),
        ({"weights": torch.full((N,), math.nan)}, ValueError, "weights.*nan"),
        ({"weights": torch.full((N,), math.inf)}, ValueError, "weights.*inf"),
        ({"weights": torch.ones(N, 1)}, ValueError, "weights.*shape"),
        ({"weights": [1.0] * N}, TypeError, "weights.*list"),
        ({"student_softcap": 0.0}, ValueError, "student_softcap"),
        ({"teacher_softcap": "x"}, TypeError, "teacher_softcap"),
        ({"vocab_size": 0}, ValueError, "vocab_size"),
        ({"vocab_size": V + 1}, ValueError, "vocab_size"),
        ({"vocab_size": 3.0}, TypeError, "vocab_size"),
        ({"reduction": "batchmean"}, ValueError, "reduction.*'mean'"),
        ({"inplace": 1}, TypeError, "inplace"),
        ({"backend": "cuda"}, ValueError, "backend.*'triton'"),
        ({"validate": "yes"}, TypeError, "validate"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"student_logits": torch.zeros(N, V), "teacher_logits": torch.zeros(N, V)}
    with pytest.raises(error, match=words):
        distillation_loss(**{**arguments, **change})


def test_values_are_checked_where_it_costs_no_synchronisation():
    assert checks.checks_values(None, torch.device("cuda")) is False
    assert checks.checks_values(None, torch.device("cpu")) is True
    assert checks.checks_values(True, torch.device("cuda")) is True
    assert checks.checks_values(False, torch.device("cpu")) is False


def test_boolean_and_integer_weights_are_masks():
    logits, other = torch.randn(N, V), torch.randn(N, V)
    mask = torch.tensor([True, False, True, True])
    want = distillation_loss(logits, other, weights=mask.float()).loss
    assert torch.equal(distillation_loss(logits, other, weights=mask).loss, want)
    assert torch.equal(distillation_loss(logits, other, weights=mask.long()).loss, want)


def test_explicit_weights_override_the_ignored_label():
    logits, other = torch.randn(N, V), torch.randn(N, V)
    labels = torch.tensor([0, -100, 1, 2])
    implied = distillation_loss(logits, other, labels)
    assert implied.divergence[1] == 0
    explicit = distillation_loss(logits, other, labels, weights=torch.ones(N))
    assert explicit.divergence[1] > 0
    assert explicit.student_logprob[1] == 0
