"""Answers to held-out prompts, sampled or greedy, and two readings of their confidence: as stated and expected."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from caop_fast.calibration import calibration_metrics, parse_confidence
from caop_fast.caop import ConfidenceStyle, Verifier, locate_confidence
from caop_fast.training.autocast import fresh_weight_casts
from caop_fast.training.model import LanguageHead, check_logits, language_head
from caop_fast.training.reading import ROWS_AT_ONCE, ValueGrid, token_entropy, value_reading
from caop_fast.training.rollouts import Rollout, sample_rollouts, stop_token_ids
from caop_fast.training.scoring import Completions, completion_hidden

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METRICS = ("accuracy", "mean_confidence", "overconfidence_gap", "ece", "brier", "spr", "auroc")


@dataclass(frozen=True)
class Evaluation:
    """Answers to n prompts, in prompt order; float64 arrays [n], NaN where the answer states no readable confidence.

    Attributes:
        text: the completions, without special tokens.
        correct: the verifier's verdict.
        confidence: the number stated.
        expected: mean of the grid values under the model's distribution at the value, renormalised over the grid.
        answer_entropy: mean entropy in nats of the model over the tokens before the value.
        confidence_entropy: entropy in nats at the value.
    """

    text: list[str]
    correct: np.ndarray
    confidence: np.ndarray
    expected: np.ndarray
    answer_entropy: np.ndarray
    confidence_entropy: np.ndarray

    def metrics(self, reading: str = "confidence") -> dict[str, Any]:
        """`calibration_metrics` of one reading: ``confidence`` (as stated) or ``expected``."""
        return calibration_metrics(self.correct, getattr(self, reading))

    def summary(self) -> dict[str, Any]:
        """The headline metrics of the stated confidence, both entropies, and under ``expected`` the mean's metrics."""

        def headline(reading: str) -> dict[str, Any]:
            metrics = self.metrics(reading)
            return {k: metrics[k] for k in (*METRICS, "accuracy_all", "ece_upper", "brier_upper", "n", "n_unparsed")}

        return {
            **headline("confidence"),
            "answer_entropy": _mean(self.answer_entropy),
            "confidence_entropy": _mean(self.confidence_entropy),
            "expected": headline("expected"),
        }


def _mean(x: np.ndarray) -> float | None:
    x = x[~np.isnan(x)]
    return float(x.mean()) if x.size else None


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[Sequence[int]],
    *,
    verifier: Verifier,
    style: ConfidenceStyle,
    max_new_tokens: int,
    temperature: float = 1.0,
    greedy: bool = False,
    batch_size: int = 1024,
    share_prompt: bool = True,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """One answer per prompt, sampled at `temperature` or greedy, with its verdict and its confidence.

    The distribution over confidence values is taken at `temperature` in both cases.

    Raises:
        TypeError: the logits of `model` are not those its hidden states and output weight give (see `check_logits`).
        FloatingPointError: its logits are not finite.
    """
    if prompts:
        check_logits(model, prompts[0])
    rollouts = sample_rollouts(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        greedy=greedy,
        batch_size=batch_size,
        seed=seed,
        on_progress=on_progress,
    )
    verdicts = [verifier(r.text, rows[r.prompt_index]) for r in rollouts]
    stated = [parse_confidence(r.text).value for r in rollouts]
    reading = read_confidence(
        model,
        tokenizer,
        prompts,
        rollouts,
        style=style,
        temperature=temperature,
        batch_size=batch_size,
        share_prompt=share_prompt,
    )
    return Evaluation(
        text=[r.text for r in rollouts],
        correct=np.array([v.correct for v in verdicts], dtype=np.float64),
        confidence=np.array([math.nan if c is None else c for c in stated], dtype=np.float64),
        expected=reading["expected"],
        answer_entropy=reading["answer_entropy"],
        confidence_entropy=reading["confidence_entropy"],
    )


@torch.no_grad()
@fresh_weight_casts()
def read_confidence(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    rollouts: Sequence[Rollout],
    *,
    style: ConfidenceStyle,
    temperature: float = 1.0,
    batch_size: int = 1024,
    share_prompt: bool = True,
) -> dict[str, np.ndarray]:
    """Teacher-forced readings, float64 [len(rollouts)]: ``expected``, ``answer_entropy``, ``confidence_entropy``."""
    head, device = language_head(model), model.device
    stops = stop_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    grid = ValueGrid.of(tokenizer, style, device)
    result = {k: np.full(len(rollouts), np.nan) for k in ("expected", "answer_entropy", "confidence_entropy")}
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(rollouts), batch_size):
            batch = rollouts[start : start + batch_size]
            used = sorted({r.prompt_index for r in batch})
            local = {p: i for i, p in enumerate(used)}
            completions = Completions.pack([r.ids for r in batch], [local[r.prompt_index] for r in batch], pad, device)
            hidden = completion_hidden(
                model, [prompts[p] for p in used], completions, pad_id=pad, share_prompt=share_prompt
            )
            spans = [locate_confidence(r.ids, tokenizer, stop_ids=stops) for r in batch]
            _read_answer_entropy(result, start, batch, spans, hidden, head, temperature)
            at_value = [(k, span[0]) for k, span in enumerate(spans) if span]
            if not at_value:
                continue
            rows, columns = (torch.tensor(x, device=device) for x in zip(*at_value, strict=True))
            expected, entropy = value_reading(hidden[rows, columns], head, grid, temperature)
            where = start + np.array([k for k, _ in at_value])
            result["expected"][where] = expected.cpu().numpy()
            result["confidence_entropy"][where] = entropy.cpu().numpy()
    finally:
        model.train(was_training)
    return result


def _read_answer_entropy(
    result: dict[str, np.ndarray],
    start: int,
    batch: Sequence[Rollout],
    spans: Sequence[Sequence[int]],
    hidden: Tensor,
    head: LanguageHead,
    temperature: float,
) -> None:
    """Mean entropy over each completion's tokens before its value (all of them where it states none)."""
    lengths = [span[0] if span else len(r.ids) for r, span in zip(batch, spans, strict=True)]
    flat = [(k, j) for k, n in enumerate(lengths) for j in range(n)]
    if not flat:
        return
    rows, columns = (torch.tensor(x, device=hidden.device) for x in zip(*flat, strict=True))
    per_token = [
        token_entropy(torch.log_softmax(head.logits(hidden[r, c]) / temperature, dim=-1))
        for r, c in zip(rows.split(ROWS_AT_ONCE), columns.split(ROWS_AT_ONCE), strict=True)
    ]
    sums = torch.zeros(len(batch), dtype=torch.float64, device=hidden.device)
    sums.index_add_(0, rows, torch.cat(per_token).double())
    counts = np.array(lengths, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        result["answer_entropy"][start : start + len(batch)] = sums.cpu().numpy() / np.where(counts > 0, counts, np.nan)
