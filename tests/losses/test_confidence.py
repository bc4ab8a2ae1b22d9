"""confidence_loss against its definition in float64, gradients included."""

from __future__ import annotations

import math

import pytest
import torch

from caop_fast import confidence_loss

KINDS = ("cross_entropy", "brier", "expected_brier", "bernoulli_nll")
IDS, VALUES = [7, 2, 9, 4, 5], [0.5, 0.0, 1.0, 0.25, 0.75]


def truth(logits, target, kind, outside_weight=1.0, eps=1e-6):
    """One row at a time in plain Python and float64."""
    losses, moments = [], []
    for z, t in zip(logits.double(), target.tolist(), strict=True):
        p = torch.softmax(z, -1)[IDS]
        q = p / p.sum()
        mean = sum(q[i] * v for i, v in enumerate(VALUES))
        if kind == "cross_entropy":
            score = 0.0
            for i, v in enumerate(VALUES):  # hat functions of width 0.25 around each value
                score = score - max(0.0, 1 - abs(t - v) / 0.25) * q[i].log()
        elif kind == "brier":
            score = (mean - t) ** 2
        elif kind == "expected_brier":
            score = sum(q[i] * (v - t) ** 2 for i, v in enumerate(VALUES))
        else:
            e = mean.clamp(eps, 1 - eps)
            score = -(t * e.log() + (1 - t) * (1 - e).log())
        losses.append(score - outside_weight * p.sum().log())
        variance = sum(q[i] * (v - mean) ** 2 for i, v in enumerate(VALUES))
        moments.append(torch.stack([mean, variance, 1 - p.sum()]))
    return torch.stack(losses), torch.stack(moments, -1)


def make(n=6, vocab=12, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    target = torch.tensor([0.0, 0.1, 0.5, 0.625, 0.99, 1.0])[:n]
    return (torch.randn(n, vocab, generator=g, dtype=torch.float64) * 2).to(dtype), target


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("outside_weight", [0.0, 1.0, 0.3])
def test_matches_the_definition(kind, dtype, outside_weight):
    logits, target = make(dtype=dtype)
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    out = confidence_loss(ours, IDS, VALUES, target, kind=kind, outside_weight=outside_weight, reduction="none")
    loss, (expected, variance, outside) = truth(theirs, target, kind, outside_weight)
    assert out.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    for got, want in zip(out, (loss, expected, variance, outside), strict=True):
        torch.testing.assert_close(got.detach().double(), want.detach(), **tolerance)
    up = torch.linspace(0.3, 2, 6)
    (out.loss * up).sum().backward()
    (loss * up).sum().backward()
    if dtype == torch.bfloat16:
        tolerance = {"rtol": 2**-8, "atol": 1e-6}
    torch.testing.assert_close(ours.grad.double(), theirs.grad, **tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    logits, target = make(dtype=torch.float64)

    def f(z):
        out = confidence_loss(z, IDS, VALUES, target, kind=kind, temperature=0.8, softcap=4.0, vocab_size=11)
        return out.loss, out.expected, out.variance, out.outside_mass

    assert torch.autograd.gradcheck(f, (logits.requires_grad_(),))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_weight_zero(kind):
    logits, target = make()
    weights = torch.tensor([1.0, 0, 2, 1, 0, 0.5])
    keep = weights > 0
    clean = logits[keep].clone().requires_grad_()
    want = confidence_loss(clean, IDS, VALUES, target[keep], kind=kind, weights=weights[keep])
    want.loss.backward()
    logits[~keep], target[1] = math.nan, math.nan
    logits.requires_grad_()
    out = confidence_loss(logits, IDS, VALUES, target, kind=kind, weights=weights)
    out.loss.backward()
    torch.testing.assert_close(out.loss, want.loss)
    torch.testing.assert_close(logits.grad[keep], clean.grad)
    assert (logits.grad[~keep] == 0).all()
    assert (out.expected[~keep] == 0).all()
    assert (out.outside_mass[~keep] == 0).all()


def test_outside_term_pulls_mass_onto_the_candidates():
    logits = torch.zeros(1, 12)
    logits[0, 0] = 5.0  # most mass on an id that is no candidate
    for weight, sign in ((1.0, 1), (0.0, 0)):
        z = logits.clone().requires_grad_()
        out = confidence_loss(z, IDS, VALUES, torch.tensor([0.5]), kind="brier", outside_weight=weight)
        out.loss.backward()
        assert out.outside_mass > 0.9
        assert torch.sign(z.grad[0, 0]) == sign


def test_impossible_candidate_and_target_beyond_the_values():
    logits, _ = make(2)
    logits[:, 9] = -math.inf
    logits.requires_grad_()
    out = confidence_loss(logits, IDS, VALUES, torch.tensor([0.25, 0.5]))
    out.loss.backward()
    assert out.loss.isfinite()
    assert logits.grad.isfinite().all()
    few = confidence_loss(logits.detach(), [1, 2], [0.2, 0.4], torch.tensor([1.0, 0.0]), reduction="none")
    q = torch.softmax(logits.detach()[:, [1, 2]], -1)
    inside = torch.softmax(logits.detach(), -1)[:, [1, 2]].sum(-1)
    torch.testing.assert_close(few.loss, -torch.stack([q[0, 1], q[1, 0]]).log() - inside.log())
    one = confidence_loss(logits.detach(), [1], [0.2], torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(one.expected, torch.tensor([0.2, 0.2]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_changes_nothing(kind, dtype):
    logits, target = make(dtype=dtype)
    results = []
    for enabled in (False, True):
        leaf = logits.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = confidence_loss(leaf, IDS, VALUES, target, kind=kind, reduction="none")
            total = sum(field.double().sum() for field in out)
        total.backward()
        results.append((*(t.detach() for t in out), leaf.grad))
    for plain, cast in zip(*results, strict=True):
        assert plain.dtype == cast.dtype
        assert torch.equal(plain, cast)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("candidates", [5, 1])
def test_an_unvalidated_target_of_nan_gives_nan_in_its_row(kind, candidates):
    logits, target = make()
    target[1] = math.nan
    logits.requires_grad_()
    out = confidence_loss(
        logits, IDS[:candidates], VALUES[:candidates], target, kind=kind, reduction="none", validate=False
    )
    assert out.loss.isnan().tolist() == [False, True, False, False, False, False]
    assert out.expected.isfinite().all()


@pytest.mark.parametrize("ids", [[1, 12], [1, 2**40], [-1, 3], [-100, 3], [-(2**63), 2**63 - 1]])
def test_unvalidated_candidates_outside_the_vocabulary_give_nan(ids):
    logits, target = make()
    logits.requires_grad_()
    out = confidence_loss(logits, ids, [0.0, 1.0], target, reduction="none", validate=False)
    for field in (out.loss, out.expected, out.variance, out.outside_mass):
        assert field.isnan().all()
    out.loss.sum().backward()
    assert logits.grad.shape == logits.shape
    past = confidence_loss(logits, [1, 10], [0.0, 1.0], target, reduction="none", vocab_size=10, validate=False)
    assert past.loss.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [1e-6, 1e-7, 1e-8, 1e-12, 1e-300])
def test_any_eps_is_finite(eps, dtype):
    """In float32 1 - 1e-8 is 1, whose complement has no logarithm."""
    logits = torch.tensor([[-60.0, 0, 60], [60, 0, -60], [60, 0, -60], [-60, 0, 60], [1, 0, 2]]).to(dtype)
    target = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.5], dtype=dtype)
    logits.requires_grad_()
    out = confidence_loss(
        logits, [0, 2], [0.0, 1.0], target, kind="bernoulli_nll", eps=eps, outside_weight=0, reduction="none"
    )
    out.loss.sum().backward()
    assert out.loss.isfinite().all()
    assert logits.grad.isfinite().all()
    assert (out.loss[:2] < 2e-6).all()
    wrong = min(120, -math.log(max(eps, torch.finfo(dtype).tiny)))  # logits 120 apart, or the clip
    torch.testing.assert_close(out.loss[2:4].detach(), torch.full((2,), wrong, dtype=dtype), rtol=1e-5, atol=0)


def test_shapes_and_reductions():
    logits, target = make()
    flat = confidence_loss(logits, IDS, VALUES, target, reduction="none")
    shaped = confidence_loss(logits.view(2, 3, 12), torch.tensor(IDS), torch.tensor(VALUES), target.view(2, 3))
    assert shaped.expected.shape == (2, 3)
    torch.testing.assert_close(shaped.loss, flat.loss.mean())
    arrays = confidence_loss(logits, torch.tensor(IDS).numpy(), tuple(VALUES), target)
    assert torch.equal(arrays.loss, confidence_loss(logits, IDS, VALUES, target).loss)
    empty = confidence_loss(logits[:0].requires_grad_(), IDS, VALUES, target[:0])
    assert empty.loss == 0
    empty.loss.backward()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"candidate_ids": [1, 2, 3, 4, 12]}, ValueError, r"candidate_ids.*\[0, 12\)"),
        ({"candidate_ids": [1, 1, 2, 3, 4]}, ValueError, "candidate_ids.*distinct"),
        ({"candidate_ids": [1.0] * 5}, TypeError, "candidate_ids"),
        ({"candidate_ids": []}, ValueError, "candidate_ids"),
        ({"candidate_ids": None}, TypeError, "candidate_ids.*NoneType"),
        ({"candidate_ids": ["a", "b"]}, TypeError, "candidate_ids.*'a'"),
        ({"candidate_ids": [2**70]}, TypeError, "candidate_ids"),
        ({"candidate_ids": [[1], [2, 3]]}, TypeError, "candidate_ids"),
        ({"candidate_values": "abc"}, TypeError, "candidate_values.*str"),
        ({"candidate_values": 0.5}, TypeError, "candidate_values.*float"),
        ({"candidate_values": ["0", "1", "2", "3", "4"]}, TypeError, "candidate_values"),
        ({"candidate_values": [0.5] * 5}, ValueError, "candidate_values.*distinct"),
        ({"candidate_values": [0.0, 0.1, 0.2, 0.3, 1.2]}, ValueError, r"candidate_values.*\[0, 1\]"),
        ({"candidate_values": [0.0, 1.0]}, ValueError, "candidate_values.*shape"),
        ({"target": torch.full((6,), 1.5)}, ValueError, "target.*1.5"),
        ({"target": torch.full((6,), math.nan)}, ValueError, "target.*nan"),
        ({"target": torch.ones(6, dtype=torch.int64)}, TypeError, "target"),
        ({"target": torch.zeros(5)}, ValueError, "target.*shape"),
        ({"kind": "ece"}, ValueError, "kind.*'brier'"),
        ({"outside_weight": -1.0}, ValueError, "outside_weight"),
        ({"eps": 0.5}, ValueError, "eps"),
        ({"temperature": 0}, ValueError, "temperature"),
        ({"weights": torch.full((6,), -1.0)}, ValueError, "weights"),
        ({"reduction": "avg"}, ValueError, "reduction"),
    ],
)
def test_bad_input(change, error, words):
    logits, target = make()
    arguments = {"logits": logits, "candidate_ids": IDS, "candidate_values": VALUES, "target": target}
    with pytest.raises(error, match=words):
        confidence_loss(**{**arguments, **change})
