"""The calibration losses: candidate answers to "how sure are you", each standing for a value in [0, 1], scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from caop_fast.losses import checks
from caop_fast.losses.backends.resolve import get_backend, resolve_backend
from caop_fast.losses.batches import ConfidenceBatch, ConfidenceGrads, ConfidenceRows
from caop_fast.losses.distillation import reduce_rows
from caop_fast.losses.operator import Operator
from caop_fast.losses.options import ConfidenceOptions, ExecutionConfig
from caop_fast.losses.outputs import ConfidenceOutput
from caop_kernels.constants import CONFIDENCE_KINDS, CONFIDENCE_SAVED_FIELDS

MAX_CANDIDATES = 4096
LOGPROB_SLACK = 1e-3  # rounding may take an honest log-probability this far above 0
ONCE = "the confidence losses can be differentiated once: double backward through them is not supported"
DIFFERENTIABLE = ("loss", "expected", "variance", "outside_mass")


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
    options = confidence_options(
        kind,
        outside_weight,
        eps,
        temperature=checks.positive("temperature", temperature),
        softcap=checks.optional_positive("softcap", softcap),
    )
    score = check_score(target, weights, reduction, lead, dtype)
    execution = ExecutionConfig(resolve_backend(backend, device), checks.checks_values(validate, device))
    batch = ConfidenceBatch(logits.reshape(-1, logits.shape[-1]), ids, candidate_values, score.target, score.weights)
    return confidence_output(
        confidence_rows(ConfidenceInputs(batch, options, vocab, execution)), score.weights, reduction, lead
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
    lead, count = candidate_logprobs.shape[:-1], candidate_logprobs.shape[-1]
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
    options = confidence_options(kind, outside_weight, eps)
    score = check_score(target, weights, reduction, lead, dtype)
    execution = ExecutionConfig(resolve_backend(backend, device), checks.checks_values(validate, device))
    batch = ConfidenceBatch(candidate_logprobs.reshape(-1, count), None, candidate_values, score.target, score.weights)
    return confidence_output(
        confidence_rows(ConfidenceInputs(batch, options, count, execution)), score.weights, reduction, lead
    )


def confidence_output(
    found: ConfidenceRows, weights: Tensor | None, reduction: str, lead: torch.Size
) -> ConfidenceOutput:
    """Scores [N] reduced, and with the leading shape of the inputs."""
    loss, expected, variance, outside_mass, _ = found
    return ConfidenceOutput(
        reduce_rows(loss, weights, reduction, lead), expected.view(lead), variance.view(lead), outside_mass.view(lead)
    )


def confidence_options(
    kind: str, outside_weight: float, eps: float, *, temperature: float = 1.0, softcap: float | None = None
) -> ConfidenceOptions:
    """Checked options of a score; temperature and softcap have been checked."""
    return ConfidenceOptions(
        kind=checks.choice("kind", kind, CONFIDENCE_KINDS),
        outside_weight=check_outside_weight(outside_weight),
        eps=check_eps(eps),
        temperature=temperature,
        softcap=softcap,
    )


class Score(NamedTuple):
    """Target and weights as [N] in the dtype of the statistics."""

    target: Tensor
    weights: Tensor | None


def check_score(target: Tensor, weights: Tensor | None, reduction: str, lead: torch.Size, dtype: torch.dtype) -> Score:
    """What the rows are scored against, and how they are reduced."""
    checks.choice("reduction", reduction, checks.REDUCTIONS)
    checks.floating_tensor("target", target)
    flat_target = checks.shaped("target", target.detach(), lead).to(dtype)
    return Score(flat_target, checks.row_weights(weights, None, lead, dtype))


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


class ConfidenceInputs(NamedTuple):
    """Arguments of ``caop_fast::confidence_rows``."""

    batch: ConfidenceBatch
    options: ConfidenceOptions
    vocab: int
    execution: ExecutionConfig


class GradientInputs(NamedTuple):
    """Arguments of ``caop_fast::confidence_gradient``."""

    forward: ConfidenceInputs
    saved_statistics: Tensor | None
    grads: ConfidenceGrads


def check_values(batch: ConfidenceBatch, vocab: int) -> None:
    """ValueError on candidates, targets or weights that make no sense. Reads values."""
    source, ids, values, target, weights = batch
    checks.check_weights(weights)
    check_candidates(ids, values, vocab)
    counts = torch.ones_like(target, dtype=torch.bool) if weights is None else weights != 0
    bad = counts & ~((target >= 0) & (target <= 1))
    if bool(bad.any()):
        raise ValueError(f"target must be in [0, 1], got {float(target[bad][0])}")
    if ids is None:
        bad = counts & (source > LOGPROB_SLACK).any(-1)
        if bool(bad.any()):
            raise ValueError(
                f"candidate_logprobs must be <= 0, got {float(source[bad].max())}: logits belong to confidence_loss"
            )


def check_candidates(ids: Tensor | None, values: Tensor, vocab: int | None) -> None:
    """Candidates are distinct ids of the vocabulary (None: of any) with distinct values in [0, 1]. Reads values."""
    if ids is not None:
        if bool((ids < 0).any()) or (vocab is not None and bool((ids >= vocab).any())):
            raise ValueError(f"candidate_ids must be in [0, {'V' if vocab is None else vocab}), got {ids.tolist()}")
        if ids.unique().numel() < ids.numel():
            raise ValueError(f"candidate_ids must be distinct, got {ids.tolist()}")
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(f"candidate_values must be in [0, 1], got {values.tolist()}")
    if values.unique().numel() < values.numel():
        raise ValueError(f"candidate_values must be distinct, got {values.tolist()}")


def _rows(inputs: ConfidenceInputs) -> ConfidenceRows:
    batch, options, vocab, execution = inputs
    if execution.validate:
        check_values(batch, vocab)
    return get_backend(execution.backend).confidence_rows(batch, options, vocab)


def _fake_rows(inputs: ConfidenceInputs) -> ConfidenceRows:
    source, ids, *_ = inputs.batch
    dtype = checks.statistics_dtype((source,))
    return fake_confidence_rows(source, dtype, saves=ids is not None and saves_confidence(inputs.execution))


def saves_confidence(execution: ExecutionConfig) -> bool:
    """Whether ``confidence_rows`` of logits saves statistics for the gradient."""
    return get_backend(execution.backend).saves_confidence


def fake_confidence_rows(like: Tensor, dtype: torch.dtype, *, saves: bool) -> ConfidenceRows:
    """Rows without values, for ``like`` [N, ...]."""
    n_rows = like.shape[0]
    loss, expected, variance, outside_mass = (like.new_empty(n_rows, dtype=dtype) for _ in range(4))
    saved = like.new_empty((CONFIDENCE_SAVED_FIELDS, n_rows), dtype=dtype) if saves else None
    return ConfidenceRows(loss, expected, variance, outside_mass, saved)


def _gradient(inputs: GradientInputs) -> Tensor:
    batch, options, vocab, execution = inputs.forward
    return get_backend(execution.backend).confidence_gradient(
        batch, options, vocab, inputs.saved_statistics, inputs.grads, None
    )


def _backward(inputs: ConfidenceInputs, found: ConfidenceRows, grads: ConfidenceRows) -> tuple[Tensor]:
    upstream = ConfidenceGrads(grads.loss, grads.expected, grads.variance, grads.outside_mass)
    return (confidence_gradient(GradientInputs(inputs, found.saved_statistics, upstream)),)


confidence_rows = Operator("confidence_rows", ConfidenceInputs, ConfidenceRows, _rows, _fake_rows)
confidence_gradient = Operator(
    "confidence_gradient",
    GradientInputs,
    Tensor,
    _gradient,
    lambda inputs: torch.empty_like(inputs.forward.batch.source, memory_format=torch.contiguous_format),
    once=ONCE,
)
confidence_rows.register_autograd(
    _backward, inputs=["batch_source"], outputs=DIFFERENTIABLE, saved=["saved_statistics"]
)
