"""Rounding errors against those of plain PyTorch in the same dtype, and digits where the distributions are close."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from caop_fast import distillation_loss
from helpers import gpu_arithmetic
from helpers.grid_cases import DTYPES
from helpers.oracle import pairwise, statistics
from helpers.row_oracle import logits

ROWS = 64
COVER = [
    tuple(c.values()) for c in pairwise(dtype=list(DTYPES), kind=["normal", "peaked", "near"], beta=[0.0, 0.5, 1.0])
]
VOCAB = {"fp32": 1031, "bf16": 1024, "fp16": 1000}


def plain(student: Tensor, teacher: Tensor, labels: Tensor, beta: float) -> dict[str, Tensor]:
    """Statistics as PyTorch code computes them from logits: float32 log_softmax, kl_div, logsumexp for the mixture."""
    ls, lt = torch.log_softmax(student.float(), -1), torch.log_softmax(teacher.float(), -1)

    def kl(first: Tensor, second: Tensor) -> Tensor:
        return kl_div(second, first, reduction="none", log_target=True).sum(-1)

    if beta == 0:
        divergence = kl(lt, ls)
    elif beta == 1:
        divergence = kl(ls, lt)
    else:
        lm = torch.logsumexp(torch.stack([ls + math.log(1 - beta), lt + math.log(beta)]), 0)
        divergence = beta * kl(lt, lm) + (1 - beta) * kl(ls, lm)
    return {
        "divergence": divergence,
        "student_logprob": ls.gather(-1, labels[:, None])[:, 0],
        "teacher_logprob": lt.gather(-1, labels[:, None])[:, 0],
        "student_entropy": -(ls.exp() * ls).sum(-1),
        "teacher_entropy": -(lt.exp() * lt).sum(-1),
    }


def exact(student: Tensor, teacher: Tensor, labels: Tensor, beta: float) -> dict[str, Tensor]:
    return dict(
        zip(plain(student, teacher, labels, beta), statistics(student, teacher, labels, beta=beta), strict=True)
    )


def ours(backend: str, student: Tensor, teacher: Tensor, labels: Tensor, beta: float) -> dict[str, Tensor]:
    out = distillation_loss(student, teacher, labels, beta=beta, backend=backend)
    return {name: value for name, value in out._asdict().items() if name != "loss"}


def no_worse(name: str, got: Tensor, theirs: Tensor, truth: Tensor, eps: float, times: float = 1.2) -> None:
    """RMS and largest error at most ``times`` theirs plus 2 ulp of the RMS and the largest value."""
    got, theirs, truth = (t.detach().cpu().double() for t in (got, theirs, truth))
    for measure in (lambda x: x.square().mean().sqrt(), lambda x: x.abs().max()):
        error, limit = measure(got - truth), times * measure(theirs - truth) + 2 * eps * measure(truth)
        assert error <= limit, f"{name}: {float(error)} > {float(limit)}"


@pytest.mark.parametrize(("dtype", "kind", "beta"), COVER)
def test_errors_are_those_of_plain_pytorch(place, dtype, kind, beta):
    student, teacher = logits(kind, ROWS, VOCAB[dtype], DTYPES[dtype], place.device, seed=3)
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(0, VOCAB[dtype], (ROWS,), generator=g).to(place.device)
    sides = {name: student.clone().requires_grad_() for name in ("got", "theirs")}
    truth_in = student.double().requires_grad_()
    got = ours(place.backend, sides["got"], teacher, labels, beta)
    theirs = plain(sides["theirs"], teacher, labels, beta)
    truth = exact(truth_in, teacher.double(), labels, beta)
    single = torch.finfo(torch.float32).eps
    for name, value in truth.items():
        no_worse(name, got[name], theirs[name], value, single)

    names = ("divergence", "student_logprob", "student_entropy")
    flows = {name: (1.25 + torch.rand(ROWS, generator=g)) * (-1) ** i for i, name in enumerate(names)}
    for asked in (names[:1], names):
        gradients = []
        for found, leaf in ((got, sides["got"]), (theirs, sides["theirs"]), (truth, truth_in)):
            upstream = [flows[name].to(found[name]) for name in asked]
            gradients += torch.autograd.grad([found[name] for name in asked], leaf, upstream, retain_graph=True)
        no_worse(f"gradient of {asked}", *gradients, torch.finfo(DTYPES[dtype]).eps)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_divergence_of_5e_7_keeps_its_digits(place, beta):
    g = torch.Generator().manual_seed(5)
    student = 3.0 * torch.randn(6, 32768, generator=g)
    teacher = student + 1e-3 * torch.randn(6, 32768, generator=g)
    teacher[5] = student[5]
    student, teacher = student.to(place.device), teacher.to(place.device)
    found = distillation_loss(student, teacher, beta=beta, backend=place.backend).divergence.double()
    truth = statistics(student.double(), teacher.double(), beta=beta)[0]
    if beta != 0.5:
        assert 4e-7 < truth[:5].mean() < 6e-7
    assert ((found - truth).abs() < 1e-7).all()
    assert (found >= 0).all()
    assert found[5] == 0


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_logits_around_1e4(place, beta):
    student, teacher = logits("large", ROWS, 1031, torch.float32, place.device, seed=2)
    labels = torch.arange(ROWS, device=place.device)
    sides = {name: student.clone().requires_grad_() for name in ("got", "theirs")}
    truth_in = student.double().requires_grad_()
    got = ours(place.backend, sides["got"], teacher, labels, beta)
    theirs = plain(sides["theirs"], teacher, labels, beta)
    truth = exact(truth_in, teacher.double(), labels, beta)
    up = torch.linspace(-2.0, -1.0, ROWS, device=place.device)
    for found in (got, theirs, truth):
        ((found["divergence"] + 0.5 * found["student_entropy"] - found["student_logprob"]) * up).sum().backward()
    eps = torch.finfo(torch.float32).eps
    for name, value in truth.items():
        no_worse(name, got[name], theirs[name], value, eps)
    # Logits that differ by 100 nats: 2 ulp of a term, where the gradient is a difference of terms.
    no_worse("gradient", sides["got"].grad, sides["theirs"].grad, truth_in.grad, eps, times=2.0)


def near(n: int, forward_kl: float, peak: float) -> tuple[Tensor, Tensor]:
    """(student, teacher) [n, 1031] about that KL apart; ``peak`` nats on one column of each row."""
    g = torch.Generator().manual_seed(11)
    student = 2.0 * torch.randn(n, 1031, generator=g, dtype=torch.float64)
    student[torch.arange(n), torch.randint(0, 1031, (n,), generator=g)] += peak
    teacher = student + math.sqrt(2 * forward_kl) * torch.randn(n, 1031, generator=g, dtype=torch.float64)
    return student.float(), teacher.float()


@pytest.mark.parametrize(
    ("arithmetic", "beta"),
    [(a, beta) for beta in (0.0, 0.5) for a in ("++", "??", "contracted")] + [("--", 0.5), ("??", 0.3), ("??", 1.0)],
)
def test_near_rows_whatever_the_arithmetic(place, arithmetic, beta):
    """KL 1e-6 and 1e-2, flat rows and peaked ones, with approximate instructions as far off as they may be: the signs
    of the errors of exp2 and log2; or with multiply-adds contracted. (On a GPU: as it computes.)

    With signs as if by chance the limit is 1.5 instead of 1.2 times PyTorch's errors: each exponential is then off by
    four times the rounding of PyTorch's.
    """
    if place.backend == "torch" or (place.device.type != "cpu" and arithmetic != "++"):
        pytest.skip("one arithmetic there is")
    groups = [near(8, forward_kl, peak) for forward_kl in (1e-6, 1e-2) for peak in (0.0, 9.0)]
    student, teacher = (torch.cat(side).to(place.device) for side in zip(*groups, strict=True))
    labels = torch.arange(len(student), device=place.device)
    leaves = [student.clone().requires_grad_(), student.clone().requires_grad_(), student.double().requires_grad_()]
    with gpu_arithmetic.arithmetic(arithmetic) if place.device.type == "cpu" else nullcontext():
        found = [ours(place.backend, leaves[0], teacher, labels, beta)]
        up = torch.linspace(-2.0, -1.0, len(student), device=place.device)
        (found[0]["divergence"] * up).sum().backward()
    found += [plain(leaves[1], teacher, labels, beta), exact(leaves[2], teacher.double(), labels, beta)]
    for values in found[1:]:
        (values["divergence"] * up.to(values["divergence"])).sum().backward()
    for values, leaf in zip(found, leaves, strict=True):
        values["gradient"] = leaf.grad
    eps, times = torch.finfo(torch.float32).eps, 1.5 if arithmetic == "??" else 1.2
    for name in found[0]:
        for start in range(0, len(student), 8):
            no_worse(f"{name} {start}", *(values[name][start : start + 8] for values in found), eps, times)
