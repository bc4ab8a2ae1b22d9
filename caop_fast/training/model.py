"""Take a Hugging Face causal LM apart at its head: hidden states on one side, the output matrix on the other.

The linear losses need both, and never the logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LanguageHead(NamedTuple):
    """``logits = softcap(scale * (hidden @ weight.T + bias))``; weight [V, H], bias [V] or None."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [..., V] of hidden states [..., H]: for the few positions whose whole row is wanted."""
        z = nn.functional.linear(hidden, self.weight, self.bias).float() * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def language_head(model: PreTrainedModel) -> LanguageHead:
    """The output head of `model`, with the logit scale and softcap its config states (Cohere, Granite, Gemma)."""
    layer = model.get_output_embeddings()
    if layer is None or getattr(layer, "weight", None) is None:
        raise TypeError(f"model must be a causal LM with an output embedding, got {type(model).__name__}")
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    divisor = getattr(config, "logits_scaling", None)
    scale = scale / float(divisor) if divisor else scale
    softcap = getattr(config, "final_logit_softcapping", None)
    return LanguageHead(layer.weight, getattr(layer, "bias", None), scale, softcap)


def backbone(model: PreTrainedModel) -> nn.Module:
    """The transformer below the head; it returns ``last_hidden_state`` [B, T, H], final norm included."""
    body = model.base_model
    return model.get_decoder() if body is model else body  # some composite models name themselves as their base
