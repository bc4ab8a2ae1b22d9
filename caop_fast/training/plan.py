"""What each method trains on: token ids, their weights, and the positions of the confidence value."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from caop_fast.caop import ConfidenceStyle, locate_confidence, splice_confidence
from caop_fast.training.rollouts import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLICED = ("caop", "direct")


@dataclass(frozen=True)
class TokenPlan:
    """One rollout as it is trained on; all lists have one entry per token.

    Attributes:
        ids: the completion, with the success rate spliced in where the method does so.
        value_mask: True on the tokens that spell the confidence value.
        weights: of the divergence at each token; 0 is left out.
        target: the success rate to train the value on through `confidence_loss`; None in methods that do not.
    """

    ids: list[int]
    value_mask: list[bool]
    weights: list[float]
    target: float | None


def plan_tokens(
    rollouts: Sequence[Rollout],
    success_rates: Sequence[float],
    tokenizer: PreTrainedTokenizerBase,
    *,
    arm: str,
    style: ConfidenceStyle,
    stop_ids: Collection[int],
) -> list[TokenPlan]:
    """One plan per rollout, given the success rate of its group and the ids that end a completion.

    A completion cut by the length limit has weight 0 at every token, in every method: its statement is unknown.
    """
    plans = []
    for rollout, rate in zip(rollouts, success_rates, strict=True):
        if not rollout.ended:
            zeros = [0.0] * len(rollout.ids)
            plans.append(TokenPlan(rollout.ids, [False] * len(rollout.ids), zeros, None))
            continue
        if arm in SPLICED:
            spliced = splice_confidence(rollout.ids, rate, tokenizer, style=style, stop_ids=stop_ids)
            ids, value_mask = spliced.ids, spliced.value_mask
        else:
            ids = rollout.ids
            value_mask = [False] * len(ids)
            for position in locate_confidence(ids, tokenizer, stop_ids=stop_ids):
                value_mask[position] = True
        without_value = arm in ("direct", "masked")
        weights = [0.0 if without_value and is_value else 1.0 for is_value in value_mask]
        plans.append(TokenPlan(list(ids), list(value_mask), weights, rate if arm == "direct" else None))
    return plans
