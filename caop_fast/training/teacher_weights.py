"""The teacher's weights: a frozen copy of the student, or its exponential moving average, in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class EmaTeacher(nn.Module):
    """A float32 exponential moving average of `student`: ``teacher += rate * (student - teacher)`` at every `update`.

    The average is kept in float32: at rate 0.01 most of bfloat16's updates would round to nothing.

    Args:
        student: the model to copy. It is not changed.
        rate: in [0, 1), 1 - decay; 0 freezes the teacher.
    """

    def __init__(self, student: PreTrainedModel, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"rate must lie in [0, 1), got {rate!r}")
        self.rate = rate
        average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(1 - rate))
        self.average = average.float().requires_grad_(False).eval()
        self.average.n_averaged.fill_(1)  # AveragedModel's first update would copy the student outright

    @property
    def model(self) -> PreTrainedModel:
        """The teacher as a causal LM."""
        return cast("PreTrainedModel", self.average.module)

    @torch.no_grad()
    def update(self, student: PreTrainedModel) -> None:
        """Take one step towards `student`; call it after every optimizer step."""
        if self.rate > 0:
            self.average.update_parameters(student)
