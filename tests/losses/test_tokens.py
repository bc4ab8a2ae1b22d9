"""token_statistics against float64 truth; tests/losses/grid runs the kernels."""

from __future__ import annotations

import math

import pytest
import torch

from caop_fast import token_statistics
from caop_fast.losses import tokens
from caop_fast.losses.batches import SavedTokens, TokenBatch, TokenGrads
from caop_fast.losses.options import ExecutionConfig, TokenOptions
from helpers.opcheck import opcheck


def make(n, vocab, dtype=torch.float32, peak=3.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, vocab, generator=g, dtype=torch.float64) * peak
    return logits.to(dtype), torch.randint(0, vocab, (n,), generator=g)


def truth(logits, labels, temperature=1.0, softcap=None):
    """(logprob, entropy, lse) in float64, differentiable."""
    a = logits.double()
    a = (a if softcap is None else softcap * torch.tanh(a / softcap)) / temperature
    log_p = a.log_softmax(-1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * torch.where(p > 0, log_p, 0.0), 0.0).sum(-1)
    return log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1), entropy, a.logsumexp(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("softcap", [None, 6.0])
@pytest.mark.parametrize(("vocab", "temperature"), [(8, 0.7), (1031, 1.0), (40000, 2.0)])
def test_matches_float64(dtype, softcap, vocab, temperature):
    logits, labels = make(5, vocab, dtype)
    labels[1] = -100
    logits.requires_grad_()
    exact = logits.detach().double().requires_grad_()
    out = token_statistics(logits, labels, temperature=temperature, softcap=softcap)
    live = labels != -100
    want = [torch.where(live, w, 0.0) for w in truth(exact, labels, temperature, softcap)]
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    for got, w in zip(out, want, strict=True):
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(got.detach().double(), w.detach(), rtol=tolerance, atol=tolerance)
    up = torch.randn(3, 5, generator=torch.Generator().manual_seed(9))
    sum((u * o).sum() for u, o in zip(up, out, strict=True)).backward()
    sum((u * w).sum() for u, w in zip(up, want, strict=True)).backward()
    error = (logits.grad.double() - exact.grad).abs()
    eps = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float64: 1e-13}[dtype]
    assert (error <= eps * (exact.grad.abs() + 0.1 * exact.grad.abs().amax()) + 1e-14).all()
    assert (logits.grad[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("peak", [2.0, 12.0])
def test_errors_not_above_plain_pytorch(dtype, peak):
    logits, labels = make(64, 4001, dtype, peak)
    ours, plain, exact = (logits.clone().requires_grad_() for _ in range(2)), logits, logits.double().requires_grad_()
    ours, plain = ours
    up = torch.linspace(0.5, 1.5, 64)
    out = token_statistics(ours, labels)
    a = plain.float()
    log_p = a.log_softmax(-1)
    base = (log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1), a.logsumexp(-1))
    want = truth(exact, labels)

    def compare(got, theirs, real, eps):
        ulp = eps * real.abs().max()
        for measure in (lambda e: e.pow(2).mean().sqrt(), lambda e: e.abs().max()):
            assert measure(got.double() - real) <= 1.2 * measure(theirs.double() - real) + 2 * ulp

    for got, theirs, real in zip(out, base, want, strict=True):
        compare(got.detach(), theirs.detach(), real.detach(), torch.finfo(torch.float32).eps)
    for statistics in (out, base, want):
        sum((up * s).sum() for s in statistics).backward()
    compare(ours.grad, plain.grad, exact.grad, torch.finfo(dtype).eps)


@pytest.mark.parametrize("field", ["logprob", "entropy", "lse"])
def test_gradcheck(field):
    logits, labels = make(4, 9, torch.float64, 2.0)
    weights = torch.tensor([1.0, 0, 2, 1])
    labels.clamp_(max=6)

    def f(z):
        out = token_statistics(z, labels, temperature=0.8, softcap=4.0, vocab_size=7, weights=weights)
        return getattr(out, field)

    assert torch.autograd.gradcheck(f, (logits.requires_grad_(),))


def test_excluded_tokens_add_nothing():
    logits = torch.tensor([[1.0, -math.inf, 2.0], [0.0, -math.inf, -math.inf]], requires_grad=True)
    out = token_statistics(logits, torch.tensor([1, 0]))
    want = truth(logits.detach()[:, [0, 2]], torch.tensor([0, 0]))
    torch.testing.assert_close(out.entropy.detach().double(), want[1], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(out.lse.detach().double(), want[2], rtol=1e-6, atol=1e-7)
    assert out.logprob.tolist() == [-math.inf, 0.0]
    (out.entropy.sum() + out.lse.sum()).backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[:, 1] == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, "all -inf"])
def test_a_bad_row_poisons_only_itself_and_weight_0_removes_it(bad):
    logits, labels = make(4, 11)
    clean = token_statistics(logits, labels)
    logits[1, :] = -math.inf if bad == "all -inf" else logits[1]
    if bad != "all -inf":
        logits[1, 3] = bad
    logits.requires_grad_()
    out = token_statistics(logits, labels)
    others = [0, 2, 3]
    for got, want in zip(out, clean, strict=True):
        assert got[1].isnan()
        assert torch.equal(got[others], want[others])
    out = token_statistics(logits, labels, weights=torch.tensor([1.0, 0, 3, 1]))
    sum(o.sum() for o in out).backward()
    assert [float(o.detach()[1]) for o in out] == [0.0, 0.0, 0.0]
    assert torch.equal(out.entropy[others], clean.entropy[others])  # weights only mask
    assert (logits.grad[1] == 0).all()
    assert logits.grad.isfinite().all()


def test_shapes_labels_and_padding():
    logits, labels = make(12, 17)
    flat = token_statistics(logits, labels)
    shaped = token_statistics(logits.view(3, 4, 17), labels.view(3, 4).int())
    assert all(torch.equal(a, b.flatten()) and b.shape == (3, 4) for a, b in zip(flat, shaped, strict=True))
    assert token_statistics(logits, None).logprob is None
    padded = torch.cat([logits, torch.full((12, 3), math.nan)], -1).requires_grad_()
    out = token_statistics(padded, labels, vocab_size=17)
    assert all(torch.equal(a, b) for a, b in zip(flat, out, strict=True))
    sum(o.sum() for o in out).backward()
    assert (padded.grad[:, 17:] == 0).all()
    assert padded.grad[:, :17].isfinite().all()
    for n in (0, 1):
        z = torch.randn(n, 5, requires_grad=True)
        few = token_statistics(z, torch.zeros(n, dtype=torch.int64))
        few.logprob.sum().backward()
        assert z.grad.shape == (n, 5)


def test_inplace_and_single_derivatives():
    leaf, labels = make(4, 9)
    leaf.requires_grad_()
    with pytest.raises(ValueError, match="would overwrite logits, a leaf"):
        token_statistics(leaf, labels, inplace=True)
    (want,) = torch.autograd.grad(token_statistics(leaf, labels).logprob.sum(), leaf)
    logits = leaf * 1.0
    out = token_statistics(logits, labels, inplace=True).logprob.sum()
    (got,) = torch.autograd.grad(out, leaf, retain_graph=True)
    assert torch.equal(got, want)
    assert torch.equal(logits.detach(), want)
    with pytest.raises(RuntimeError, match="the first backward wrote"):
        out.backward()
    with pytest.raises(ValueError, match="logits is expanded or overlaps"):
        token_statistics((leaf[:1] * 1.0).expand(4, 9), labels, inplace=True)
    over = token_statistics(leaf * 1.0, labels, inplace=True).logprob.sum()
    with pytest.raises(RuntimeError, match="inplace=True takes no create_graph=True"):  # not a silent constant
        torch.autograd.grad(over, leaf, create_graph=True)
    (once,) = torch.autograd.grad(token_statistics(leaf, labels).entropy.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        once.sum().backward()


def test_unused_outputs_and_labels_out_of_range():
    logits, _ = make(4, 7)
    logits.requires_grad_()
    labels = torch.tensor([1, 7, -3, -100])
    with pytest.raises(ValueError, match=r"labels must be -100 or in \[0, 7\), got 7"):
        token_statistics(logits, labels)
    out = token_statistics(logits, labels, validate=False, weights=torch.ones(4))
    assert out.logprob.isnan().tolist() == [False, True, True, False]
    assert out.logprob[3] == 0
    out.logprob.sum().backward()
    assert logits.grad.isnan().any(-1).tolist() == [False, True, True, False]


def test_compiles_as_one_graph():
    logits, labels = make(6, 33)
    labels[2] = -100
    logits.requires_grad_()

    def f(z):
        out = token_statistics(z, labels, temperature=0.7)
        return out.logprob.sum() + 0.1 * out.entropy.mean()

    (want,) = torch.autograd.grad(f(logits), logits)
    (got,) = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(logits), logits)
    assert torch.equal(got, want)
    batch = TokenBatch(logits, labels, torch.tensor([1.0, 0, 1, 1, 2, 1]))
    inputs = tokens.TokenInputs(batch, TokenOptions(0.7, 5.0), 30, ExecutionConfig("torch"))
    opcheck(tokens.token_rows, inputs)
    found = tokens.token_rows(inputs)
    saved = SavedTokens(found.saved_statistics, found.entropy.detach())
    inputs = inputs._replace(batch=batch._replace(logits=logits.detach()))
    opcheck(tokens.token_gradient, tokens.GradientInputs(inputs, saved, TokenGrads(*torch.randn(3, 6))))


BAD = [
    ({"logits": [[0.0]]}, TypeError, "logits"),
    ({"logits": torch.zeros(3)}, ValueError, "logits"),
    ({"labels": torch.zeros(2)}, TypeError, "labels"),
    ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, "labels"),
    ({"labels": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "labels"),
    ({"temperature": 0}, ValueError, "temperature"),
    ({"softcap": -1.0}, ValueError, "softcap"),
    ({"vocab_size": 9}, ValueError, "vocab_size"),
    ({"weights": torch.tensor([1.0, -1.0])}, ValueError, "weights"),
    ({"backend": "cuda"}, ValueError, "backend"),
    ({"inplace": 1}, TypeError, "inplace"),
    ({"validate": 1}, TypeError, "validate"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[f"{i}-{b[2]}" for i, b in enumerate(BAD)])
def test_bad_input_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        token_statistics(**{"logits": torch.zeros(2, 8), "labels": torch.tensor([0, 1]), **change})
