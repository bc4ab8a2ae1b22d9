from __future__ import annotations

import pytest
import torch

from caop_fast.training.model import backbone, language_head
from caop_fast.training.scoring import Completions, completion_hidden


@pytest.fixture
def case(ids):
    prompts = [ids("<bos> a b <answer>"), ids("<bos> c <answer>"), ids("<bos> d d d <answer>")]
    texts = ["X <eos>", "Y Y Z <eos>", "<eos>", "Z X Confidence: 0.50 <eos>", "X"]
    return prompts, [ids(t) for t in texts], [0, 2, 2, 1, 0]


def one_by_one(model, prompts, completions, owners):
    """The oracle: each sequence alone, no padding, no cache."""
    for completion, owner in zip(completions, owners, strict=True):
        sequence = torch.tensor([prompts[owner] + completion])
        hidden = backbone(model)(sequence, use_cache=False).last_hidden_state[0]
        start = len(prompts[owner]) - 1
        yield hidden[start : start + len(completion)]


@pytest.mark.parametrize("share_prompt", [True, False])
def test_hidden_states_equal_those_of_each_sequence_alone(model, case, share_prompt):
    model.double()
    prompts, completions, owners = case
    packed = Completions.pack(completions, owners, 0, "cpu")
    hidden = completion_hidden(model, prompts, packed, pad_id=0, share_prompt=share_prompt)
    for row, (expected, completion) in enumerate(
        zip(one_by_one(model, prompts, completions, owners), completions, strict=True)
    ):
        torch.testing.assert_close(hidden[row, : len(completion)], expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("share_prompt", [True, False])
def test_gradients_flow_through_the_shared_prompt(model, case, share_prompt):
    model.double()
    prompts, completions, owners = case
    packed = Completions.pack(completions, owners, 0, "cpu")
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(*packed.ids.shape, 32, dtype=torch.float64, generator=generator) * packed.mask[..., None]

    def gradients(hidden_rows):
        model.zero_grad()
        sum((h * direction[r, : len(h)]).sum() for r, h in enumerate(hidden_rows)).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients(one_by_one(model, prompts, completions, owners))
    hidden = completion_hidden(model, prompts, packed, pad_id=0, share_prompt=share_prompt)
    got = gradients([hidden[r, : len(c)] for r, c in enumerate(completions)])
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        # Qwen3 norms in float32 inside, whatever the model's dtype; a lost path through the prompt is off by far more.
        assert (a - b).norm() < 1e-4 * b.norm()


def test_completions_of_one_token_need_no_second_pass(model, ids):
    prompts = [ids("<bos> a <answer>")]
    packed = Completions.pack([ids("X"), ids("<eos>")], [0, 0], 0, "cpu")
    hidden = completion_hidden(model, prompts, packed, pad_id=0)
    assert hidden.shape == (2, 1, 32)
    torch.testing.assert_close(hidden[0], hidden[1])


def test_a_model_without_cache_is_told_what_to_do(model, ids):
    packed = Completions.pack([ids("X Y")], [0], 0, "cpu")
    body = backbone(model)
    original = body.forward
    body.forward = lambda *a, **k: original(*a, **{**k, "use_cache": False})
    with pytest.raises(ValueError, match="share_prompt=False"):
        completion_hidden(model, [ids("<bos> a <answer>")], packed, pad_id=0)


def test_a_recurrent_model_is_told_what_to_do_and_then_works():
    import transformers as t

    torch.manual_seed(0)
    config = t.MambaConfig(
        vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=1, eos_token_id=2, pad_token_id=0
    )
    model = t.MambaForCausalLM(config).eval()
    packed = Completions.pack([[5, 6, 2]], [0], 0, "cpu")
    with pytest.raises(ValueError, match="share_prompt=False"):
        completion_hidden(model, [[1, 4]], packed, pad_id=0)
    hidden = completion_hidden(model, [[1, 4]], packed, pad_id=0, share_prompt=False)
    alone = backbone(model)(torch.tensor([[1, 4, 5, 6]])).last_hidden_state[0, 1:]
    torch.testing.assert_close(hidden[0], alone)


def test_prompt_index_must_match(ids):
    with pytest.raises(ValueError, match="prompt_index must have one entry a completion, got 2 for 1"):
        Completions.pack([ids("X")], [0, 1], 0, "cpu")


def _tiny(kind):
    import transformers as t

    size = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    if kind == "gemma2":
        config = t.Gemma2Config(**size, **heads, head_dim=8, final_logit_softcapping=3.0)
        return t.Gemma2ForCausalLM(config)
    if kind == "cohere":
        return t.CohereForCausalLM(t.CohereConfig(**size, **heads, logit_scale=0.25))
    if kind == "granite":
        return t.GraniteForCausalLM(t.GraniteConfig(**size, **heads, logits_scaling=4.0))
    return t.LlamaForCausalLM(t.LlamaConfig(**size, **heads))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere", "granite"])
def test_head_and_backbone_give_back_the_models_logits(kind):
    model = _tiny(kind).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # so that a softcap of 3 bends the logits
        ids = torch.tensor([[1, 5, 9, 30], [1, 7, 2, 2]])
        hidden = backbone(model)(ids).last_hidden_state
        torch.testing.assert_close(language_head(model).logits(hidden), model(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_model_without_head_is_refused():
    import transformers as t

    config = t.LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(TypeError, match="causal LM with an output embedding, got LlamaModel"):
        language_head(t.LlamaModel(config))
