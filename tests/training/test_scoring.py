from __future__ import annotations

import pytest
import torch

from caop_fast.training.model import backbone
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
    with pytest.raises(ValueError, match="prompt_index must have one entry per completion, got 2 for 1"):
        Completions.pack([ids("X")], [0, 1], 0, "cpu")
