"""distillation_loss under torch.compile, autocast and the ways autograd calls a backward."""

from __future__ import annotations

import pytest
import torch

from caop_fast import distillation_loss


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()


def make(n=6, vocab=33, seed=0):
    g = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(n, vocab, generator=g) for _ in range(2))
    return student, teacher, torch.randint(0, vocab, (n,), generator=g)


def total(student, teacher, labels, **options):
    out = distillation_loss(student, teacher, labels, **options)
    loss = out.loss if out.loss.ndim == 0 else out.loss.sum()
    return 1.5 * loss - 0.4 * out.student_logprob.sum() + 0.3 * out.student_entropy.sum()


def same(options, backend="aot_eager", dynamic=None):
    """Compiled and eager agree, value and gradient, for several numbers of rows when shapes are dynamic."""
    compiled = torch.compile(total, fullgraph=True, backend=backend, dynamic=dynamic)
    for n in (6,) if dynamic is None else (6, 3, 9):
        student, teacher, labels = make(n)
        leaf = student.requires_grad_()
        per_row = {k: v[:n] if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        results = [fn(leaf, teacher, labels, **per_row) for fn in (total, compiled)]
        gradients = [torch.autograd.grad(value, leaf)[0] for value in results]
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-7)
        assert gradients[1].abs().sum() > 0


WEIGHTS = torch.tensor([1.0, 0, 2, 0.5, 0, 1, 1, 0, 3])
ROWS = torch.tensor([0.0, 1, 1, 0, 1, 0, 0, 1, 0])


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.4, "temperature": 1.3, "student_softcap": 20.0},
        {"beta": ROWS[:6], "weights": WEIGHTS[:6]},
        {"beta": 1.0, "vocab_size": 33, "reduction": "sum", "validate": False},
        {"reduction": "none", "weights": WEIGHTS[:6]},
    ],
    ids=["mixture", "per token", "sum", "none"],
)
def test_fullgraph(options):
    same(options)


def test_fullgraph_with_inductor():
    same({"beta": ROWS[:6], "weights": WEIGHTS[:6], "temperature": 0.7}, backend="inductor")


def test_dynamic_shapes():
    same({"beta": ROWS, "weights": WEIGHTS}, dynamic=True)
    same({"beta": 0.5}, dynamic=True)


def test_one_compilation_serves_any_number_of_rows():
    graphs = []

    def count(module, _):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(total, fullgraph=True, backend=count, dynamic=True)
    for n in (6, 3, 9):
        compiled(*make(n))
    assert len(graphs) == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_inplace(backend):
    student, teacher, labels = make()

    def loss(logits):
        return total(logits * 2.0, teacher, labels, inplace=True, weights=WEIGHTS[:6])

    leaf = student.requires_grad_()
    want = torch.autograd.grad(total(leaf * 2.0, teacher, labels, weights=WEIGHTS[:6]), leaf)[0]
    for call in (loss, torch.compile(loss, fullgraph=True, backend=backend)):
        torch.testing.assert_close(torch.autograd.grad(call(leaf), leaf)[0], want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": torch.full((6,), 33)}, r"labels must be -100 or in \[0, 33\), got 33"),
        ({"weights": torch.full((6,), -1.0)}, "weights must be finite and >= 0"),
        ({"beta": torch.full((6,), 0.5)}, "beta tensor chooses 0 or 1 per token"),
    ],
)
def test_bad_values_are_refused_in_compiled_code_too(change, words):
    student, teacher, labels = make()
    arguments = {"labels": labels, **change}
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=words):
        compiled(student, teacher, **arguments)
    assert not compiled(student, teacher, **arguments, validate=False).isfinite() or "weights" in change


def test_autocast_changes_no_bit():
    student, teacher, labels = make()
    results = []
    for enabled in (False, True):
        leaf = student.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = distillation_loss(leaf, teacher, labels, beta=0.3)
            (out.loss + 0.2 * out.student_entropy.sum()).backward()
        results.append([t.detach() for t in (*out, leaf.grad)])
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(*results, strict=True))


def test_backward_twice_and_double_backward():
    student, teacher, labels = make()
    leaf = student.requires_grad_()
    value = total(leaf, teacher, labels, beta=0.3, weights=WEIGHTS[:6])
    value.backward(retain_graph=True)
    once = leaf.grad.clone()
    value.backward()
    assert torch.equal(leaf.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()
    for output in ("divergence", "student_logprob", "student_entropy"):
        found = getattr(distillation_loss(leaf, teacher, labels), output)
        (gradient,) = torch.autograd.grad(found.sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once: double backward"):
            gradient.sum().backward()


def test_each_output_alone_and_a_subset_of_rows():
    """Outputs that nothing flows into have no part in the gradient, nor do rows."""
    student, teacher, labels = make()
    student.requires_grad_()
    parts = []
    for output in ("divergence", "student_logprob", "student_entropy"):
        out = distillation_loss(student, teacher, labels, beta=0.6)
        (gradient,) = torch.autograd.grad(getattr(out, output)[:3].sum(), student)
        assert (gradient[:3] != 0).any(-1).all()
        assert (gradient[3:] == 0).all()
        parts.append(gradient)
    out = distillation_loss(student, teacher, labels, beta=0.6)
    mixed = out.divergence[:3].sum() + out.student_logprob[:3].sum() + out.student_entropy[:3].sum()
    torch.testing.assert_close(torch.autograd.grad(mixed, student)[0], sum(parts))


@pytest.mark.parametrize("compiled", [False, True])
def test_inplace_refuses_a_leaf_and_its_views(compiled):
    leaf = torch.randn(6, 33, requires_grad=True)
    before = leaf.detach().clone()
    for view in (lambda z: z, lambda z: z[1:], lambda z: z.view(2, 3, 33)):

        def loss(logits, view=view):
            rows = view(logits)
            return distillation_loss(rows, torch.zeros_like(rows), inplace=True).loss

        call = torch.compile(loss, fullgraph=False, backend="aot_eager") if compiled else loss
        with pytest.raises(Exception, match="leaf that requires grad"):  # the compiler wraps the ValueError
            call(leaf).backward()
        assert torch.equal(leaf.detach(), before)
