"""The exact probability that a sampled answer is right, for tasks whose posterior is known: the ideal confidence.

For a prompt x it is sum_a pi(a | x) P(a is right | x): the student's own probability of writing each answer that can be
right at all, times the posterior probability that it is. Nothing is sampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch

from caop_fast.caop import ConfidenceStyle
from caop_fast.demo.task import Row
from caop_fast.demo.tokenizer import encode_texts
from caop_fast.training.model import language_head
from caop_fast.training.scoring import Completions, completion_hidden

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS_AT_ONCE = 512


@runtime_checkable
class KnowsPosterior(Protocol):
    """A task that can say how probable each answer is to be right."""

    style: ConfidenceStyle

    def posterior(self, row: Row) -> Mapping[str, float]:
        """``{answer text: probability of being right}``, summing to 1."""
        ...

    def success_probability(self, response: str, row: Row) -> float:
        """The probability that the verifier calls this response right."""
        ...


@torch.no_grad()
def success_probabilities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: KnowsPosterior,
    rows: Sequence[Row],
    prompts: Sequence[Sequence[int]],
) -> np.ndarray:
    """[n] float64: for each prompt the probability that an answer sampled from `model` at temperature 1 is right."""
    label = task.style.label.split()[0]  # the word after an answer; writing it ends the answer
    head = language_head(model)
    result = np.zeros(len(rows))
    for start in range(0, len(rows), PROMPTS_AT_ONCE):
        owners, texts, weights = [], [], []
        for i, row in enumerate(rows[start : start + PROMPTS_AT_ONCE]):
            for answer, probability in task.posterior(row).items():
                owners.append(i)
                texts.append(f"{answer} {label}")
                weights.append(probability)
        packed = Completions.pack(encode_texts(tokenizer, texts), owners, tokenizer.pad_token_id, model.device)
        hidden = completion_hidden(
            model, prompts[start : start + PROMPTS_AT_ONCE], packed, pad_id=tokenizer.pad_token_id
        )
        logp = torch.log_softmax(head.logits(hidden).double(), dim=-1).gather(-1, packed.ids[..., None])[..., 0]
        written = torch.exp((logp * packed.mask).sum(1)).cpu().numpy()
        np.add.at(result, start + np.array(owners), written * np.array(weights))
    return result
