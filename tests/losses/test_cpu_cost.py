"""What distillation_loss costs on a CPU, beside the straightforward PyTorch code (benchmarks/ prints the figures)."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from benchmarks.measure import peak_bytes
from benchmarks.peers import plain
from caop_fast import distillation_loss

N, VOCAB = 256, 151936


@pytest.fixture(scope="module")
def steps():
    """{name: forward + backward with all statistics} on the same float32 logits."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(N, VOCAB, generator=generator) * 3
    teacher = student + 0.5 * torch.randn(N, VOCAB, generator=generator)
    labels = torch.randint(0, VOCAB, (N,), generator=generator)
    student.requires_grad_()

    def step(run):
        student.grad = None
        run(student, teacher, labels)[0].backward()

    return {"plain": lambda: step(plain.distillation), "ours": lambda: step(distillation_loss)}


@pytest.mark.slow
def test_peak_memory_is_below_a_quarter(steps):
    for run in steps.values():
        run()  # neither pays for first-use allocations
    peaks = {name: peak_bytes(run) for name, run in steps.items()}
    assert peaks["plain"] > 4 * N * VOCAB * 4, "the yardstick must hold several tensors of N*V"
    assert peaks["ours"] < peaks["plain"] / 4, peaks


@pytest.mark.slow
def test_it_takes_no_longer(steps):
    """Median of five, turn by turn, on one thread: a busy machine is then as busy for both."""
    seconds = {name: [] for name in steps}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(5):
            for name, run in steps.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    assert medians["ours"] <= 1.3 * medians["plain"], medians  # they are even where memory is mapped in huge pages
