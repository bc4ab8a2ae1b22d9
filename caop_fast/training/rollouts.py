"""Sample the student's own answers with ``model.generate``: K completions for every prompt."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from transformers import GenerationConfig

from caop_fast.training.autocast import fresh_weight_casts
from caop_fast.training.padding import pad_left

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rollout:
    """One sampled completion.

    Attributes:
        prompt_index: which of the prompts it answers.
        ids: the sampled token ids, the end token included where the model wrote one.
        ended: False when the completion was cut by the length limit.
        text: `ids` decoded without special tokens.
    """

    prompt_index: int
    ids: list[int]
    ended: bool
    text: str


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that end a completion: the generation config's, or else the tokenizer's end token."""
    eos = model.generation_config.eos_token_id
    eos = tokenizer.eos_token_id if eos is None else eos
    if eos is None:
        raise ValueError(
            "the model's generation config and the tokenizer name no eos_token_id; completions would not end"
        )
    return frozenset(eos if isinstance(eos, (list, tuple)) else [eos])


@contextlib.contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed the random state inside the block and restore the caller's on exit; None changes nothing."""
    if seed is None:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def sample_rollouts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    per_prompt: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    greedy: bool = False,
    batch_size: int = 1024,
    seed: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[Rollout]:
    """Sample `per_prompt` completions for every prompt, in prompt order (K of the first, K of the second, ...).

    The full softmax at `temperature` is sampled: no top-k, no top-p, whatever the model's generation config says,
    because a truncated distribution is not the one the loss trains.

    Args:
        model: a causal LM; its training mode is restored afterwards.
        prompts: token ids of each prompt.
        per_prompt: K. Greedy decoding takes 1.
        max_new_tokens: length limit; a completion that reaches it without an end token has ``ended=False``.
        batch_size: completions decoded at a time.
        seed: draw from this seed without touching the global random state.
        on_progress: called with the number of prompts finished by each batch.
    """
    if per_prompt < 1 or (greedy and per_prompt != 1):
        raise ValueError(
            f"per_prompt must be at least 1, and 1 when greedy; got per_prompt={per_prompt}, greedy={greedy}"
        )
    if not greedy and not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature!r} (for argmax decoding pass greedy=True)")
    stops = stop_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops)
    sampling = {} if greedy else {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        do_sample=not greedy,
        num_return_sequences=per_prompt,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stops),
        pad_token_id=pad,
        use_cache=True,
        **sampling,
    )
    was_training, own_config, device = model.training, model.generation_config, model.device
    model.eval()
    # generate() fills whatever `config` leaves open (penalties, min_p, stop strings, ...) from the model's own config.
    model.generation_config = config
    generate = cast(
        "Callable[..., Tensor]", model.generate
    )  # of GenerationMixin, which PreTrainedModel is typed without
    rollouts: list[Rollout] = []
    step = max(1, batch_size // per_prompt)
    # Prompts of equal length in one batch need no padding; the rollouts are sorted back into prompt order below.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    try:
        with seeded(seed, device), fresh_weight_casts():
            for start in range(0, len(order), step):
                chosen = order[start : start + step]
                ids, mask = pad_left([prompts[i] for i in chosen], pad, device)
                out = generate(ids, attention_mask=mask, generation_config=config)
                completions = out[:, ids.shape[1] :].tolist()
                cut = [_until_stop(c, stops) for c in completions]
                texts = tokenizer.batch_decode([c for c, _ in cut], skip_special_tokens=True)
                rollouts += [
                    Rollout(chosen[j // per_prompt], c, ended, text)
                    for j, ((c, ended), text) in enumerate(zip(cut, texts, strict=True))
                ]
                if on_progress:
                    on_progress(len(chosen))
    finally:
        model.train(was_training)
        model.generation_config = own_config
    rollouts.sort(key=lambda r: r.prompt_index)  # stable: the K rollouts of a prompt keep their order
    return rollouts


def _until_stop(ids: list[int], stops: frozenset[int]) -> tuple[list[int], bool]:
    """The ids up to the first end token, and whether there is one."""
    for position, token in enumerate(ids):
        if token in stops:
            return ids[: position + 1], True
    return ids, False
