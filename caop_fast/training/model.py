"""Hidden states and output layer of a Hugging Face causal LM, which the linear losses take in place of logits.

How a model scales and caps its logits is known only from the names of entries in its config, which differ between
models; `check_logits` compares the logits so rebuilt with the model's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from caop_fast.training.autocast import fresh_weight_casts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Config entries that act on the logits, as transformers names them.
MULTIPLIERS = ("logit_scale", "lm_head_multiplier")  # Cohere; Falcon-H1
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma; RecurrentGemma; xLSTM
MULTIPLIES_BY_LOGITS_SCALING = ("hyperclovax",)  # model types; Granite and MiniCPM3 divide by the entry of that name

CHECKED_TOKENS = 16


class LanguageHead(NamedTuple):
    """``logits = softcap(scale * (hidden @ weight.T + bias))``; weight [V, H], bias [V] or None.

    With a `softcap` c, ``softcap(z) = c * tanh(z / c)``.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [..., V] of hidden states [..., H]: for a few positions."""
        hidden = hidden.to(self.weight.dtype)  # some models keep the residual stream in float32 (Mamba)
        z = nn.functional.linear(hidden, self.weight, self.bias).float() * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def language_head(model: PreTrainedModel) -> LanguageHead:
    """The output layer of `model`, with the scale and softcap of the logits that its config states.

    Raises:
        TypeError: `model` has no output layer, or one that trains more than weight and bias (as a LoRA adapter does).
    """
    layer = model.get_output_embeddings()
    weight = getattr(layer, "weight", None)
    if layer is None or weight is None:
        raise TypeError(f"model must be a causal LM with an output embedding, got {type(model).__name__}")
    bias = getattr(layer, "bias", None)
    ignored = [n for n, p in layer.named_parameters() if p.requires_grad and p is not weight and p is not bias]
    if ignored:
        raise TypeError(
            f"the output layer of {type(model).__name__} is a {type(layer).__name__} that trains "
            f"{', '.join(ignored)}, as a LoRA adapter does; the linear losses read its weight and bias alone, so they "
            "would neither apply nor train the rest. Leave the output layer out of the adapter (PEFT: "
            "exclude_modules=['lm_head']) or merge it first"
        )
    config = model.config.get_text_config()
    scale = 1.0
    for name in MULTIPLIERS:
        scale *= _entry(config, name) or 1.0
    if divisor := _entry(config, "logits_scaling"):
        multiplies = getattr(config, "model_type", None) in MULTIPLIES_BY_LOGITS_SCALING
        scale = scale * divisor if multiplies else scale / divisor
    softcap = next((cap for name in SOFTCAPS if (cap := _entry(config, name))), None)
    return LanguageHead(weight, bias, scale, softcap)


def _entry(config: Any, name: str) -> float | None:
    """A number in the config; None where the entry is missing or not a number."""
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) else None


def backbone(model: PreTrainedModel) -> nn.Module:
    """The transformer below the head; it returns ``last_hidden_state`` [B, T, H], final norm included."""
    # Some composite models are their own base_model, and some (Llama 4) their own decoder, too.
    body: Any = model.base_model
    if body is model:
        body = model.get_decoder()
    if body is model:
        body = getattr(model, "model", None)
    if isinstance(body, nn.Module):
        return body
    raise TypeError(f"model must be a causal LM with a transformer below its head, got {type(model).__name__}")


@torch.no_grad()
@fresh_weight_casts()
def check_logits(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Compare the logits of `language_head` with ``model(ids).logits`` on the first few of the token ids.

    The norm of the difference, relative to that of the logits, may be 1e-4, or one epsilon of the dtype they are
    computed in where that is more (float16, bfloat16). Models of transformers 5 whose head is a `LanguageHead` stay
    below 0.4 epsilon.

    Raises:
        TypeError: they differ by more than rounding, or `model` does not return hidden states and logits.
        FloatingPointError: the logits are not finite.
    """
    name = type(model).__name__
    tokens = torch.tensor([list(ids[:CHECKED_TOKENS])], device=model.device)
    was_training = model.training
    model.eval()
    try:
        hidden = getattr(backbone(model)(input_ids=tokens, use_cache=False), "last_hidden_state", None)
        logits = getattr(model(input_ids=tokens, use_cache=False), "logits", None)
    finally:
        model.train(was_training)
    if hidden is None or logits is None:
        raise TypeError(
            f"{name} must return logits and its base model last_hidden_state, as the causal LMs of transformers do "
            "(of a PEFT model pass get_base_model())"
        )
    head = language_head(model)
    rebuilt = head.logits(hidden)
    if not rebuilt.isfinite().all():
        raise FloatingPointError(f"{name} gives logits that are not finite: are there NaN or infinity in its weights?")
    if logits.shape != rebuilt.shape:
        raise TypeError(
            f"{name} gives logits of shape {tuple(logits.shape)}, its hidden states and output weight "
            f"{tuple(rebuilt.shape)}; the losses need one logit for each row of the output weight"
        )
    # The coarsest dtype involved: under autocast the matrix product may be rounded between a float32 input and output.
    product = nn.functional.linear(hidden[:, :1].to(head.weight.dtype), head.weight[:1])
    epsilon = max(torch.finfo(t.dtype).eps for t in (logits, hidden, product))
    tolerance = max(1e-4, epsilon)
    rebuilt = rebuilt.double()
    error = ((rebuilt - logits).norm() / rebuilt.norm().clamp(min=torch.finfo(torch.float64).tiny)).item()
    if not error <= tolerance:
        raise TypeError(
            f"the logits of {name} are not those that its hidden states and output weight give: with "
            f"scale={head.scale:g} and softcap={head.softcap} they differ by {error:.2%} (rounding explains "
            f"{tolerance:.2%}), so the loss would train another distribution than the model samples from. Known "
            "causes: an adapter on the output layer (merge it), a transform in front of it, a scale or softcap under a "
            "config name that caop_fast does not know. For such a model call the losses of caop_fast with your own "
            "hidden states, output weight, student_scale and student_softcap"
        )
