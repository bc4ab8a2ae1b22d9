"""Hidden states that predict each completion token; a prompt is computed once for all of its rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from caop_fast.training.model import backbone
from caop_fast.training.padding import pad_left, pad_right

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Completions:
    """R completions of B prompts, padded to one length L.

    Attributes:
        ids: int64 [R, L], padded on the right.
        mask: int64 [R, L], 1 on real tokens.
        prompt_index: int64 [R], which prompt each one answers.
    """

    ids: Tensor
    mask: Tensor
    prompt_index: Tensor

    @classmethod
    def pack(
        cls, completions: Sequence[Sequence[int]], prompt_index: Sequence[int], pad_id: int, device: torch.device | str
    ) -> Completions:
        """From token lists; `prompt_index` has one entry per completion."""
        if len(completions) != len(prompt_index):
            raise ValueError(
                f"prompt_index must have one entry per completion, got {len(prompt_index)} for {len(completions)}"
            )
        ids, mask = pad_right(completions, pad_id, device)
        return cls(ids, mask, torch.tensor(list(prompt_index), dtype=torch.int64, device=device))


def completion_hidden(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    completions: Completions,
    *,
    pad_id: int,
    share_prompt: bool = True,
) -> Tensor:
    """Hidden states [R, L, H]: row r, position j predicts ``completions.ids[r, j]``.

    With `share_prompt` each prompt passes through the model once and its keys and values serve all its completions,
    gradients included; it needs a model with a key-value cache (and gradient checkpointing off, which disables the
    cache). Without it prompt and completion are concatenated for every rollout. Both give the same numbers.
    """
    device = completions.ids.device
    prompt_ids, prompt_mask = pad_left(prompts, pad_id, device)
    index = completions.prompt_index
    body = backbone(model)
    fed = completions.ids[:, :-1]  # the last token predicts nothing that is scored
    mask = torch.cat([prompt_mask[index], completions.mask[:, :-1]], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    n_prompt = prompt_ids.shape[1]
    if not share_prompt:
        ids = torch.cat([prompt_ids[index], fed], dim=1)
        out = body(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        return out.last_hidden_state[:, n_prompt - 1 :]
    prompt_positions = (prompt_mask.cumsum(1) - 1).clamp(min=0)
    out = body(input_ids=prompt_ids, attention_mask=prompt_mask, position_ids=prompt_positions, use_cache=True)
    last = out.last_hidden_state[:, -1:][index]
    if fed.shape[1] == 0:
        return last
    cache: Any = getattr(out, "past_key_values", None)  # a Cache of transformers, or what a recurrent model has
    try:
        cache.batch_select_indices(index)
    except AttributeError:  # no cache at all, or one with recurrent layers
        raise ValueError(
            f"{type(model).__name__} returned no plain key-value cache (gradient checkpointing turns it off, recurrent "
            "layers have another); pass share_prompt=False"
        ) from None
    out = body(
        input_ids=fed, attention_mask=mask, position_ids=positions[:, n_prompt:], past_key_values=cache, use_cache=True
    )
    return torch.cat([last, out.last_hidden_state], dim=1)
