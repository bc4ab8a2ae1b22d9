"""Confidence kernels, through the public functions, against the float64 oracle and against plain PyTorch's rounding."""

from __future__ import annotations

import math

import pytest
import torch

from caop_fast.losses.confidence import confidence_loss, confidence_loss_from_logprobs
from helpers import gpu_arithmetic
from helpers.confidence_oracle import KINDS, log_p, mixed_gradient, scores

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
EPS = {name: torch.finfo(dtype).eps for name, dtype in DTYPES.items()}
# dtype, V, kind, temperature, softcap: every dtype meets every V and kind, every kind every temperature and softcap.
GRID = [
    (dtype, v, KINDS[(i + j) % 4], (0.7, 1.0, 2.0)[(i + 2 * j) % 3], (None, 6.0)[(i // 2 + j) % 2])
    for i, dtype in enumerate(DTYPES)
    for j, v in enumerate((8, 1000, 1031, 20000))
]
GRID += [("fp32", 1031, kind, t, cap) for kind in KINDS for t, cap in ((0.7, 6.0), (2.0, None))]


def make(v, dtype, device, n=6, c=5, scale=3.0, seed=0):
    """Logits, candidates in no order, and targets at both ends, on a value and between values."""
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(n, v, generator=g, dtype=torch.float64) * scale).to(dtype)
    ids = torch.randperm(v, generator=g)[:c]
    values = torch.randperm(c, generator=g).double() / max(c - 1, 1)
    target = torch.rand(n, generator=g)
    target[: min(n, 3)] = torch.tensor([0.0, 1.0, 0.5])[: min(n, 3)]
    stat = torch.float64 if dtype == torch.float64 else torch.float32
    return logits.to(device), ids.to(device), values.to(device, stat), target.to(device, stat)


def run(logits, ids, values, target, upstream=None, **options):
    """Outputs, and the gradient for upstream gradients of all four outputs."""
    leaf = logits.detach().clone().requires_grad_()
    out = confidence_loss(leaf, ids, values, target, reduction="none", backend="triton", **options)
    if upstream is not None:
        torch.autograd.backward(list(out), upstream)
    return [o.detach() for o in out], leaf.grad


def upstream_of(outputs, seed=3):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=g, dtype=torch.float64).to(o) for o in outputs]


def truth(logits, ids, values, target, kind, upstream, outside_weight, temperature=1.0, softcap=None):
    leaf = logits.detach().double().requires_grad_()
    found = scores(log_p(leaf, ids, temperature, softcap), values, target, kind, outside_weight)
    return [o.detach() for o in found], mixed_gradient(leaf, found, upstream)


@pytest.mark.parametrize(("dtype", "v", "kind", "temperature", "softcap"), GRID)
def test_matches_the_oracle(device, dtype, v, kind, temperature, softcap):
    inputs = make(v, DTYPES[dtype], device)
    options = {"temperature": temperature, "softcap": softcap, "outside_weight": 0.3}
    upstream = upstream_of([inputs[3]] * 4)
    found, gradient = run(*inputs, upstream, kind=kind, **options)
    want, wanted_gradient = truth(*inputs, kind, upstream, **options)
    stat = torch.float64 if dtype == "fp64" else torch.float32
    tolerance = 1e-11 if dtype == "fp64" else 4e-6
    for name, got, expected in zip(("loss", "expected", "variance", "outside"), found, want, strict=True):
        assert got.dtype == stat
        assert ((got - expected).abs() <= tolerance * expected.abs().clamp(min=1)).all(), name
    assert gradient.dtype == DTYPES[dtype]
    error = (gradient.double() - wanted_gradient).abs()
    assert (error <= tolerance * 0.3 + 0.5 * EPS[dtype] * wanted_gradient.abs() * 1.01 + 6e-8 * (dtype == "fp16")).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", range(4))
def test_each_output_flows_alone(device, kind, which):
    inputs = make(1031, torch.float32, device)
    leaf = inputs[0].clone().requires_grad_()
    out = confidence_loss(leaf, *inputs[1:], kind=kind, reduction="none", backend="triton", outside_weight=0.7)
    up = upstream_of([out[which]])[0]
    out[which].backward(up)
    exact = inputs[0].double().requires_grad_()
    want = scores(log_p(exact, inputs[1]), *inputs[2:], kind, 0.7)[which]
    (gradient,) = torch.autograd.grad((want * up.double()).sum(), exact)
    torch.testing.assert_close(leaf.grad.double(), gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 7, 101, 1024])
@pytest.mark.parametrize("kind", KINDS)
def test_number_of_candidates(device, kind, count):
    inputs = make(1500, torch.float32, device, n=4, c=count)
    upstream = upstream_of([inputs[3]] * 4)
    found, gradient = run(*inputs, upstream, kind=kind)
    want, wanted = truth(*inputs, kind, upstream, 1.0)
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("v", [1, 2, 2047, 2048, 2049, 16385, 34817])
def test_boundaries_of_tiles_and_chunks(device, v):
    inputs = make(v, torch.float32, device, n=2, c=min(v, 4))
    inputs[1][0] = v - 1 if v - 1 not in inputs[1].tolist() else inputs[1][0]
    upstream = upstream_of([inputs[3]] * 4)
    found, gradient = run(*inputs, upstream, kind="brier")
    want, wanted = truth(*inputs, "brier", upstream, 1.0)
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("dtype", "place", "kind"),
    [("fp32", place, kind) for place in ("on", "off") for kind in KINDS]
    + [("fp32", "normal", "bernoulli_nll"), ("bf16", "on", "brier"), ("bf16", "normal", "cross_entropy")],
)
def test_error_is_that_of_plain_pytorch(device, kind, place, dtype):
    """RMS and largest error over 64 rows, values and gradients: at most 1.2 times plain PyTorch's plus 2 ulp."""
    logits, ids, values, target = make(1031, torch.float64, device, n=64, c=21, seed=5)
    values, target = values.float(), target.float()
    if place == "on":
        logits[:, ids] += 18
    elif place == "off":
        logits[:, ids] -= 25
    logits = logits.to(DTYPES[dtype])
    upstream = upstream_of([target] * 4)
    found, gradient = run(logits, ids, values, target, upstream, kind=kind)
    want, wanted = truth(logits, ids, values, target, kind, upstream, 1.0)

    leaf = logits.clone().requires_grad_()
    logp = torch.log_softmax(leaf.float(), -1)[:, ids]
    inside = logp.logsumexp(-1)
    q = (logp - inside[:, None]).exp()
    expected = (q * values).sum(-1)
    if kind == "cross_entropy":
        from helpers.confidence_oracle import hat_weights

        mass = torch.tensor([hat_weights(values, y) for y in target.tolist()], device=device)
        score = -(mass * (logp - inside[:, None])).sum(-1)
    elif kind == "brier":
        score = (expected - target) ** 2
    elif kind == "expected_brier":
        score = (q * (values - target[:, None]) ** 2).sum(-1)
    else:
        e = expected.clamp(1e-6, 1 - 1e-6)
        score = -(target * e.log() + (1 - target) * (1 - e).log())
    plain = [score - inside, expected, (q * (values - expected[:, None]) ** 2).sum(-1), -torch.expm1(inside)]
    torch.autograd.backward(plain, upstream)
    rows = zip(
        (*found, gradient), (*[p.detach() for p in plain], leaf.grad), (*want, wanted), (*[2**-23] * 4, EPS[dtype]),
        strict=True,
    )  # fmt: skip
    for i, (got, other, exact, ulp) in enumerate(rows):
        ours, theirs = got.double() - exact, other.double() - exact
        slack = 2 * ulp * exact.abs().max()
        assert ours.square().mean().sqrt() <= 1.2 * theirs.square().mean().sqrt() + slack, i
        assert ours.abs().max() <= 1.2 * theirs.abs().max() + slack, i


@pytest.mark.parametrize("signs", ["++", "--", "??"])
def test_error_with_approximate_instructions(device, signs):
    if device.type != "cpu":
        pytest.skip("the device has its own")
    with gpu_arithmetic.approximations(*signs):
        test_error_is_that_of_plain_pytorch(device, "brier", "on", "fp32")


def test_rows_whose_mass_is_on_the_candidates_keep_their_digits(device):
    """1 - P below 1e-6: the gradient of -log P in the other columns scales with it, and is right to 1e-5 of itself."""
    logits, ids, values, target = make(1000, torch.float32, device, n=4)
    logits[:, ids] += 30
    up = [torch.ones(4, device=device), None, None, None]
    leaf = logits.clone().requires_grad_()
    first = confidence_loss(leaf, ids, values, target, kind="brier", reduction="none", backend="triton")
    second = confidence_loss(
        leaf, ids, values, target, kind="brier", reduction="none", backend="triton", outside_weight=0.0
    )
    (first.loss - second.loss).backward(up[0])
    others = [j for j in range(1000) if j not in ids.tolist()]
    want, wanted = truth(logits, ids, values, target, "brier", [up[0], *[torch.zeros(4, device=device)] * 3], 1.0)
    torch.testing.assert_close(leaf.grad[:, others].double(), wanted[:, others], rtol=1e-5, atol=0)
    assert want[3].max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["logits", "logprobs"])
def test_rows_of_weight_zero_may_hold_anything(device, kind, source):
    logits, ids, values, target = make(1031, torch.float32, device)
    tensor = logits if source == "logits" else logits.double().log_softmax(-1)[:, ids].float()
    weights = torch.tensor([1.0, 0, 2, 0, 0.5, 1], device=device)

    def call(x, t, w):
        if source == "logits":
            return confidence_loss(x, ids, values, t, kind=kind, weights=w, reduction="none", backend="triton")
        return confidence_loss_from_logprobs(x, values, t, kind=kind, weights=w, reduction="none", backend="triton")

    clean = tensor.clone().requires_grad_()
    want = call(clean, target, weights)
    torch.autograd.backward(list(want), upstream_of(want))
    dead = weights == 0
    tensor = tensor.masked_fill(dead[:, None], math.nan).requires_grad_()
    target = target.masked_fill(dead, math.nan)
    out = call(tensor, target, weights)
    up = [u.masked_fill(dead, 7.0) for u in upstream_of(out)]
    torch.autograd.backward(list(out), up)
    for got, expected in zip(out, want, strict=True):
        assert torch.equal(got[~dead], expected[~dead])
        assert (got[dead] == 0).all()
    assert torch.equal(tensor.grad[~dead], clean.grad[~dead])
    assert (tensor.grad[dead] == 0).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_bad_row_spoils_no_other(device, poison):
    logits, ids, values, target = make(3000, torch.float32, device)
    clean, clean_gradient = run(logits, ids, values, target, upstream_of([target] * 4))
    logits[2, 2999 if 2999 not in ids.tolist() else 2998] = poison
    found, gradient = run(logits, ids, values, target, upstream_of([target] * 4))
    keep = [0, 1, 3, 4, 5]
    for got, expected in zip(found, clean, strict=True):
        assert got[2].isnan()
        assert torch.equal(got[keep], expected[keep])
    assert gradient[2, ids].isnan().all()
    assert torch.equal(gradient[keep], clean_gradient[keep])


def test_impossible_columns(device):
    """-inf on columns that are no candidates, on one candidate, on all candidates of one row."""
    logits, ids, values, target = make(1031, torch.float32, device)
    others = [j for j in range(1031) if j not in ids.tolist()]
    logits[:, others[::2]] = -math.inf
    logits[1:, ids[0]] = -math.inf
    logits[5, ids] = -math.inf
    for kind in KINDS[1:]:
        upstream = upstream_of([target] * 4)
        found, gradient = run(logits, ids, values, target, upstream, kind=kind)
        want, wanted = truth(logits[:5], ids, values, target[:5], kind, [u[:5] for u in upstream], 1.0)
        for got, expected in zip(found, want, strict=True):
            assert got[5].isnan()
            torch.testing.assert_close(got[:5].double(), expected, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(gradient[:5].double(), wanted.nan_to_num(), rtol=1e-5, atol=2e-6)
        assert (gradient[1:5, ids[0]] == 0).all()


@pytest.mark.parametrize("bad", [-1, -100, 1031, 2**40, -(2**63), 2**63 - 1])
def test_ids_out_of_range_give_nan_and_read_nothing(device, bad):
    logits, ids, values, target = make(1031, torch.float32, device)
    ids[1] = bad
    found, gradient = run(logits, ids, values, target, upstream_of([target] * 4), validate=False)
    for got in found:
        assert got.isnan().all()
    assert gradient.shape == logits.shape
    assert gradient.isnan().all()
    past, _ = run(logits, torch.arange(5, device=device) + 996, values, target, vocab_size=1000, validate=False)
    assert past[0].isnan().all()


def test_an_unvalidated_target_of_nan_gives_nan_in_its_loss(device):
    for kind in KINDS:
        logits, ids, values, target = make(100, torch.float32, device)
        target[1] = math.nan
        leaf = logits.clone().requires_grad_()
        out = confidence_loss(leaf, ids, values, target, kind=kind, reduction="none", backend="triton", validate=False)
        assert out.loss.isnan().tolist() == [False, True, False, False, False, False]
        assert out.expected.isfinite().all()
        out.expected.sum().backward()
        assert leaf.grad.isfinite().all()


def test_vocab_size_hides_columns(device):
    logits, ids, values, target = make(1000, torch.float32, device)
    wide = torch.cat([logits, torch.full((6, 37), 50.0, device=device)], -1)
    up = upstream_of([target] * 4)
    found, gradient = run(logits, ids, values, target, up)
    hidden, hidden_gradient = run(wide, ids, values, target, up, vocab_size=1000)
    for got, expected in zip(hidden, found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(hidden_gradient[:, :1000], gradient, rtol=1e-5, atol=1e-6)
    assert (hidden_gradient[:, 1000:] == 0).all()


@pytest.mark.parametrize("n", [0, 1])
def test_few_rows(device, n):
    inputs = make(100, torch.float32, device, n=max(n, 1))
    logits, target = inputs[0][:n], inputs[3][:n]
    leaf = logits.clone().requires_grad_()
    out = confidence_loss(leaf, inputs[1], inputs[2], target, backend="triton")
    out.loss.backward()
    assert out.expected.shape == (n,)
    assert leaf.grad.shape == (n, 100)
    assert out.loss.isfinite()


def test_bits_of_a_row_depend_on_that_row_alone(device):
    logits, ids, values, target = make(20000, torch.bfloat16, device, n=7)
    up = upstream_of([target] * 4)
    found, gradient = run(logits, ids, values, target, up)
    order = torch.tensor([5, 1, 6], device=device)
    part, part_gradient = run(logits[order], ids, values, target[order], [u[order] for u in up])
    for whole, some in zip(found, part, strict=True):
        assert torch.equal(whole[order], some)
    assert torch.equal(gradient[order], part_gradient)


def test_strided_rows(device):
    logits, ids, values, target = make(1000, torch.float32, device)
    up = upstream_of([target] * 4)
    found, gradient = run(logits, ids, values, target, up)
    room = torch.full((6, 1024), math.nan, device=device)
    room[:, :1000] = logits
    turned = logits.t().contiguous().t()
    for view in (room[:, :1000], turned):
        leaf = view.detach().requires_grad_()
        assert leaf.stride() != (1000, 1)
        out = confidence_loss(leaf, ids, values, target, reduction="none", backend="triton")
        torch.autograd.backward(list(out), up)
        for got, expected in zip(out, found, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("count", [1, 21, 130])
def test_log_probabilities(device, kind, dtype, count):
    logits, ids, values, target = make(300, torch.float64, device, c=count)
    logp = logits.log_softmax(-1)[:, ids].to(DTYPES[dtype])
    if count > 1:
        logp[1, 0] = -math.inf
    stat = torch.float64 if dtype == "fp64" else torch.float32
    values, target = values.to(stat), target.to(stat)
    if kind == "cross_entropy":
        target[1] = values[1] if count > 1 else 0.5
    leaf = logp.clone().requires_grad_()
    out = confidence_loss_from_logprobs(
        leaf, values, target, kind=kind, outside_weight=0.6, reduction="none", backend="triton"
    )
    up = upstream_of(out)
    torch.autograd.backward(list(out), up)
    exact = logp.double().requires_grad_()
    want = scores(exact, values, target, kind, 0.6)
    wanted = mixed_gradient(exact, want, up).nan_to_num()
    tolerance = 1e-11 if dtype == "fp64" else 3e-6
    for got, expected in zip(out, want, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(leaf.grad.double(), wanted, rtol=tolerance + EPS[dtype], atol=tolerance)


def test_log_probabilities_that_add_up_to_more_than_one(device):
    logp = torch.tensor([[0.25, 0.75 + 1e-6], [0.5, 0.25]], device=device).log().requires_grad_()
    out = confidence_loss_from_logprobs(
        logp, [0.0, 1.0], torch.tensor([0.5, 0.5], device=device), reduction="none", backend="triton", validate=False
    )
    assert out.outside_mass[0] == 0
    torch.testing.assert_close(out.outside_mass[1].item(), 0.25, rtol=1e-6, atol=1e-6)
    out.outside_mass.sum().backward()
    torch.testing.assert_close(logp.grad, torch.tensor([[0.0, 0], [-0.5, -0.25]], device=device))


def test_a_row_without_a_possible_candidate_is_nan(device):
    logp = torch.tensor([[-math.inf, -math.inf], [-1.0, -2.0]], device=device).requires_grad_()
    out = confidence_loss_from_logprobs(
        logp, [0.0, 1.0], torch.tensor([0.5, 0.5], device=device), reduction="none", backend="triton"
    )
    out.loss.sum().backward()
    for field in out:
        assert field.isnan().tolist() == [True, False]
    assert logp.grad.isnan().tolist() == [[True, True], [False, False]]
