"""Blocks of columns in plain PyTorch: a vocabulary of which one sees a part at a time, as the linear losses do."""

from __future__ import annotations

import math

import pytest
import torch

from caop_fast.losses.batches import Columns, DistillationBatch
from caop_fast.losses.options import DivergenceOptions
from caop_fast.losses.reference import states
from helpers.column_blocks import (
    BETAS,
    CUTS,
    FIELDS,
    GOOD,
    INF,
    NAN,
    TORCH,
    V,
    beta_of,
    case,
    check_blocks,
    check_tokens,
    columns_of,
    gradient_in_blocks,
    grads_of,
    rows_in_blocks,
)
from helpers.gradient_oracle import assert_gradient, exact_gradient, upstream

CPU = torch.device("cpu")


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_blocks_match_float64(beta, cuts, dtype, offset):
    check_blocks(TORCH, beta, cuts, CPU, dtype=dtype, offset=offset)


@pytest.mark.parametrize(("beta", "name"), [*((b, "divergence") for b in BETAS), (0.0, "logprob"), (0.0, "entropy")])
def test_one_output_at_a_time(beta, name):
    check_blocks(TORCH, beta, CUTS[1], CPU, names=(name,))


@pytest.mark.parametrize("beta", BETAS)
def test_temperature_and_softcaps(beta):
    check_blocks(TORCH, beta, CUTS[0], CPU, temperature=0.7, student_softcap=9.0, teacher_softcap=5.0)


@pytest.mark.parametrize("beta", BETAS)
def test_blocks_equal_the_whole(beta):
    """Also in rows that are bad."""
    cuts = CUTS[1]
    student, teacher, labels = case(torch.float32, 0.0, cuts, CPU)
    options = DivergenceOptions(beta_of(beta, len(labels), CPU))
    flows = upstream(len(labels))
    found = rows_in_blocks(TORCH, student, teacher, labels, cuts, options)
    got = gradient_in_blocks(TORCH, student, teacher, labels, cuts, options, found, flows)
    whole = TORCH.distillation_rows(DistillationBatch(student, teacher, labels, None), options, V, torch.float32)
    want = gradient_in_blocks(TORCH, student, teacher, labels, (0, V), options, whole, flows)
    for name in FIELDS:
        torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=5e-6, atol=5e-6, equal_nan=True)
    assert torch.equal(got.isnan(), want.isnan())
    assert_gradient(got[:GOOD], want[:GOOD].double(), student[:GOOD], relative=8e-6)


def test_what_rounding_leaves_out_of_a_shift_is_in_the_partition_sums():
    """At 1e4 a float32 shift in nats is up to 5e-4 away from the maximum in log2 units that the sums refer to."""
    student, teacher, labels = (t[:GOOD] for t in case(torch.float32, 1e4, CUTS[0], CPU))
    state = states.row_state(student, teacher, labels, DivergenceOptions(), torch.float32)
    found = states.saved_statistics(state)
    for side, m, shift, total in zip((student, teacher), state, found, found[2:], strict=False):
        assert 2e-4 < (shift.double() - m.double() * math.log(2)).abs().max() < 6e-4
        probabilities = (side.double() - shift.double()[:, None]).exp() / total.double()[:, None]
        torch.testing.assert_close(probabilities.sum(-1), torch.ones_like(probabilities[:, 0]), rtol=3e-7, atol=0)
    torch.testing.assert_close(found[4].double(), (found[2].double() / found[3].double()).log(), rtol=1e-6, atol=3e-7)


@pytest.mark.parametrize("beta", BETAS)
def test_rows_of_weight_zero(beta):
    """They are never touched: their gradient is 0 whatever they hold, and that of the others is what it was."""
    cuts = CUTS[0]
    student, teacher, labels = case(torch.float32, 0.0, cuts, CPU)
    options = DivergenceOptions(beta_of(beta, len(labels), CPU))
    found = rows_in_blocks(TORCH, student, teacher, labels, cuts, options)
    flows = upstream(len(labels))
    weights = torch.ones(len(labels))
    weights[2] = weights[GOOD:] = 0
    want = gradient_in_blocks(TORCH, student, teacher, labels, cuts, options, found, flows)
    got = gradient_in_blocks(TORCH, student, teacher, labels, cuts, options, found, flows, weights=weights)
    masked = weights == 0
    assert torch.equal(got[masked], torch.zeros_like(got[masked]))
    assert torch.equal(got[~masked], want[~masked])


@pytest.mark.parametrize("beta", [1.0, "rows"])
def test_an_upstream_gradient_of_0_keeps_an_infinite_divergence_harmless(beta):
    """Neither in the block that makes it infinite, nor in one that looks harmless by itself."""
    cuts = CUTS[0]
    student, teacher, labels = (t[:4] for t in case(torch.float32, 0.0, cuts, CPU))
    teacher[1, 3], teacher[3, 900] = -INF, -INF
    options = DivergenceOptions(beta_of(beta, 4, CPU))
    flows = upstream(4)
    flows["divergence"][1] = flows["divergence"][3] = 0.0
    found = rows_in_blocks(TORCH, student, teacher, labels, cuts, options)
    got = gradient_in_blocks(TORCH, student, teacher, labels, cuts, options, found, flows)
    assert found.divergence.tolist()[1::2] == [INF, INF]
    teacher[1, 3], teacher[3, 900] = 0.0, 0.0
    want, _ = exact_gradient(student, teacher, labels, flows=flows, beta=options.beta)
    assert_gradient(got, want, student)


def test_a_block_may_be_a_part_of_a_buffer_and_its_gradient_narrower_or_over_it():
    cuts = CUTS[0]
    student, teacher, labels = (t[:6] for t in case(torch.float32, 0.0, cuts, CPU))
    flows, options = upstream(6), DivergenceOptions()
    found = rows_in_blocks(TORCH, student, teacher, labels, cuts, options)
    want = gradient_in_blocks(TORCH, student, teacher, labels, cuts, options, found, flows)
    half = gradient_in_blocks(TORCH, student, teacher, labels, cuts, options, found, flows, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, want.bfloat16())
    columns = columns_of(cuts)[1]
    block = torch.full((6, columns.width + 5), NAN)
    block[:, : columns.width] = columns.of(student)
    batch = DistillationBatch(block, columns.of(teacher), labels, None)
    over = TORCH.distillation_gradient(batch, options, columns, found.saved, grads_of(flows), block)
    assert over is block
    assert torch.equal(block[:, : columns.width], columns.of(want))
    assert torch.equal(block[:, columns.width :], torch.zeros(6, 5))


def test_the_empty_state_adds_nothing():
    student, teacher, labels = (t[:GOOD] for t in case(torch.float32, 1e4, CUTS[0], CPU))
    state = states.row_state(student, teacher, labels, DivergenceOptions(), torch.float32)
    nothing = states.empty_state(len(labels), torch.float32, CPU)
    for both in ((nothing, state), (state, nothing)):
        torch.testing.assert_close(states.merge_states(torch.stack(both)), state, rtol=0, atol=0)
    assert torch.equal(states.merge_states(torch.stack([nothing, nothing])), nothing)


def test_columns_of_columns():
    some = Columns(100, 50, 1000).within(slice(10, 30))
    assert some == Columns(110, 20, 1000)
    assert some.local(torch.tensor([110, 129, 130, 109, -100])).tolist() == [0, 19, 20, -1, -210]
    assert some.local(None) is None
    logits = torch.arange(1000.0).view(1, -1)
    assert torch.equal(some.of(logits), logits[:, 110:130])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{"temperature": 0.7, "softcap": 9.0}, {"offset": 1e4}])
@pytest.mark.parametrize("names", [("logprob", "entropy", "lse"), ("logprob",), ("lse",)])
def test_one_model(dtype, options, names):
    check_tokens(TORCH, CUTS[1], CPU, dtype=dtype, names=names, **options)
