"""Gradients narrower than the logits, in buffers as the linear losses have them: padded rows, any number of columns."""

from __future__ import annotations

import pytest
import torch

import caop_kernels.gradient
from helpers.guarded_memory import forbid, guarded
from helpers.kernel_gradients import OUTPUTS, assert_gradient, exact_gradient, kernel_gradient, upstream
from helpers.row_oracle import logits

NAN = float("nan")
V = 3001  # odd: a whole tile of 2048 columns and a part of one
STRIDE = 3072  # rows start where 16 bytes can be loaded; three pages of float32
UNTOUCHED = -3.0  # what the padding holds; exact in every dtype

# beta and what flows: the terms that the kernel is compiled with, as in `aot.rows.GRADIENT_TERMS`.
TERMS = {
    "forward": (0.0, ("divergence",)),
    "reverse": (1.0, ("divergence",)),
    "per-row": ("rows", ("divergence",)),
    "interior": (0.3, ("divergence",)),
    "student": (0.0, ("logprob", "entropy", "lse")),
    "logprob": (0.0, ("logprob",)),
    "everything": ("rows", OUTPUTS),
    "interior-everything": (0.3, OUTPUTS),
}


def padded(rows, dtype, device):
    """[rows, V] in a buffer of wider rows."""
    return torch.full((rows, STRIDE), UNTOUCHED, dtype=dtype, device=device)[:, :V]


def in_padded_rows(source):
    found = padded(source.shape[0], source.dtype, source.device)
    found._base[:, V:] = NAN  # not read
    return found.copy_(source)


def case(kind, n, device):
    """Labels, and the arguments of ``kernel_gradient`` and ``exact_gradient`` that both take."""
    beta, names = TERMS[kind]
    beta = (torch.arange(n, device=device) % 2).float() if beta == "rows" else beta
    labels = torch.arange(n, device=device) * 701 % V
    labels[-1] = V - 1
    return labels, {"beta": beta, "flows": upstream(n, *names, device=device), "temperature": 0.7}


@pytest.mark.parametrize(
    ("kind", "softcap", "dtype"),
    [
        *((kind, None, torch.bfloat16) for kind in TERMS),
        ("everything", None, torch.float16),
        ("interior-everything", 6.0, torch.float16),
    ],
)
def test_the_float32_gradient_rounded_once_and_nothing_beside_it(device, kind, softcap, dtype):
    sources = logits("normal", 4, V, torch.float32, device)
    student, teacher = (in_padded_rows(source) for source in sources)
    labels, options = case(kind, 4, device)
    options["student_softcap"] = softcap
    wide, out = padded(4, torch.float32, device), padded(4, dtype, device)
    kernel_gradient(student, teacher, labels, out=wide, **options)
    got, _ = kernel_gradient(student, teacher, labels, out=out, **options)
    assert got is out
    assert torch.equal(got, wide.to(dtype))
    assert (got != 0).any(-1).all()
    assert bool((out._base[:, V:] == UNTOUCHED).all())
    for side, source in zip((student, teacher), sources, strict=True):
        assert torch.equal(side, source)
    want, _ = exact_gradient(*sources, labels, **options)
    assert_gradient(got, want, sources[0])


@pytest.mark.parametrize(("kind", "dtype"), [("everything", torch.bfloat16), ("interior-everything", torch.float16)])
def test_rows_of_weight_zero_are_zero_and_not_read(device, kind, dtype):
    """Interpreted, their logits lie in memory that must not be read: the process would die."""
    sources = logits("normal", 3, V, torch.float32, device)
    live = torch.tensor([0, 2], device=device)
    labels, options = case(kind, 3, device)
    part = {**options, "flows": {k: v[live] for k, v in options["flows"].items()}}
    part["beta"] = options["beta"][live] if isinstance(options["beta"], torch.Tensor) else options["beta"]
    want, _ = exact_gradient(sources[0][live], sources[1][live], labels[live], **part)
    sides = []
    for source in sources:
        area = guarded(3, STRIDE) if device.type == "cpu" else torch.empty(3, STRIDE, device=device)
        area[:, :V] = source
        area[1] = NAN
        if device.type == "cpu":
            forbid(area[1])
        sides.append(area[:, :V])
    labels[1] = 2**40
    out = padded(3, dtype, device)
    out[1] = NAN
    weights = torch.tensor([0.5, 0.0, 2.0], device=device)
    got, divergence = kernel_gradient(*sides, labels, weights=weights, out=out, **options)
    assert torch.equal(got[1], torch.zeros_like(got[1]))
    assert divergence[1] == 0
    assert_gradient(got[live], want, sources[0][live])
    assert bool((out._base[:, V:] == UNTOUCHED).all())


@pytest.mark.parametrize("out", [None, torch.float32, torch.bfloat16])
def test_the_launch_follows_from_what_is_loaded(device, out, monkeypatch):
    """A narrower gradient must not make threads load 32 bytes at a time, nor ragged rows take the unaligned way."""
    seen = []
    table = caop_kernels.gradient.gradient_launch

    def spy(backend, itemsize, **options):
        seen.append((itemsize, options["aligned"]))
        return table(backend, itemsize, **options)

    monkeypatch.setattr(caop_kernels.gradient, "gradient_launch", spy)
    student, teacher = (in_padded_rows(side) for side in logits("normal", 2, V, torch.float32, device))
    flows = upstream(2, "divergence", device=device)
    kernel_gradient(student, teacher, flows=flows, out=None if out is None else padded(2, out, device))
    assert seen == [(4, out is not None)]  # a new tensor has no padding


def confidence_gradient(source, out):
    """Candidates at the ends of tiles; the last row has weight 0."""
    n, device = source.shape[0], source.device
    ids, values = torch.tensor([0, 2047, V - 1], device=device), torch.tensor([0.0, 0.5, 1.0], device=device)
    target, weights = torch.full((n,), 0.4, device=device), (torch.arange(n, device=device) < n - 1).float()
    options = {"kind": "cross_entropy", "weights": weights, "temperature": 0.7}
    *_, saved = caop_kernels.confidence_scores(source, ids, values, target, **options)
    flow = torch.linspace(0.5, 2, n, device=device)
    return caop_kernels.confidence_scores_gradient(
        source, ids, values, target, saved, **options, grad_loss=flow, grad_expected=flow, out=out
    )


def topk_gradient(source, out):
    """Listed columns at the ends of tiles; the last row has weight 0."""
    n, device = source.shape[0], source.device
    ids = torch.tensor([[0, 2047, V - 1]], device=device).expand(n, 3).contiguous()
    logprobs, weights = torch.full((n, 3), -1.5, device=device), (torch.arange(n, device=device) < n - 1).float()
    options = {"weights": weights, "temperature": 0.7, "beta": 0.3}
    found = caop_kernels.topk_statistics(source, ids, logprobs, None, **options)
    return caop_kernels.topk_statistics_gradient(
        source, ids, logprobs, None, found.saved_statistics, found.student_entropy, **options,
        grad_divergence=torch.linspace(0.5, 2, n, device=device), out=out,
    )  # fmt: skip


@pytest.mark.parametrize("gradient", [confidence_gradient, topk_gradient])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_other_gradients_rounded_once_and_nothing_beside_them(device, gradient, dtype):
    source = in_padded_rows(logits("normal", 4, V, torch.float32, device)[0])
    want, out = gradient(source, None), padded(4, dtype, device)
    assert gradient(source, out) is out
    assert want.dtype == torch.float32
    assert want.abs().max() > 0
    assert torch.equal(out, want.to(dtype))
    assert bool((out._base[:, V:] == UNTOUCHED).all())
