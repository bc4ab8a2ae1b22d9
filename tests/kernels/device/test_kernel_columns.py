"""Blocks of columns on the kernels: rows put together from blocks against float64, and against rows read as a whole."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import caop_kernels
from helpers.kernel_gradients import assert_gradient, kernel_gradient, upstream
from helpers.row_oracle import logits

# `gradients` puts the tests of the losses on the path.
from helpers.column_blocks import BETAS, CUTS, TRITON, beta_of, check_blocks, check_tokens, columns_of  # isort: skip

CHUNKED = (0, 16390, 16391, 20000)  # the first block has two chunks of columns, the next a single column
SOFTCAPS = {"student_softcap": 9.0, "teacher_softcap": 5.0}


@pytest.mark.parametrize("beta", BETAS)
def test_blocks_match_float64(device, beta):
    check_blocks(TRITON, beta, CUTS[1], device, temperature=0.7, **SOFTCAPS)


@pytest.mark.parametrize("beta", [0.3, "rows"])
def test_blocks_of_float64(device, beta):
    check_blocks(TRITON, beta, CUTS[0], device, dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.3, "rows"])
def test_logits_around_1e4(device, beta):
    check_blocks(TRITON, beta, CUTS[1], device, offset=1e4)


def test_narrow_gradients_of_blocks_of_several_chunks(device):
    check_blocks(TRITON, 0.0, CHUNKED, device, gradient_dtype=torch.bfloat16)


def test_a_label_alone(device):
    check_blocks(TRITON, 0.0, CUTS[1], device, names=("logprob",))


def test_one_model(device):
    check_tokens(TRITON, CUTS[1], device, temperature=0.7, softcap=9.0)


@pytest.mark.parametrize("beta", [0.3, "rows"])
def test_blocks_equal_the_whole(device, beta):
    """The kernels as they are called one by one: coefficients once, for labels among all ids."""
    cuts, v = CHUNKED, CHUNKED[-1]
    student, teacher = logits("normal", 4, v, torch.float32, device)
    labels = torch.tensor([0, 16390, -100, v - 1], device=device)
    beta, flows = beta_of(beta, 4, device), upstream(4, device=device)
    interior = isinstance(beta, float) and 0 < beta < 1
    whole, divergence = kernel_gradient(student, teacher, labels, beta=beta, flows=flows)
    blocks = [(student[:, a:b], teacher[:, a:b]) for a, b in pairwise(cuts)]
    local = [columns.local(labels) for columns in columns_of(cuts)]
    states = torch.stack([caop_kernels.row_state(s, t, y) for (s, t), y in zip(blocks, local, strict=True)])
    found = caop_kernels.finish_state(caop_kernels.merge_states(states), labels)
    if interior:
        sums = [
            caop_kernels.mixture_sums(s, t, found.saved_statistics, beta=beta, n_cols=s.shape[1]) for s, t in blocks
        ]
        assert [len(part) for part in sums] == [2, 1, 1]
        got = caop_kernels.finish_mixture(torch.cat(sums), found.saved_statistics, beta=beta)
        torch.testing.assert_close(got, divergence, rtol=2e-6, atol=2e-6)
        added = torch.stack([part.sum(0) for part in sums]).sum(0, keepdim=True)
        torch.testing.assert_close(caop_kernels.finish_mixture(added, found.saved_statistics, beta=beta), got)
    coefficients = caop_kernels.distillation_coefficients(
        found.saved_statistics, n_cols=v, labels=labels, beta=beta, student_entropy=found.student_entropy,
        **{f"grad_{name}": flow for name, flow in flows.items()},
    )  # fmt: skip
    rows = isinstance(beta, torch.Tensor)
    parts = [
        caop_kernels.logit_gradient(
            s, t, coefficients, labels=y, beta=beta if interior else None, ratio=rows or beta > 0,
            teacher=rows or beta == 0, log=True, label=True,
        )
        for (s, t), y in zip(blocks, local, strict=True)
    ]  # fmt: skip
    assert_gradient(torch.cat(parts, 1), whole.double().cpu(), student, relative=8e-6)
