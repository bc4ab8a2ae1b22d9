"""distillation_loss against float64 truth: the grid, gradients, accuracy near zero, edge values."""

from __future__ import annotations

import math

import pytest
import torch

from caop_fast import distillation_loss
from caop_fast.losses.backends import row_blocks
from caop_fast.losses.options import DivergenceOptions
from caop_fast.losses.reference import divergence
from caop_fast.losses.reference.divergence import contains_neg_inf, open_block
from helpers.oracle import pairwise, plain, statistics, weighted_mean

NAMES = ("divergence", "student_logprob", "teacher_logprob", "student_entropy", "teacher_entropy")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5, torch.float64: 1e-12}
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float64: 1e-11}

GRID = pairwise(
    dtype=[torch.float32, torch.bfloat16, torch.float16, torch.float64],
    beta=[0.0, 0.3, 0.5, 1.0, "tensor"],
    temperature=[0.7, 1.0, 2.0],
    softcap=[None, 8.0],
    weights=[None, "zeros", "labels"],
    vocab=[8, 1000, 1031],
    peak=[1.0, 8.0],
)


def make(n, vocab, dtype=torch.float32, peak=3.0, seed=0, near=None):
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(n, vocab, generator=g, dtype=torch.float64) * peak
    teacher = torch.randn(n, vocab, generator=g, dtype=torch.float64)
    teacher = student + near * teacher if near is not None else teacher * peak
    return student.to(dtype), teacher.to(dtype), torch.randint(0, vocab, (n,), generator=g)


@pytest.mark.parametrize("case", GRID, ids=lambda c: "-".join(str(v).replace("torch.", "") for v in c.values()))
def test_grid_matches_float64(case):
    n = 6
    student, teacher, labels = make(n, case["vocab"], case["dtype"], case["peak"])
    beta = torch.tensor([0.0, 1, 1, 0, 1, 0]) if case["beta"] == "tensor" else case["beta"]
    weights = None
    if case["weights"] == "zeros":
        weights = torch.tensor([1.0, 0, 0.5, 2, 0, 1])
    if case["weights"] == "labels":
        labels[2] = -100
    options = {"beta": beta, "temperature": case["temperature"], "student_softcap": case["softcap"]}
    options["teacher_softcap"] = None if case["softcap"] is None else 11.0
    student.requires_grad_()
    out = distillation_loss(student, teacher, labels, weights=weights, **options)

    truth_student = student.detach().double().requires_grad_()
    truth = statistics(truth_student, teacher, labels, **options)
    live = torch.ones(n)
    if case["weights"]:
        live = weights if weights is not None else (labels != -100).double()
    tolerance = TOLERANCE[case["dtype"]]
    for name, want in zip(NAMES, truth, strict=True):
        got = getattr(out, name)
        assert got.dtype == (torch.float64 if case["dtype"] == torch.float64 else torch.float32)
        want = torch.where(live > 0, want.detach(), 0.0)
        torch.testing.assert_close(got.detach().double(), want, rtol=tolerance, atol=tolerance, msg=name)
    truth_loss = weighted_mean(truth[0], live)
    torch.testing.assert_close(out.loss.detach().double(), truth_loss.detach(), rtol=tolerance, atol=tolerance)

    mix = torch.linspace(0.5, 2.0, n, dtype=torch.float64)  # upstream gradients that are not 1

    def total(loss, divergence, logprob, entropy):
        per_row = 0.7 * mix * divergence - 1.3 * mix.flip(0) * logprob + 0.4 * mix.cos() * entropy
        return 3 * loss + torch.where(live > 0, per_row, 0.0).sum()

    total(out.loss, out.divergence, out.student_logprob, out.student_entropy).backward()
    total(truth_loss, truth[0], truth[1], truth[3]).backward()
    want = truth_student.grad
    assert student.grad.dtype == student.dtype
    error = (student.grad.double() - want).abs()
    assert (error <= ROUNDING[case["dtype"]] * (want.abs() + 0.02 * want.abs().amax(-1, keepdim=True)) + 1e-7).all()
    assert (student.grad[live == 0] == 0).all()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0, "tensor"])
@pytest.mark.parametrize("output", ["loss", "divergence", "student_logprob", "student_entropy"])
def test_gradcheck_each_output(beta, output):
    student, teacher, labels = make(5, 9, torch.float64, 2.0)
    labels[1] = -100
    chosen = torch.tensor([0.0, 1, 1, 0, 1]) if beta == "tensor" else beta
    weights = torch.tensor([1.0, 2, 0, 0.5, 1])

    def f(z):
        return getattr(
            distillation_loss(
                z, teacher, labels, beta=chosen, temperature=0.8, student_softcap=4.0, weights=weights, vocab_size=7
            ),
            output,
        )

    labels.clamp_(max=6)
    assert torch.autograd.gradcheck(f, (student.requires_grad_(),))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("near", [1e-3, 3e-2])
def test_near_equal_distributions_keep_their_digits(beta, near):
    student, teacher, _ = make(4, 151936, peak=2.0, near=near)
    got = distillation_loss(student, teacher, beta=beta).divergence.double()
    want = statistics(student, teacher, beta=beta)[0]
    assert (got >= 0).all()
    assert (got - want).abs().max() < 1e-7
    if near == 1e-3 and beta == 0:
        assert want.max() < 1e-6  # the case the claim is about


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("near", [None, 0.05])
def test_errors_not_above_plain_pytorch(dtype, beta, near):
    student, teacher, _ = make(64, 4001, dtype, peak=3.0, near=near, seed=3)
    up = torch.linspace(0.5, 1.5, 64)
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    truth_in = student.double().requires_grad_()
    out = distillation_loss(ours, teacher, beta=beta)
    kl, entropy = plain(theirs, teacher, beta)
    truth = statistics(truth_in, teacher, beta=beta)
    for loss in (out.divergence, kl, truth[0]):
        (loss * up).sum().backward()

    def compare(got, base, want, eps):
        ulp = eps * want.abs().max()
        for measure in (lambda e: e.pow(2).mean().sqrt(), lambda e: e.abs().max()):
            assert measure(got.double() - want) <= 1.2 * measure(base.double() - want) + 2 * ulp

    e32 = torch.finfo(torch.float32).eps
    compare(out.divergence.detach(), kl.detach(), truth[0].detach(), e32)
    compare(out.student_entropy.detach(), entropy.detach(), truth[3].detach(), e32)
    compare(ours.grad, theirs.grad, truth_in.grad, torch.finfo(dtype).eps)


def test_mixture_has_no_underflow():
    """Where p of one side is e^-300 a mixture formed in probability space is 0 and its log NaN or -inf."""
    student = torch.tensor([[0.0, -300.0, 2.0], [300.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-300.0, 0.0, -400.0], [0.0, 300.0, 0.0]])
    out = distillation_loss(student, teacher, beta=0.5)
    truth_in = student.detach().double().requires_grad_()
    truth = statistics(truth_in, teacher, beta=0.5)[0]
    torch.testing.assert_close(out.divergence.detach().double(), truth.detach(), rtol=1e-6, atol=1e-6)
    out.loss.backward()
    truth.mean().backward()
    torch.testing.assert_close(student.grad.double(), truth_in.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, "tensor"])
def test_minus_infinity(beta):
    inf = math.inf
    student = torch.tensor([[1.0, -inf, 2, -inf], [1.0, 0, 2, -inf], [1.0, 0.5, 0, 2]])
    teacher = torch.tensor([[0.5, -inf, 0, -inf], [0.3, 1, 2, -inf], [1.0, 0.5, 0, -inf]])
    chosen = torch.tensor([0.0, 1, 0]) if beta == "tensor" else beta
    student.requires_grad_()
    out = distillation_loss(student, teacher, beta=chosen)
    truth_in = torch.where(student.detach() == -inf, -1e300, student.detach().double()).requires_grad_()
    truth = statistics(truth_in, torch.where(teacher == -inf, -1e300, teacher.double()), beta=chosen)
    finite = torch.tensor([True, True, beta != 1.0])
    torch.testing.assert_close(out.divergence.detach().double()[finite], truth[0].detach()[finite])
    torch.testing.assert_close(out.student_entropy.detach().double(), truth[3].detach())
    if beta == 1.0:
        assert out.divergence[2] == inf  # the student gives mass to what the teacher excludes
    out.divergence[finite].sum().backward()
    truth[0][finite].sum().backward()
    torch.testing.assert_close(student.grad.double()[finite], truth_in.grad[finite], rtol=1e-5, atol=1e-6)
    assert (student.grad[student == -inf] == 0).all()


def test_forward_kl_is_infinite_where_the_student_excludes_a_token_the_teacher_allows():
    student = torch.tensor([[0.0, -math.inf, 0.0], [0.0, 1.0, 0.0]])
    teacher = torch.tensor([[0.0, -12.0, 0.0], [0.0, 1.0, 0.0]])  # a probability of 3e-6 is enough
    assert distillation_loss(student, teacher).divergence.tolist() == [math.inf, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, "all -inf"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_bad_row_poisons_only_itself(bad, beta):
    student, teacher, labels = make(4, 11)
    clean = distillation_loss(student, teacher, labels, beta=beta)
    if bad == "all -inf":
        student[1] = -math.inf
    else:
        student[1, 3] = bad
    student.requires_grad_()
    out = distillation_loss(student, teacher, labels, beta=beta)
    others = [0, 2, 3]
    assert out.divergence[1].isnan()
    assert torch.equal(out.divergence[others], clean.divergence[others])
    out.divergence[others].sum().backward()
    assert student.grad[others].isfinite().all()
    # weight 0 takes the row out altogether
    student.grad = None
    weights = torch.tensor([1.0, 0, 1, 2])
    out = distillation_loss(student, teacher, labels, beta=beta, weights=weights)
    (out.loss + out.divergence.sum() + out.student_logprob.sum() + out.student_entropy.sum()).backward()
    assert [float(getattr(out, name).detach()[1]) for name in NAMES] == [0.0] * 5
    assert student.grad.isfinite().all()
    assert (student.grad[1] == 0).all()
    assert (student.grad[others] != 0).any(-1).all()


def test_huge_logits_are_fine():
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 5.0]])
    out = distillation_loss(student, student.flip(0), beta=1.0)
    assert out.divergence.tolist() == [2e4, 2e4]


def test_leading_shapes_reductions_and_weights():
    student, teacher, labels = make(12, 17)
    flat = distillation_loss(student, teacher, labels, reduction="none")
    shaped = distillation_loss(
        student.view(3, 4, 17), teacher.view(3, 4, 17), labels.view(3, 4), beta=torch.zeros(3, 4), reduction="none"
    )
    for a, b in zip(flat, shaped, strict=True):
        assert b.shape == (3, 4)
        assert torch.equal(a, b.flatten())
    weights = torch.rand(12)
    weights[3] = 0
    d = flat.divergence
    for reduction, want in (
        ("none", d * weights),
        ("sum", (d * weights).sum()),
        ("mean", (d * weights).sum() / weights.sum()),
    ):
        got = distillation_loss(student, teacher, labels, weights=weights, reduction=reduction).loss
        torch.testing.assert_close(got, want)
    all_zero = distillation_loss(student.requires_grad_(), teacher, weights=torch.zeros(12))
    assert all_zero.loss == 0
    all_zero.loss.backward()
    assert (student.grad == 0).all()


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_few_rows(n, beta):
    student, teacher, labels = make(n, 6)
    student.requires_grad_()
    out = distillation_loss(student, teacher, labels, beta=beta)
    assert out.divergence.shape == (n,)
    assert out.loss.isfinite()
    out.loss.backward()
    assert student.grad.shape == (n, 6)


def test_strided_rows_vocab_size_and_two_vocabularies():
    student, teacher, labels = make(5, 40)
    labels.clamp_(max=29)
    want_in = student[:, :30].contiguous().requires_grad_()
    want = distillation_loss(want_in, teacher[:, :30].contiguous(), labels)
    want.loss.backward()
    base = torch.full((10, 40), math.nan)
    base[::2] = student
    base[::2, 30:] = math.nan  # what lies past vocab_size must not be looked at
    base.requires_grad_()
    out = distillation_loss(base[::2], teacher[:, :33], labels, vocab_size=30)
    out.loss.backward()
    assert torch.equal(out.divergence, want.divergence)
    assert torch.equal(base.grad[::2, :30], want_in.grad)
    assert (base.grad[::2, 30:] == 0).all()
    columns = student.t().contiguous().t()  # no unit column stride
    assert torch.allclose(distillation_loss(columns, teacher).loss, distillation_loss(student, teacher).loss)


def test_labels_out_of_range_without_validation_give_nan_there_only():
    student, teacher, _ = make(4, 7)
    student.requires_grad_()
    out = distillation_loss(student, teacher, torch.tensor([1, 7, -3, -100]), validate=False)
    assert out.student_logprob.isnan().tolist() == [False, True, True, False]
    assert out.student_logprob[3] == 0
    out.student_logprob.sum().backward()
    assert student.grad.isnan().any(-1).tolist() == [False, True, True, False]
    bad_beta = distillation_loss(student, teacher, beta=torch.tensor([0.0, 0.5, 1, 0]), validate=False)
    assert bad_beta.divergence.isnan().tolist() == [False, True, False, False]


def test_inplace_writes_the_gradient_over_the_logits():
    student, teacher, labels = make(5, 12)
    reference = student.clone().requires_grad_()
    weights = torch.tensor([1.0, 0, 1, 2, 1])
    distillation_loss(reference, teacher, labels, weights=weights, vocab_size=12).loss.backward()
    leaf = student.clone().requires_grad_()
    logits = leaf * 1.0
    out = distillation_loss(logits, teacher, labels, weights=weights, inplace=True)
    out.loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, reference.grad)
    assert torch.equal(logits.detach(), reference.grad)
    with pytest.raises(RuntimeError, match="the first backward wrote"):
        out.loss.backward()
    with pytest.raises(ValueError, match="a leaf that requires grad"):
        distillation_loss(leaf, teacher, inplace=True)


@pytest.mark.parametrize("view", ["view", "slice", "view of a view", "transpose"])
def test_inplace_refuses_a_view_of_a_leaf(view):
    """Its memory is the parameter's own: the backward would overwrite it without autograd noticing."""
    leaf = torch.nn.Parameter(torch.randn(4, 3, 5))
    student = {
        "view": lambda: leaf.view(12, 5),
        "slice": lambda: leaf[:, :2],
        "view of a view": lambda: leaf.view(12, 5)[1:],
        "transpose": lambda: leaf.transpose(0, 1),
    }[view]()
    before = leaf.detach().clone()
    with pytest.raises(ValueError, match="student_logits, a view of a leaf that requires grad"):
        distillation_loss(student, torch.zeros_like(student), inplace=True)
    assert torch.equal(leaf.detach(), before)
    computed = (leaf * 1.0).view(12, 5)  # a view of something computed is fine
    distillation_loss(computed, torch.zeros(12, 5), inplace=True).loss.backward()
    assert torch.equal(leaf.detach(), before)
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0, "tensor"])
def test_the_careful_way_is_the_same_where_nothing_is_excluded(monkeypatch, beta):
    """What accelerators always take, the CPU only where a logit asks for it."""
    student, teacher, labels = make(6, 40)
    chosen = torch.tensor([0.0, 1, 1, 0, 1, 0]) if beta == "tensor" else beta
    results = []
    for care in (False, True):
        calls = []
        monkeypatch.setattr(
            divergence, "contains_neg_inf", lambda block, care=care, calls=calls: calls.append(block) or care
        )
        leaf = student.clone().requires_grad_()
        out = distillation_loss(leaf, teacher, labels, beta=chosen)
        (out.loss + 0.3 * out.student_logprob.sum() + 0.2 * out.student_entropy.sum()).backward()
        assert calls
        results.append((*(t.detach() for t in out), leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_care_is_taken_where_it_is_needed():
    def block(*logits, device="cpu"):
        student = torch.tensor([logits], device=device)
        return open_block(student, torch.zeros_like(student), DivergenceOptions(), torch.float32)[0]

    assert not contains_neg_inf(block(0.0, 1e4, -1e4))
    assert contains_neg_inf(block(0.0, -math.inf, 1.0))
    assert contains_neg_inf(block(0.0, math.nan, 1.0))
    assert contains_neg_inf(block(0.0, math.inf, 1.0))
    assert contains_neg_inf(block(0.0, torch.finfo(torch.float32).min, 1.0))
    assert contains_neg_inf(block(-math.inf, -math.inf))
    assert contains_neg_inf(block(0.0, 1.0, device="meta"))  # an accelerator: yes, without reading anything


def test_retained_graph_and_double_backward():
    student, teacher, labels = make(5, 12)
    student.requires_grad_()
    out = distillation_loss(student, teacher, labels, beta=0.3)
    out.loss.backward(retain_graph=True)
    once = student.grad.clone()
    out.loss.backward()
    torch.testing.assert_close(student.grad, 2 * once)
    (first,) = torch.autograd.grad(distillation_loss(student, teacher).loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        first.sum().backward()


def test_teacher_and_weights_receive_nothing():
    student, teacher, labels = make(5, 12)
    student.requires_grad_()
    teacher.requires_grad_()
    weights = torch.rand(5, requires_grad=True)
    out = distillation_loss(student, teacher, labels, weights=weights)
    assert not out.teacher_logprob.requires_grad
    assert not out.teacher_entropy.requires_grad
    out.loss.backward()
    assert teacher.grad is None
    assert weights.grad is None


def test_block_borders_change_nothing(monkeypatch):
    student, teacher, labels = make(13, 50)
    weights = torch.ones(13)
    weights[4] = 0
    results = []
    for elements in (1, 150, 1 << 19):
        monkeypatch.setattr(row_blocks, "CPU_BLOCK_ELEMENTS", elements)
        leaf = student.clone().requires_grad_()
        out = distillation_loss(leaf, teacher, labels, weights=weights, beta=(torch.arange(13) % 2).float())
        (out.loss + out.student_entropy.sum()).backward()
        results.append((*(t.detach() for t in out), leaf.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("vocab", [17000, 40000])
def test_a_row_does_not_depend_on_the_others_with_two_threads(vocab):
    """PyTorch splits the sum over one long row between threads; a block of several rows it splits by rows."""
    student, teacher, labels = make(6, vocab)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        results = []
        for rows in (slice(None), slice(5, 6), slice(4, 6), slice(1, 6)):
            leaf = student[rows].clone().requires_grad_()
            out = distillation_loss(leaf, teacher[rows], labels[rows], beta=0.5, reduction="none")
            (out.loss.sum() + out.student_entropy.sum()).backward()
            results.append((*(t.detach()[-1] for t in out), leaf.grad[-1]))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
