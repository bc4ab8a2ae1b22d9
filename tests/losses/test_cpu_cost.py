"""What distillation_loss costs on a CPU: memory, beside plain PyTorch, and passes (benchmarks/ measures the time)."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.measure import peak
from benchmarks.peers import plain_loss
from caop_fast import distillation_loss
from caop_fast.losses.backends import row_blocks
from helpers.passes import passes

N, VOCAB = 64, 37984


def logits(n: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 logits of both models, and labels."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(n, vocab, generator=generator) * 3
    teacher = student + 0.5 * torch.randn(n, vocab, generator=generator)
    return student.requires_grad_(), teacher, torch.randint(0, vocab, (n,), generator=generator)


def test_peak_memory_is_below_a_quarter():
    """All statistics, forward and backward."""
    student, teacher, labels = logits(N, VOCAB)
    peaks = {}
    for run in (plain_loss, distillation_loss):
        run(student, teacher, labels)[0].backward()  # neither pays for first-use allocations
        student.grad = None
        peaks[run] = peak(lambda run=run: run(student, teacher, labels)[0].backward(), torch.device("cpu"))
        student.grad = None
    theirs, ours = peaks.values()
    assert theirs > 4 * N * VOCAB * 4, "the yardstick must hold several tensors of N*V"
    assert ours < theirs / 4, (ours, theirs)


def test_passes_over_the_logits(monkeypatch):
    """What its time is spent on: two exponentials a logit in each direction, and passes over blocks in the cache."""
    monkeypatch.setattr(row_blocks, "CPU_BLOCK_ELEMENTS", 1 << 14)
    n, vocab = 64, 4096
    student, teacher, labels = logits(n, vocab)
    found = passes(lambda: distillation_loss(student, teacher, labels)[0].backward())
    assert round(found.by_name["exp"] / (n * vocab), 2) == 4, found
    assert found.total < 27.1 * n * vocab, found
    assert found.largest <= 1 << 14
