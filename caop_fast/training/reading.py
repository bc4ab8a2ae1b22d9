"""What a model's distribution at the confidence value says: its expected value and its entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from .head import LanguageHead

ROWS_AT_ONCE = 64  # a vocabulary of 150k takes 77 MB in float64 at this many rows


@torch.no_grad()
def value_reading(
    hidden: Tensor, head: LanguageHead, candidates: Tensor, values: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """``(expected, entropy)``, both float64 [M], at the hidden states [M, H] that predict the confidence value.

    Args:
        candidates: int64 [C], the token of each grid value.
        values: float [C], the grid.
        temperature: the logits are divided by it.

    `expected` is the mean of `values` under the softmax renormalised over the candidates; `entropy`, in nats, is that
    of the whole softmax.
    """
    expected, entropy = [], []
    for rows in hidden.split(ROWS_AT_ONCE):
        logp = torch.log_softmax(head.logits(rows).double() / temperature, dim=-1)
        expected.append(torch.softmax(logp[:, candidates], dim=-1) @ values.double())
        entropy.append(token_entropy(logp))
    if not expected:
        empty = hidden.new_zeros(0, dtype=torch.float64)
        return empty, empty
    return torch.cat(expected), torch.cat(entropy)


def token_entropy(logp: Tensor) -> Tensor:
    """Entropy in nats over the last dimension of log-probabilities; an impossible token adds 0."""
    return -torch.where(logp > -torch.inf, logp.exp() * logp, 0.0).sum(-1)
