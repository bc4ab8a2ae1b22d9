"""Our losses against straightforward PyTorch on the CPU: forward + backward, time and peak memory beyond inputs.

    python -m pytest benchmarks --benchmark-only -s

Every contender is checked against float64 before it is timed; memory is measured in a pass of its own and printed, and
recorded in ``extra_info`` of the benchmark's JSON (``--benchmark-json``).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.measure import peak_bytes
from benchmarks.peers import plain
from caop_fast import distillation_loss, linear_distillation_loss

LOGITS_SHAPES = [(256, 32000), (256, 151936)]  # N, V; the second is Qwen's vocabulary
# N, V, H: Qwen's vocabulary on a small model; a language model of the demo's size.
LINEAR_SHAPES = [(512, 32000, 256), (1024, 151936, 256), (3000, 93, 128)]
Run = Callable[..., tuple[Tensor, ...]]

LOGITS: dict[str, Run] = {"plain": plain.distillation, "caop_fast": distillation_loss}
LINEAR: dict[str, Run] = {"plain": plain.linear_distillation, "caop_fast": linear_distillation_loss}


def step(run: Run, leaves: list[Tensor], arguments: list[Tensor]) -> tuple[Tensor, ...]:
    """Forward and backward with fresh gradients."""
    for leaf in leaves:
        leaf.grad = None
    result = run(*arguments)
    result[0].backward()
    return result


def check(run: Run, leaves: list[Tensor], arguments: list[Tensor], truth: Run, rows: int) -> None:
    """Statistics and gradients of the first ``rows`` tokens against float64."""
    ids = {id(leaf): i for i, leaf in enumerate(leaves)}
    small = [a[:rows] if a.shape[0] == arguments[-1].shape[0] else a for a in arguments]
    exact = [a.detach().double() if a.is_floating_point() else a for a in small]
    small = [a.detach().clone().requires_grad_(id(b) in ids) for a, b in zip(small, arguments, strict=True)]
    for copy, original in zip(exact, arguments, strict=True):
        if id(original) in ids:
            copy.requires_grad_()
    got, want = step(run, [], small), step(truth, [], exact)
    for a, b in zip(got, want, strict=True):  # loss, divergence, both log-probabilities, both entropies
        torch.testing.assert_close(a.detach().double(), b.detach(), rtol=1e-4, atol=1e-5)
    for a, b in zip(small, exact, strict=True):
        if a.grad is not None:
            error = (a.grad.double() - b.grad).abs().max() / b.grad.abs().max()
            assert error < 1e-4, f"gradient off by {float(error):.1e} of its maximum"


def double_truth(linear: bool) -> Run:
    """The definition in float64 (``plain`` itself widens to float32 only)."""

    def run(*arguments: Tensor) -> tuple[Tensor, ...]:
        if linear:
            h_s, w_s, h_t, w_t, labels = arguments
            student, teacher = h_s @ w_s.t(), (h_t @ w_t.t()).detach()
        else:
            student, teacher, labels = arguments
        ls, lt = student.log_softmax(-1), teacher.log_softmax(-1)
        divergence = (lt.exp() * (lt - ls)).sum(-1)
        picked = [x.gather(-1, labels.unsqueeze(-1)).squeeze(-1) for x in (ls, lt)]
        entropies = [-(x.exp() * x).sum(-1) for x in (ls, lt)]
        return divergence.mean(), divergence, *picked, *entropies

    return run


def measure(benchmark, capsys, name: str, shape: str, run: Run, leaves: list[Tensor], arguments: list[Tensor]) -> None:
    step(run, leaves, arguments)  # warm up, so that neither pass meets first-use allocations
    peak = peak_bytes(lambda: step(run, leaves, arguments))
    benchmark.extra_info.update(peak_bytes=peak, shape=shape, threads=torch.get_num_threads())
    benchmark.pedantic(step, args=(run, leaves, arguments), rounds=5, iterations=1, warmup_rounds=1)
    with capsys.disabled():
        seconds = benchmark.stats.stats.median
        print(f"\n{shape:>30}  {name:>10}  {seconds * 1e3:9.1f} ms  {peak / 2**20:9.1f} MB beyond inputs")


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize(("n", "vocab"), LOGITS_SHAPES)
def test_distillation_loss(benchmark, capsys, n: int, vocab: int, name: str) -> None:
    benchmark.group = f"distillation_loss N={n} V={vocab}"
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(n, vocab, generator=generator) * 3
    teacher = student + 0.5 * torch.randn(n, vocab, generator=generator)
    labels = torch.randint(0, vocab, (n,), generator=generator)
    student.requires_grad_()
    arguments = [student, teacher, labels]
    check(LOGITS[name], [student], arguments, double_truth(linear=False), rows=8)
    measure(benchmark, capsys, name, f"logits N={n} V={vocab}", LOGITS[name], [student], arguments)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize(("n", "vocab", "hidden"), LINEAR_SHAPES)
def test_linear_distillation_loss(benchmark, capsys, n: int, vocab: int, hidden: int, name: str) -> None:
    benchmark.group = f"linear_distillation_loss N={n} V={vocab} H={hidden}"
    generator = torch.Generator().manual_seed(0)
    h_s = torch.randn(n, hidden, generator=generator)
    h_t = h_s + 0.2 * torch.randn(n, hidden, generator=generator)
    weight = torch.randn(vocab, hidden, generator=generator) * (3 / hidden**0.5)
    teacher_weight = weight + 0.02 * torch.randn(vocab, hidden, generator=generator)
    labels = torch.randint(0, vocab, (n,), generator=generator)
    leaves = [h_s.requires_grad_(), weight.requires_grad_()]
    arguments = [h_s, weight, h_t, teacher_weight, labels]
    check(LINEAR[name], leaves, arguments, double_truth(linear=True), rows=8)
    measure(benchmark, capsys, name, f"linear N={n} V={vocab} H={hidden}", LINEAR[name], leaves, arguments)
