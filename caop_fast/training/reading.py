"""Expected value and entropy of a model's distribution over confidence values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from caop_fast.caop import ConfidenceStyle, candidate_ids
from caop_fast.training.model import LanguageHead

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_AT_ONCE = 256  # float32 logits over a vocabulary of 150k take 155 MB for this many rows; a few copies are made


@dataclass(frozen=True)
class ValueGrid:
    """The confidence grid as tensors.

    Attributes:
        values: float64 [C], ascending.
        tokens: int64 [C], the token of each value; None where the tokenizer spells values with several tokens.
    """

    values: Tensor
    tokens: Tensor | None

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        style: ConfidenceStyle,
        device: torch.device | str,
        *,
        single_tokens: bool = False,
    ) -> ValueGrid:
        """The grid of `style`; with `single_tokens` a tokenizer that spells a value in several is a ValueError."""
        try:
            tokens = torch.tensor(candidate_ids(tokenizer, style), device=device)
        except ValueError:
            if single_tokens:
                raise
            tokens = None
        return cls(torch.tensor(style.values, dtype=torch.float64, device=device), tokens)


@torch.no_grad()
def value_reading(hidden: Tensor, head: LanguageHead, grid: ValueGrid, temperature: float) -> tuple[Tensor, Tensor]:
    """``(expected, entropy)``, both float64 [M], at the hidden states [M, H] that predict the confidence value.

    `expected` is the mean of the grid's values under the softmax, at `temperature`, renormalised over their tokens (NaN
    where values take several tokens); `entropy`, in nats, is that of the whole softmax over the value's first token.
    """
    expected, entropy = [], []
    for rows in hidden.split(ROWS_AT_ONCE):
        logp = torch.log_softmax(head.logits(rows) / temperature, dim=-1).double()
        if grid.tokens is None:
            expected.append(torch.full_like(logp[:, 0], torch.nan))
        else:
            expected.append(torch.softmax(logp[:, grid.tokens], dim=-1) @ grid.values)
        entropy.append(token_entropy(logp))
    if not expected:
        empty = hidden.new_zeros(0, dtype=torch.float64)
        return empty, empty
    return torch.cat(expected), torch.cat(entropy)


def token_entropy(logp: Tensor) -> Tensor:
    """Entropy in nats over the last dimension of log-probabilities; a token of probability 0 contributes 0."""
    return -torch.where(logp > -torch.inf, logp.exp() * logp, 0.0).sum(-1)
