"""The head taken off a model gives the model's own logits, or `check_logits` refuses the model."""

from __future__ import annotations

import math

import pytest
import torch
import transformers as t
from torch import nn

from caop_fast.training import TrainConfig, evaluate, student_prompts, train
from caop_fast.training.model import backbone, check_logits, language_head

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "pad_token_id": 0, "bos_token_id": 1}
ATTENTION = {**SIZES, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
IDS = [1, 5, 9, 30, 7, 2, 11]


def llama():
    return t.LlamaForCausalLM(t.LlamaConfig(**ATTENTION))


def qwen3():
    return t.Qwen3ForCausalLM(t.Qwen3Config(**ATTENTION, head_dim=8))


def phi_with_bias():
    return t.PhiForCausalLM(t.PhiConfig(**ATTENTION))


def gemma2():
    return t.Gemma2ForCausalLM(t.Gemma2Config(**ATTENTION, head_dim=8, final_logit_softcapping=3.0))


def cohere():
    return t.CohereForCausalLM(t.CohereConfig(**ATTENTION, logit_scale=0.25))


def granite():
    return t.GraniteForCausalLM(t.GraniteConfig(**ATTENTION, logits_scaling=4.0))


def hyperclovax():  # multiplies by what Granite divides by
    return t.HyperCLOVAXForCausalLM(t.HyperCLOVAXConfig(**ATTENTION, logits_scaling=0.25))


def falcon_h1():
    mamba = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 8}
    return t.FalconH1ForCausalLM(t.FalconH1Config(**ATTENTION, **mamba, head_dim=8, lm_head_multiplier=0.3))


def recurrent_gemma():
    return t.RecurrentGemmaForCausalLM(
        t.RecurrentGemmaConfig(**ATTENTION, lru_width=16, head_dim=8, logits_soft_cap=3.0)
    )


def xlstm():
    sizes = {**SIZES, "hidden_size": 128, "num_heads": 2}  # the class rounds its inner sizes up to 64
    return t.xLSTMForCausalLM(t.xLSTMConfig(**sizes, output_logit_soft_cap=3.0))


def mamba():  # hidden states in float32 below a head in bfloat16
    return t.MambaForCausalLM(t.MambaConfig(**SIZES, state_size=4))


def llama4():  # names itself as its base model and as its decoder
    config = t.Llama4TextConfig(**ATTENTION, head_dim=8, intermediate_size_mlp=24, num_local_experts=2)
    return t.Llama4ForCausalLM(config)


SUPPORTED = (
    *(
        llama,
        qwen3,
        phi_with_bias,
        gemma2,
        cohere,
        granite,
        hyperclovax,
        falcon_h1,
        recurrent_gemma,
        xlstm,
        mamba,
        llama4,
    ),
)


def modernbert_decoder():  # a dense layer, an activation and a norm before the output layer
    return t.ModernBertDecoderForCausalLM(t.ModernBertDecoderConfig(**ATTENTION, global_attn_every_n_layers=1))


def mpt_with_an_ignored_scale():  # the config entry is there, the model never reads it
    return t.MptForCausalLM(t.MptConfig(vocab_size=40, d_model=16, n_heads=2, n_layers=1, logit_scale=0.3))


def softcap_under_an_unknown_name():
    class Capped(t.LlamaForCausalLM):
        def forward(self, *arguments, **options):
            out = super().forward(*arguments, **options)
            out.logits = 6.0 * torch.tanh(out.logits / 6.0)
            return out

    return Capped(t.LlamaConfig(**ATTENTION))


def masked_vocabulary():
    class Masked(t.LlamaForCausalLM):
        def forward(self, *arguments, **options):
            out = super().forward(*arguments, **options)
            out.logits[..., 35:] = torch.finfo(out.logits.dtype).min  # as Chameleon does for image tokens
            return out

    return Masked(t.LlamaConfig(**ATTENTION))


def cut_vocabulary():
    class Cut(t.LlamaForCausalLM):
        def forward(self, *arguments, **options):
            out = super().forward(*arguments, **options)
            out.logits = out.logits[..., :35]
            return out

    return Cut(t.LlamaConfig(**ATTENTION))


WRONG = (
    modernbert_decoder,
    mpt_with_an_ignored_scale,
    softcap_under_an_unknown_name,
    masked_vocabulary,
    cut_vocabulary,
)


class LoraLinear(nn.Module):
    """What PEFT puts in the place of a Linear: `weight` and `bias` are still the base layer's."""

    def __init__(self, base: nn.Linear, *, trained: bool) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base.out_features, bias=False)
        if not trained:
            nn.init.zeros_(self.lora_B.weight)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def spread(model, factor=1.0):
    """Weights such that logits are a few units large, as a trained model's are."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim >= 2:
                p.copy_(torch.randn(p.shape, generator=generator) * 3 * factor / math.sqrt(p.shape[-1]))
    return model


@pytest.fixture(autouse=True)
def seeded_weights():
    torch.manual_seed(0)


@pytest.mark.parametrize("build", SUPPORTED)
def test_head_and_backbone_give_back_the_models_logits(build):
    model = spread(build()).eval()
    if (bias := getattr(model.get_output_embeddings(), "bias", None)) is not None:
        nn.init.normal_(bias)
    ids = torch.tensor([[1, 5, 9, 30], [1, 7, 2, 2]])
    with torch.no_grad():
        hidden = backbone(model)(ids, use_cache=False).last_hidden_state
        logits = model(ids, use_cache=False).logits
    torch.testing.assert_close(language_head(model).logits(hidden), logits, atol=1e-5, rtol=1e-5)


CASES = [(b, p) for b in (*SUPPORTED, *WRONG) for p in ("float32", "bfloat16", "float16", "autocast")]
CASES.remove((mamba, "float16"))  # its scan overflows float16 with weights this large


@pytest.mark.parametrize(("build", "precision"), CASES)
def test_the_check_tells_rounding_from_another_head(build, precision):
    model = spread(build())
    if precision in ("bfloat16", "float16"):
        model.to(getattr(torch, precision))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
        if build in SUPPORTED:
            check_logits(model, IDS)
        else:
            why = "(losses of caop_fast|one logit for each row)"
            with pytest.raises(TypeError, match=f"{type(model).__name__}.*{why}"):
                check_logits(model, IDS)


@pytest.mark.parametrize("training", [True, False])
def test_the_check_is_free_of_dropout_and_leaves_the_mode_as_it_was(training):
    model = spread(t.LlamaForCausalLM(t.LlamaConfig(**ATTENTION, attention_dropout=0.5))).train(training)
    check_logits(model, IDS)
    assert model.training is training
    assert all(p.grad is None for p in model.parameters())


def test_an_adapter_on_the_output_layer_is_refused():
    model = spread(llama())
    model.lm_head = LoraLinear(model.lm_head, trained=False)  # as PEFT starts: B is 0, and no logit differs
    with pytest.raises(TypeError, match=r"LlamaForCausalLM is a LoraLinear that trains lora_A\.weight, lora_B\.weight"):
        check_logits(model, IDS)
    model.lm_head = LoraLinear(spread(llama()).lm_head, trained=True).requires_grad_(False)
    with pytest.raises(TypeError, match="adapter on the output layer"):
        check_logits(model, IDS)


def test_weights_that_are_not_finite_are_named_as_such():
    model = spread(llama())
    nn.init.constant_(model.model.norm.weight, math.nan)
    with pytest.raises(FloatingPointError, match="LlamaForCausalLM gives logits that are not finite"):
        check_logits(model, IDS)


def test_a_model_without_head_is_refused():
    with pytest.raises(TypeError, match="causal LM with an output embedding, got LlamaModel"):
        language_head(t.LlamaModel(t.LlamaConfig(**ATTENTION)))


def test_a_wrapper_whose_base_model_gives_logits_is_told_what_to_pass():
    class Wrapped(nn.Module):  # as PeftModel: its base_model is the whole causal LM
        device = torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.base_model = spread(llama())

        def forward(self, **inputs):
            return self.base_model(**inputs)

    with pytest.raises(TypeError, match=r"Wrapped must return .* get_base_model"):
        check_logits(Wrapped(), IDS)


def capped(make_model):
    """The fixture's model with a softcap its config says nothing of."""
    model = make_model()
    forward = model.forward

    def with_cap(*arguments, **options):
        out = forward(*arguments, **options)
        out.logits = 2.0 * torch.tanh(out.logits / 2.0)
        return out

    def never(*arguments, **options):
        raise AssertionError("sampled")

    model.forward, model.generate = with_cap, never
    return model


def test_training_and_evaluation_refuse_before_they_sample(make_model, tokenizer, rows, method):
    prompts = student_prompts(rows, tokenizer, 16)
    with pytest.raises(TypeError, match="logits of Qwen3ForCausalLM are not those"):
        train(capped(make_model), tokenizer, rows, method, TrainConfig(steps=1, prompts_per_step=2))
    with pytest.raises(TypeError, match="logits of Qwen3ForCausalLM are not those"):
        evaluate(
            capped(make_model),
            *(tokenizer, rows, prompts),
            verifier=method.verifier,
            style=method.style,
            max_new_tokens=4,
        )
