"""Distillation as usually written in PyTorch: two log_softmax, kl_div and two entropies on whole [N, V] tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def distillation(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Mean forward KL, and per token the KL, both log-probabilities of the label and both entropies."""
    student = F.log_softmax(student_logits.float(), dim=-1)
    teacher = F.log_softmax(teacher_logits.float(), dim=-1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    column = labels.unsqueeze(-1)
    student_logprob = student.gather(-1, column).squeeze(-1)
    teacher_logprob = teacher.gather(-1, column).squeeze(-1)
    with torch.no_grad():
        student_entropy = -(student.exp() * student).sum(-1)
        teacher_entropy = -(teacher.exp() * teacher).sum(-1)
    return divergence.mean(), divergence, student_logprob, teacher_logprob, student_entropy, teacher_entropy


def linear_distillation(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor
) -> tuple[Tensor, ...]:
    """The same from hidden states and heads."""
    with torch.no_grad():
        teacher_logits = teacher_hidden @ teacher_weight.t()
    return distillation(student_hidden @ student_weight.t(), teacher_logits, labels)
