"""The calibration losses: candidate answers to "how sure are you", each standing for a value in [0, 1], scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from caop_fast.losses import checks
from caop_fast.losses.backend import resolve_backend
from caop_fast.losses.distillation import reduce_rows
from caop_fast.losses.ops.confidence import confidence_rows
from caop_fast.losses.outputs import ConfidenceOutput

KINDS = ("cross_entropy", "brier", "expected_brier", "bernoulli_nll")

MAX_CANDIDATES = 4096


def confidence_loss(
    logits: Tensor,
    candidate_ids: Tensor | Sequence[int],
    candidate_values: Tensor | Sequence[float],
    target: Tensor,
    *,
    kind: str = "cross_entropy",
    outside_weight: float = 1.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
    validate: bool | None = None,
) -> ConfidenceOutput:
    """Score the distribution over C confidence tokens against a success rate.

    With p_c the full-softmax probability of candidate c, q = p_c / sum p_c and v the candidate values, a row's loss is

        kind(q, target) + outside_weight * -log(sum p_c)

        cross_entropy    -sum_c t_c log q_c, the target's mass t split linearly between the two neighbouring values
                         (all of it on the end value where the target lies beyond)
        brier            (E_q v - target)^2
        expected_brier   E_q (v - target)^2
        bernoulli_nll    -(target log e + (1 - target) log(1 - e)), e = E_q v clipped to [eps, 1 - eps]

    Without the outside term a model could escape the score by moving mass off the candidates. Every output is
    differentiable with respect to ``logits``, in any mix, once. Works under ``torch.compile(fullgraph=True)`` and
    ``torch.autocast`` (which changes nothing here). The memory beyond inputs and the gradient is a few small blocks of
    rows.

    A row whose logits hold NaN or +inf, or in which no candidate is possible (-inf), gives NaN, in that row only.

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64, at the position that predicts the confidence token.
        candidate_ids: [C] distinct integers in [0, V).
        candidate_values: [C] distinct values in [0, 1], in any order. Sequences are copied to the device at every call:
            on a GPU pass tensors.
        target: [...] success rates in [0, 1], not differentiated.
        kind: the score, above.
        outside_weight: finite, >= 0.
        weights: [...], finite, >= 0; None means 1. A row of weight 0 reports 0 and gets gradient 0, whatever it holds.
        reduction: "mean" = sum(w L)/sum(w) (0 when all weights are 0), "sum", or "none" (w L per row).
        temperature: divides the logits, > 0.
        softcap: ``c * tanh(z / c)`` on the logits before the temperature; None for none.
        vocab_size: the softmax runs over the first ids only; None for all.
        eps: clip of "bernoulli_nll", in (0, 0.5).
        backend: "torch", "triton", or "auto" (Triton on GPUs where it is installed).
        validate: check values of tensors, which makes the host wait for a GPU; None does so on the CPU only. Unchecked,
            a candidate id outside [0, V) gives NaN in every row, a target of NaN in its own.

    Returns:
        ConfidenceOutput in float32 (float64 when ``logits`` is), with the shape of ``target``.

    Raises:
        TypeError, ValueError: on bad arguments, naming the argument, what it got and what it takes.
    """
    checks.floating_tensor("logits", logits, min_ndim=2)
    lead = logits.shape[:-1]
    vocab = checks.vocabulary(vocab_size, logits=logits.shape[-1])
    dtype = checks.statistics_dtype((logits,))
    ids, candidate_values = confidence_candidates(candidate_ids, candidate_values, logits.device, dtype)
    device = checks.one_device(
        {
            "logits": logits,
            "candidate_ids": ids,
            "candidate_values": candidate_values,
            "target": target,
            "weights": weights,
        }
    )
    return _score(
        logits.reshape(-1, logits.shape[-1]),
        ids,
        candidate_values,
        target,
        lead,
        kind=kind,
        outside_weight=outside_weight,
        weights=weights,
        reduction=reduction,
        temperature=checks.positive("temperature", temperature),
        softcap=checks.positive("softcap", softcap, optional=True),
        vocab=vocab,
        eps=eps,
        backend=resolve_backend(backend, device),
        validate=checks.checks_values(validate, device),
    )


def confidence_loss_from_logprobs(
    candidate_logprobs: Tensor,
    candidate_values: Tensor | Sequence[float],
    target: Tensor,
    *,
    kind: str = "cross_entropy",
    outside_weight: float = 1.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
    eps: float = 1e-6,
    backend: str = "auto",
    validate: bool | None = None,
) -> ConfidenceOutput:
    """``confidence_loss`` for candidates of several tokens, each given by its log-probability.

    Real tokenizers spell 0.85 as several tokens: log p_c is then the sum of the tokens' log-probabilities, for instance
    from one packed forward over the trie of all candidates. Every output is differentiable with respect to
    ``candidate_logprobs``, in any mix, once.

    Args:
        candidate_logprobs: [..., C] float32, bfloat16, float16 or float64, in nats, not normalised over the candidates.
            -inf for an impossible candidate; a row of nothing else, or one that holds NaN, gives NaN in that row. Their
            probabilities may add up to a little more than 1 by rounding: the outside mass is then 0, with gradient 0.
        candidate_values: [C] distinct values in [0, 1], in any order.
        target: [...] success rates in [0, 1], not differentiated.
        kind, outside_weight, weights, reduction, eps, backend, validate: as in ``confidence_loss``. Checked values
            include that no log-probability is positive beyond rounding.

    Returns:
        ConfidenceOutput in float32 (float64 when ``candidate_logprobs`` is), with the shape of ``target``.

    Raises:
        TypeError, ValueError: on bad arguments, naming the argument, what it got and what it takes.
    """
    checks.floating_tensor("candidate_logprobs", candidate_logprobs, min_ndim=2)
    *lead, count = candidate_logprobs.shape
    dtype = checks.statistics_dtype((candidate_logprobs,))
    candidate_values = _values(candidate_values, candidate_logprobs.device, dtype, (count,))
    device = checks.one_device(
        {
            "candidate_logprobs": candidate_logprobs,
            "candidate_values": candidate_values,
            "target": target,
            "weights": weights,
        }
    )
    if count == 0:
        raise ValueError(f"candidate_logprobs must be [..., C] with C >= 1, got {tuple(candidate_logprobs.shape)}")
    return _score(
        candidate_logprobs.reshape(-1, count),
        None,
        candidate_values,
        target,
        torch.Size(lead),
        kind=kind,
        outside_weight=outside_weight,
        weights=weights,
        reduction=reduction,
        temperature=1.0,
        softcap=None,
        vocab=count,
        eps=eps,
        backend=resolve_backend(backend, device),
        validate=checks.checks_values(validate, device),
    )


def _score(
    source: Tensor,
    ids: Tensor | None,
    values: Tensor,
    target: Tensor,
    lead: torch.Size,
    *,
    kind: str,
    outside_weight: float,
    weights: Tensor | None,
    reduction: str,
    temperature: float,
    softcap: float | None,
    vocab: int,
    eps: float,
    backend: str,
    validate: bool,
) -> ConfidenceOutput:
    """What both entries share: checks, the operator, the reduction."""
    score = check_score(target, lead, values.dtype, kind, outside_weight, weights, reduction, eps)
    loss, expected, variance, outside, _ = confidence_rows(
        source, ids, values, score.target, score.weights, kind, score.outside_weight, score.eps, temperature, softcap,
        vocab, backend == "triton", validate,
    )  # fmt: skip
    return ConfidenceOutput(
        reduce_rows(loss, score.weights, reduction, lead), expected.view(lead), variance.view(lead), outside.view(lead)
    )


class Score(NamedTuple):
    """Checked arguments of a score: target and weights flattened, in the dtype of the statistics."""

    target: Tensor
    weights: Tensor | None
    outside_weight: float
    eps: float


def check_score(
    target: Tensor,
    lead: torch.Size,
    dtype: torch.dtype,
    kind: str,
    outside_weight: float,
    weights: Tensor | None,
    reduction: str,
    eps: float,
) -> Score:
    """The arguments that all confidence losses share."""
    checks.choice("kind", kind, KINDS)
    checks.choice("reduction", reduction, checks.REDUCTIONS)
    outside_weight, eps = check_outside_weight(outside_weight), check_eps(eps)
    checks.floating_tensor("target", target)
    flat_target = checks.shaped("target", target.detach(), lead).to(dtype)
    return Score(flat_target, checks.row_weights(weights, None, lead, dtype, values=False), outside_weight, eps)


def check_outside_weight(outside_weight: float) -> float:
    """A finite number >= 0."""
    outside_weight = checks.finite("outside_weight", outside_weight)
    if outside_weight < 0:
        raise ValueError(f"outside_weight must be >= 0, got {outside_weight}")
    return outside_weight


def check_eps(eps: float) -> float:
    """A number in (0, 0.5)."""
    eps = checks.positive("eps", eps)
    if eps >= 0.5:
        raise ValueError(f"eps must be in (0, 0.5), got {eps}")
    return eps


def confidence_candidates(
    ids: Tensor | Sequence[int], values: Tensor | Sequence[float], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Candidates as int64 [C] and ``dtype`` [C]."""
    ids = _column("candidate_ids", ids, "integers", device, None)
    if ids.dtype not in (torch.int64, torch.int32) or ids.ndim != 1 or ids.numel() == 0:
        raise (TypeError if ids.numel() and ids.ndim == 1 else ValueError)(
            f"candidate_ids must be a non-empty [C] tensor or sequence of integers, got {ids.dtype} {tuple(ids.shape)}"
        )
    return ids.to(torch.int64), _values(values, device, dtype, tuple(ids.shape))


def _values(
    values: Tensor | Sequence[float], device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]
) -> Tensor:
    """Candidate values as ``dtype`` [C]."""
    values = _column("candidate_values", values, "numbers", device, dtype)
    if not values.is_floating_point():
        raise TypeError(f"candidate_values must be floating-point numbers, got {values.dtype}")
    if shape[0] > MAX_CANDIDATES:
        raise ValueError(f"at most {MAX_CANDIDATES} candidates fit the registers of one program, got {shape[0]}")
    if tuple(values.shape) != shape:
        raise ValueError(f"candidate_values must have shape {shape}, got {tuple(values.shape)}")
    return values.detach().to(dtype)


def _column(name: str, value: object, kind: str, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    """A tensor as it is, a sequence (or NumPy array) of numbers as one."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (str, bytes)) or not (isinstance(value, Sequence) or hasattr(value, "__array__")):
        raise TypeError(f"{name} must be a [C] tensor or sequence of {kind}, got {type(value).__name__}")
    try:
        return torch.tensor(value, device=device, dtype=dtype)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{name} must be a [C] tensor or sequence of {kind}, got {value!r}") from error
