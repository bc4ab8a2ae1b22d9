"""Confidence losses as operators: log-probabilities, first derivative only, compile, memory, agreement of entries."""

from __future__ import annotations

import math

import pytest
import torch

from caop_fast import confidence_loss, confidence_loss_from_logprobs
from caop_fast.losses import confidence
from caop_fast.losses.backends.row_blocks import CPU_BLOCK_ELEMENTS
from caop_fast.losses.batches import ConfidenceBatch, ConfidenceGrads
from caop_fast.losses.options import ConfidenceOptions, ExecutionConfig
from caop_kernels.constants import CONFIDENCE_KINDS as KINDS
from helpers.opcheck import opcheck

VALUES = [0.5, 0.0, 1.0, 0.25, 0.75]
IDS = [7, 2, 9, 4, 5]


def make(n=6, v=12, dtype=torch.float64):
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(n, v, generator=g, dtype=torch.float64) * 2
    target = torch.tensor([0.0, 0.1, 0.5, 0.625, 0.99, 1.0], dtype=torch.float64)
    return logits.to(dtype), target.repeat(-(-n // 6))[:n].to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", range(4))
def test_gradcheck_of_each_output(kind, which):
    logits, target = make()
    logp = logits.log_softmax(-1)[:, IDS].requires_grad_()
    options = {"kind": kind, "outside_weight": 0.4, "reduction": "none"}
    assert torch.autograd.gradcheck(
        lambda x: confidence_loss_from_logprobs(x, VALUES, target, **options)[which], (logp,)
    )
    assert torch.autograd.gradcheck(
        lambda x: confidence_loss(x, IDS, VALUES, target, temperature=0.8, softcap=3.0, **options)[which],
        (logits.requires_grad_(),),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_entries_agree(kind, dtype):
    logits, target = make(dtype=dtype)
    direct, through = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    weights = torch.tensor([1.0, 0, 3, 1, 0.5, 2])
    options = {"kind": kind, "weights": weights, "outside_weight": 0.7}
    one = confidence_loss(direct, IDS, VALUES, target, **options)
    two = confidence_loss_from_logprobs(through.log_softmax(-1)[:, IDS], torch.tensor(VALUES), target, **options)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    (one.loss * 1.7 + one.variance.sum()).backward()
    (two.loss * 1.7 + two.variance.sum()).backward()
    torch.testing.assert_close(direct.grad, through.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_impossible_candidates(kind):
    """-inf is as good as a candidate that is not there, if the target does not need it."""
    logits, _ = make()
    target = torch.full((6,), 0.6, dtype=torch.float64)
    logp = logits.log_softmax(-1)[:, IDS]
    logp[:, 1] = -math.inf
    with_it, without = logp.clone().requires_grad_(), logp[:, [0, 2, 3, 4]].clone().requires_grad_()
    one = confidence_loss_from_logprobs(with_it, VALUES, target, kind=kind)
    two = confidence_loss_from_logprobs(without, [0.5, 1.0, 0.25, 0.75], target, kind=kind)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b)
    one.loss.backward()
    two.loss.backward()
    torch.testing.assert_close(with_it.grad[:, [0, 2, 3, 4]], without.grad)
    assert (with_it.grad[:, 1] == 0).all()


def test_no_possible_candidate_and_nan():
    logp = torch.tensor([[-math.inf] * 2, [math.nan, -1], [-1.0, -2]]).requires_grad_()
    out = confidence_loss_from_logprobs(logp, [0.0, 1.0], torch.full((3,), 0.5), reduction="none")
    for field in out:
        assert field.isnan().tolist() == [True, True, False]
    out.loss.sum().backward()
    assert logp.grad[2].isfinite().all()


def test_sums_above_one_and_shapes():
    logp = torch.tensor([[0.25, 0.75 + 1e-6], [0.5, 0.25]]).log().view(1, 2, 2).requires_grad_()
    out = confidence_loss_from_logprobs(logp, [0.0, 1.0], torch.tensor([[0.5, 0.5]]), validate=True)
    assert out.outside_mass.shape == (1, 2)
    assert out.loss.shape == ()
    assert out.outside_mass[0, 0] == 0
    out.outside_mass.sum().backward()
    torch.testing.assert_close(logp.grad, torch.tensor([[[0.0, 0], [-0.5, -0.25]]]))
    empty = confidence_loss_from_logprobs(torch.zeros(0, 2), [0.0, 1.0], torch.zeros(0))
    assert empty.loss == 0


@pytest.mark.parametrize("entry", ["logits", "logprobs"])
def test_differentiable_once(entry):
    logits, target = make()
    leaf = (logits if entry == "logits" else logits.log_softmax(-1)[:, IDS]).requires_grad_()

    def call(x):
        if entry == "logits":
            return confidence_loss(x, IDS, VALUES, target)
        return confidence_loss_from_logprobs(x, VALUES, target)

    loss = call(leaf).loss
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert torch.equal(first, second)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.sum().backward()


@pytest.mark.parametrize("with_ids", [True, False])
def test_opcheck(with_ids):
    logits, target = make(dtype=torch.float32)
    source = logits if with_ids else logits.log_softmax(-1)[:, IDS]
    ids = torch.tensor(IDS) if with_ids else None
    weights = torch.tensor([1.0, 0, 2, 1, 1, 0])
    batch = ConfidenceBatch(source.requires_grad_(), ids, torch.tensor(VALUES), target, weights)
    options = ConfidenceOptions("brier", 0.5, 1e-6, 1.0, 5.0 if with_ids else None)
    vocab = 12 if with_ids else 5
    inputs = confidence.ConfidenceInputs(batch, options, vocab, ExecutionConfig("torch"))
    opcheck(confidence.confidence_rows, inputs)
    inputs = inputs._replace(batch=batch._replace(source=source.detach()))
    grads = ConfidenceGrads(*torch.ones(4, 6))
    opcheck(confidence.confidence_gradient, confidence.GradientInputs(inputs, None, grads))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_as_one_graph(kind):
    logits, target = make(dtype=torch.float32)
    weights = torch.tensor([1.0, 0, 2, 1, 1, 0])

    def losses(x, t, w):
        one = confidence_loss(x, IDS, VALUES, t, kind=kind, weights=w)
        two = confidence_loss_from_logprobs(x.log_softmax(-1)[:, :2], [0.3, 0.9], t, kind=kind, weights=w)
        return one.loss + two.loss + one.variance.sum()

    eager, compiled = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    want = losses(eager, target, weights)
    got = torch.compile(losses, backend="aot_eager", fullgraph=True)(compiled, target, weights)
    want.backward()
    got.backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(compiled.grad, eager.grad)


def test_blocks_of_rows_change_nothing(monkeypatch):
    logits, target = make(40, dtype=torch.float32)
    weights = (torch.arange(40) % 3 != 0).float()
    results = []
    for elements in (CPU_BLOCK_ELEMENTS, 36):
        monkeypatch.setattr("caop_fast.losses.backends.row_blocks.CPU_BLOCK_ELEMENTS", elements)
        leaf = logits.clone().requires_grad_()
        out = confidence_loss(leaf, IDS, VALUES, target, weights=weights, vocab_size=11, temperature=0.7)
        out.loss.backward()
        results.append((*(field.detach() for field in out), leaf.grad))
    for whole, blocks in zip(*results, strict=True):
        torch.testing.assert_close(whole, blocks, rtol=1e-6, atol=1e-7)
    assert (results[0][4][:, 11] == 0).all()
    assert (results[0][4][weights == 0] == 0).all()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"candidate_logprobs": [[0.1]]}, TypeError, "candidate_logprobs"),
        ({"candidate_logprobs": torch.zeros(2)}, ValueError, "candidate_logprobs"),
        ({"candidate_logprobs": torch.zeros(2, 0)}, ValueError, "candidate"),
        ({"candidate_logprobs": torch.ones(2, 2)}, ValueError, "candidate_logprobs.*1.0"),
        ({"candidate_values": [0.1]}, ValueError, "candidate_values.*shape"),
        ({"candidate_values": [0.1, 0.1]}, ValueError, "candidate_values.*distinct"),
        ({"candidate_values": [0.1, 1.1]}, ValueError, "candidate_values"),
        ({"target": torch.tensor([0.5, 1.5])}, ValueError, "target.*1.5"),
        ({"target": torch.zeros(3)}, ValueError, "target.*shape"),
        ({"kind": "ece"}, ValueError, "kind"),
        ({"reduction": "avg"}, ValueError, "reduction"),
        ({"weights": torch.tensor([1.0, -1])}, ValueError, "weights"),
        ({"eps": 0.7}, ValueError, "eps"),
        ({"outside_weight": math.inf}, ValueError, "outside_weight"),
        ({"backend": "cuda"}, ValueError, "backend"),
        ({"validate": 1}, TypeError, "validate"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {
        "candidate_logprobs": torch.full((2, 2), -1.0),
        "candidate_values": [0.0, 1.0],
        "target": torch.tensor([0.5, 0.5]),
    }
    with pytest.raises(error, match=words):
        confidence_loss_from_logprobs(**{**arguments, **change})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [0.0, 18.0, -25.0])
def test_error_is_that_of_plain_pytorch(kind, shift):
    """RMS over 256 rows, values and gradients in float32: at most 1.2 times autograd's over log_softmax plus 2 ulp."""
    g = torch.Generator().manual_seed(11)
    logits = torch.randn(256, 1031, generator=g) * 3
    ids, values = torch.randperm(1031, generator=g)[:21], torch.arange(21) / 20
    logits[:, ids] += shift
    target, up = torch.randint(0, 21, (256,), generator=g) / 20, torch.randn(4, 256, generator=g)

    def plain(z):
        logp = z.log_softmax(-1)[:, ids]
        inside = logp.logsumexp(-1)
        q, v, t = (logp - inside[:, None]).exp(), values.to(z.dtype), target.to(z.dtype)
        mean = (q * v).sum(-1)
        if kind == "cross_entropy":  # the targets are values
            score = (inside[:, None] - logp).gather(1, (target * 20).round().long()[:, None]).squeeze(1)
        elif kind == "brier":
            score = (mean - t) ** 2
        elif kind == "expected_brier":
            score = (q * (v - t[:, None]) ** 2).sum(-1)
        else:
            score = -(
                t * mean.clamp(1e-6, 1 - 1e-6).log() + (1 - t) * (q * (1 - v)).sum(-1).clamp(1e-6, 1 - 1e-6).log()
            )
        return score - inside, mean, (q * (v - mean[:, None]) ** 2).sum(-1), -torch.expm1(inside)

    def run(function, z):
        leaf = z.clone().requires_grad_()
        out = function(leaf)
        torch.autograd.backward(list(out), list(up.to(z.dtype)))
        return [*(field.detach().double() for field in out), leaf.grad.double()]

    exact, theirs = run(plain, logits.double()), run(plain, logits)
    ours = run(lambda z: confidence_loss(z, ids, values, target, kind=kind, reduction="none"), logits)
    for got, other, want in zip(ours, theirs, exact, strict=True):
        slack = 2 * 2**-23 * want.abs().max()
        assert (got - want).square().mean().sqrt() <= 1.2 * (other - want).square().mean().sqrt() + slack
