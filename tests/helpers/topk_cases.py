"""What topk_distillation_loss must do on every backend; `test_topk.py` and `test_kernel_topk.py` run it.

They provide the fixtures ``loss``, the function on one backend and device with gradients and results brought to the
CPU, and ``thorough``, False where an interpreter makes every row cost a tenth of a second.
"""

from __future__ import annotations

import math

import pytest
import torch

from helpers.oracle import pairwise, weighted_mean
from helpers.topk_oracle import NAMES, make, oracle, plain

INF = math.inf
TAILS = ("bucket", "renormalize", "ignore")
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float64: 1e-11}
GRID = pairwise(
    dtype=[torch.float32, torch.bfloat16, torch.float16, torch.float64],
    beta=[0.0, 0.3, 0.5, 1.0, "tensor"],
    temperature=[0.7, 1.0, 2.0],
    softcap=[None, 8.0],
    tail=list(TAILS),
    weights=[None, "zeros", "labels"],
    size=[(8, 1), (8, 7), (8, 8), (1000, 7), (1000, 64), (1031, 1), (1031, 256), (20000, 64)],
    ragged=[False, True],
)


def name_of(case):
    return "-".join(str(v).replace("torch.", "") for v in case.values())


def mixed_total(out, mix, live):
    """A scalar in which something other than 1 flows into every differentiable output."""
    divergence, logprob, entropy = (
        (out[n] if isinstance(out, dict) else getattr(out, n)).double()
        for n in ("divergence", "student_logprob", "student_entropy")
    )
    per_row = 0.7 * mix * divergence - 1.3 * mix.flip(0) * logprob + 0.4 * mix.cos() * entropy
    return torch.where(live > 0, per_row, 0.0).sum()


@pytest.mark.parametrize("case", GRID, ids=name_of)
def test_grid_matches_float64(loss, case):
    n, (vocab, k), dtype = 5, case["size"], case["dtype"]
    student, ids, logprobs, labels = make(n, vocab, k, dtype, ragged=case["ragged"])
    beta = torch.tensor([0.0, 1, 1, 0, 1]) if case["beta"] == "tensor" else case["beta"]
    weights = torch.tensor([1.0, 0, 0.5, 2, 3]) if case["weights"] == "zeros" else None
    if case["weights"] == "labels":
        labels[2] = -100
    options = {"tail": case["tail"], "beta": beta, "temperature": case["temperature"]}
    options["student_softcap"] = case["softcap"]
    student.requires_grad_()
    out = loss(student, ids, logprobs, labels, weights=weights, **options)

    truth_student = student.detach().double().requires_grad_()
    truth = oracle(truth_student, ids, logprobs, labels, **options)
    live = torch.ones(n)
    if case["weights"]:
        live = weights if weights is not None else (labels != -100).float()
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    for name in NAMES:
        got, want = getattr(out, name), torch.where(live > 0, truth[name].detach(), 0.0)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(
            got.detach().double(),
            want,
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda m, n=name: f"{n} {m}",
        )
    torch.testing.assert_close(
        out.loss.detach().double(), weighted_mean(truth["divergence"], live).detach(), rtol=tolerance, atol=tolerance
    )

    mix = torch.linspace(0.5, 2.0, n, dtype=torch.float64)
    (3 * out.loss.double() + mixed_total(out, mix, live)).backward()
    (3 * weighted_mean(truth["divergence"], live) + mixed_total(truth, mix, live)).backward()
    want = truth_student.grad
    assert student.grad.dtype == dtype
    error = (student.grad.double() - want).abs()
    bound = ROUNDING[dtype] * (want.abs() + 0.02 * want.abs().amax(-1, keepdim=True)) + 1e-7
    assert (error <= bound).all(), (error - bound).max()
    assert (student.grad[live == 0] == 0).all()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0, "tensor"])
@pytest.mark.parametrize("output", ["divergence", "student_logprob", "student_entropy"])
def test_gradcheck(loss, thorough, tail, beta, output):
    if not thorough and output != "divergence" and beta != 0.4:
        pytest.skip("beta has no part in it")
    student, ids, logprobs, labels = make(4, 12, 4, torch.float64, ragged=True)
    labels[1] = -100
    beta = torch.tensor([1.0, 0, 0, 1]) if beta == "tensor" else beta

    def chosen(z):
        out = loss(
            z, ids, logprobs, labels, tail=tail, beta=beta, temperature=1.3, student_softcap=6.0,
            weights=torch.tensor([1.0, 2, 0, 1]),
        )  # fmt: skip
        return getattr(out, output)

    assert torch.autograd.gradcheck(chosen, student.requires_grad_(), rtol=1e-6, atol=1e-8, fast_mode=not thorough)


@pytest.mark.parametrize("drop", [35.0, 80.0, 200.0])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_tiny_student_tail_keeps_its_digits(loss, drop, beta):
    """The tail is e^-35 of the row and less, the teacher gives it 0.3: 1 - sum p would be rounding alone."""
    g = torch.Generator().manual_seed(3)
    student = torch.randn(3, 3000, generator=g)
    ids = torch.tensor([[5, 2047, 2048], [0, 1, 2999], [700, 3, 40]])
    student.scatter_add_(-1, ids, torch.full((3, 3), drop + 8.0))
    logprobs = torch.tensor([[0.2, 0.4, 0.1]]).log().expand(3, 3)
    found = student.clone().requires_grad_()
    out = loss(found, ids, logprobs, beta=beta)
    (torch.tensor([1.0, -2.0, 0.5]) * out.divergence).sum().backward()
    truth = student.double().requires_grad_()
    want = oracle(truth, ids, logprobs, beta=beta)["divergence"]
    (torch.tensor([1.0, -2.0, 0.5]) * want).sum().backward()
    torch.testing.assert_close(out.divergence.detach().double(), want.detach(), rtol=3e-6, atol=0)
    # Relative, column by column, as long as float32 has such numbers.
    tail = torch.ones(3, 3000, dtype=torch.bool).scatter_(-1, ids, False) & (truth.grad.abs() > 1e-36)
    assert tail.sum() > 8000 or (beta > 0 and drop > 35)
    torch.testing.assert_close(found.grad.double()[tail], truth.grad[tail], rtol=3e-5, atol=0)
    torch.testing.assert_close(found.grad.double(), truth.grad, rtol=3e-6, atol=3e-7)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("mass", [1e-9, math.exp(-35)])
def test_a_tiny_teacher_tail_keeps_what_the_logprobs_carry(loss, beta, mass):
    """The largest entry is e^-1e-9 or so: its log-probability holds the tail, its probability rounds to 1."""
    student, ids, _, _ = make(2, 50, 2)
    logprobs = torch.tensor([[-mass, -INF], [math.log1p(-mass / 2) - mass / 4, math.log(mass / 8)]])
    out = loss(student, ids, logprobs, beta=beta)
    want = oracle(student.double(), ids, logprobs, beta=beta)
    torch.testing.assert_close(out.divergence.double(), want["divergence"], rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(out.teacher_entropy.double(), want["teacher_entropy"], rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_tail_lost_to_rounding_is_what_rounding_resolves(loss, dtype):
    student, ids, _, _ = make(3, 40, 3)
    logprobs = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.06, 0.04], [0.4, 0.4, 0.2]]).log()
    logprobs = (logprobs + 1e-3 if dtype == torch.bfloat16 else logprobs + 2e-7).to(dtype)
    assert (logprobs.double().exp().sum(-1) > 1).all()
    for beta in (0.0, 1.0, 0.5):
        out = loss(student, ids, logprobs, beta=beta)
        want = oracle(student.double(), ids, logprobs, beta=beta)
        assert out.divergence.isfinite().all()
        torch.testing.assert_close(out.divergence.double(), want["divergence"], rtol=3e-6, atol=3e-7)


def test_a_one_hot_teacher_has_no_tail(loss):
    student, ids, logprobs, _ = make(1, 40, 1)
    logprobs = torch.zeros_like(logprobs)
    want = oracle(student.double(), ids, logprobs)
    out = loss(student, ids, logprobs)
    torch.testing.assert_close(out.divergence.double(), want["divergence"], rtol=2e-6, atol=0)
    assert out.teacher_entropy.item() == 0
    assert loss(student, ids, logprobs, beta=1.0).divergence.item() == INF
    assert loss(student, ids, logprobs, beta=0.5).divergence.isfinite()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_every_column_listed_leaves_no_tail(loss, beta):
    """Log-probabilities that sum to 0.99 leave the teacher mass, but no column to put it on."""
    student, ids, logprobs, _ = make(2, 9, 9)
    found = student.clone().requires_grad_()
    out = loss(found, ids, logprobs - 0.01, beta=beta)
    out.divergence.sum().backward()
    truth = student.double().requires_grad_()
    want = oracle(truth, ids, logprobs - 0.01, beta=beta)["divergence"]
    want.sum().backward()
    torch.testing.assert_close(out.divergence.detach().double(), want.detach(), rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(found.grad.double(), truth.grad, rtol=1e-5, atol=1e-7)


def test_a_student_without_a_tail_and_a_teacher_that_may_have_none(loss):
    """Both masked to the listed columns: the teacher's tail is rounding. If it is more, forward KL is infinite."""
    logprobs = torch.tensor([[0.5, 0.3, 0.2]]).log()
    ids = torch.tensor([[4, 2, 7]])
    student = torch.full((1, 30), -INF).scatter_(-1, ids, torch.tensor([[0.3, 0.1, 0.0]]))
    out = loss(student, ids, logprobs)
    want = (logprobs.exp() * (logprobs - torch.tensor([[0.3, 0.1, 0.0]]).log_softmax(-1))).sum()
    torch.testing.assert_close(out.divergence[0], want, rtol=1e-5, atol=1e-7)
    assert loss(student, ids, logprobs - 0.01).divergence.item() == INF
    assert loss(student, ids, logprobs - 0.01, beta=1.0).divergence.isfinite()


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("spread", [1e-3, 1e-5])
def test_nearly_equal_sides_keep_their_digits(loss, tail, spread):
    """A true KL of 1e-7 and 1e-11, far below the rounding of the log-probabilities; never negative."""
    g = torch.Generator().manual_seed(5)
    student = 3 * torch.randn(8, 3000, generator=g)
    teacher = (student + spread * torch.randn(8, 3000, generator=g)).double().log_softmax(-1)
    logprobs, ids = teacher.topk(48)
    for beta in (0.0, 0.5, 1.0):
        found = loss(student, ids, logprobs.float(), tail=tail, beta=beta).divergence.double()
        want = oracle(student.double(), ids, logprobs, tail=tail, beta=beta)["divergence"]
        assert 0.02 * spread**2 < want.mean() < spread**2
        assert (found >= 0).all()
        error = (found - want).abs().max()
        assert error <= {1e-3: 2e-9, 1e-5: 2e-11}[spread], error


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_that_of_plain_pytorch(loss, thorough, dtype, tail, beta):
    """RMS and largest error over 64 rows: at most 1.2 times plain PyTorch's, plus 2 ulp; values and gradients."""
    chosen = (("bucket", 0.0, torch.float32), ("bucket", 1.0, torch.bfloat16), ("ignore", 0.3, torch.float32))
    if not thorough and (tail, beta, dtype) not in chosen:
        pytest.skip("one of each kind is enough here")
    student, ids, logprobs, labels = make(64, 512, 16, dtype, seed=7)
    mix = torch.linspace(0.5, 2.0, 64)
    found = student.clone().requires_grad_()
    out = loss(found, ids, logprobs, labels, tail=tail, beta=beta, temperature=0.7)
    ours = [out.divergence, out.student_entropy, out.student_logprob]
    (mix * ours[0] - mix.flip(0) * ours[1] + 0.3 * ours[2]).sum().backward()
    yard = student.clone().requires_grad_()
    theirs = plain(yard, ids, logprobs, labels, tail, beta, 0.7)
    (mix * theirs[0] - mix.flip(0) * theirs[1] + 0.3 * theirs[2]).sum().backward()
    truth = student.double().requires_grad_()
    want = oracle(truth, ids, logprobs, labels, tail=tail, beta=beta, temperature=0.7)
    want = [want["divergence"], want["student_entropy"], want["student_logprob"]]
    (mix * want[0] - mix.flip(0) * want[1] + 0.3 * want[2]).sum().backward()
    pairs = [*zip(ours, theirs, want, [torch.float32] * 3, strict=True), (found.grad, yard.grad, truth.grad, dtype)]
    for i, (mine, other, exact, kind) in enumerate(pairs):
        e = [(x.detach().double() - exact.detach()).abs() for x in (mine, other)]
        ulp = torch.finfo(kind).eps * exact.detach().abs().max()
        assert e[0].square().mean().sqrt() <= 1.2 * e[1].square().mean().sqrt() + 2 * ulp, i
        assert e[0].max() <= 1.2 * e[1].max() + 2 * ulp, i
