"""The calibration loss on one confidence token: candidates in the vocabulary, each standing for a value in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from caop_fast.losses import checks
from caop_fast.losses.distillation import live_rows, reduce_rows
from caop_fast.losses.outputs import ConfidenceOutput

KINDS = ("cross_entropy", "brier", "expected_brier", "bernoulli_nll")


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
    differentiable with respect to ``logits`` (to any order). ``torch.compile`` works with graph breaks;
    ``fullgraph=True`` is not supported yet.

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
    ids, candidate_values = _candidates(candidate_ids, candidate_values, logits.device, dtype)
    device = checks.one_device(
        {
            "logits": logits,
            "candidate_ids": ids,
            "candidate_values": candidate_values,
            "target": target,
            "weights": weights,
        }
    )
    values = checks.checks_values(validate, device)
    if values:
        _check_candidates(ids, candidate_values, vocab)
    checks.choice("kind", kind, KINDS)
    checks.choice("reduction", reduction, checks.REDUCTIONS)
    outside_weight = checks.finite("outside_weight", outside_weight)
    if outside_weight < 0:
        raise ValueError(f"outside_weight must be >= 0, got {outside_weight}")
    temperature = checks.positive("temperature", temperature)
    softcap = checks.positive("softcap", softcap, optional=True)
    eps = checks.positive("eps", eps)
    if eps >= 0.5:
        raise ValueError(f"eps must be in (0, 0.5), got {eps}")
    checks.floating_tensor("target", target)
    flat_target = checks.shaped("target", target.detach(), lead).to(dtype)
    row_weights = checks.row_weights(weights, None, lead, dtype, values=values)

    rows = logits.reshape(-1, logits.shape[-1])[:, :vocab]
    live, dead = live_rows(row_weights)
    if live is not None:
        rows, flat_target = rows[live], flat_target[live]
    elif dead is not None:  # a row of weight 0 becomes a harmless one, and its gradient 0
        rows = rows.masked_fill(dead.view(-1, 1), 0)
        flat_target = flat_target.masked_fill(dead, 0)
    if values and flat_target.numel():
        bad = ~((flat_target >= 0) & (flat_target <= 1))
        if bool(bad.any()):
            raise ValueError(f"target must be in [0, 1], got {float(flat_target[bad][0])}")

    tempered = rows.to(dtype)
    if softcap is not None:
        tempered = softcap * torch.tanh(tempered / softcap)
    if temperature != 1:
        tempered = tempered / temperature
    picked = tempered[:, ids.clamp(0, vocab - 1)]
    picked = picked.masked_fill((ids < 0) | (ids >= vocab), torch.nan)
    log_inside = picked.logsumexp(-1) - tempered.logsumexp(-1)
    log_q = picked.log_softmax(-1)
    q = log_q.exp()
    expected = (q * candidate_values).sum(-1)  # no product of matrices: autocast would round it
    variance = (q * (candidate_values - expected.unsqueeze(-1)) ** 2).sum(-1)
    score = _score(kind, log_q, q, expected, candidate_values, flat_target, eps)
    if outside_weight:
        score = score - outside_weight * log_inside
    score, expected, variance, outside = (
        _spread(values, live, dead, row_weights)
        for values in (score, expected, variance, -torch.expm1(log_inside.clamp(max=0)))
    )
    return ConfidenceOutput(
        reduce_rows(score, row_weights, reduction, lead), expected.view(lead), variance.view(lead), outside.view(lead)
    )


def _score(kind: str, log_q: Tensor, q: Tensor, expected: Tensor, values: Tensor, target: Tensor, eps: float) -> Tensor:
    """The chosen score of each row, [N]."""
    if kind == "cross_entropy":
        mass = split_target(values, target)
        return -torch.where(mass == 0, 0.0, mass * log_q).sum(-1)
    if kind == "brier":
        return (expected - target) ** 2
    if kind == "expected_brier":
        return (q * (values - target.unsqueeze(-1)) ** 2).sum(-1)
    eps = max(eps, torch.finfo(expected.dtype).tiny)
    # 1 - e is a sum of its own: where e rounds to 1 its complement would have no digits, and no logarithm.
    success, failure = expected.clamp(eps, 1 - eps), (q * (1 - values)).sum(-1).clamp(eps, 1 - eps)
    return -(target * success.log() + (1 - target) * failure.log())


def split_target(values: Tensor, target: Tensor) -> Tensor:
    """The target's mass on the candidates, [N, C]: linear between the two neighbouring values [C], ends beyond them."""
    ordered, order = values.sort()
    upper = torch.searchsorted(ordered, target).clamp(1, max(values.numel() - 1, 1))
    if values.numel() == 1:
        return torch.where(target.isnan(), target, 1.0).unsqueeze(-1)
    low, high = ordered[upper - 1], ordered[upper]
    share = ((target - low) / (high - low)).clamp(0, 1)
    mass = target.new_zeros(target.shape[0], values.numel())
    mass.scatter_(1, order[upper - 1].unsqueeze(-1), (1 - share).unsqueeze(-1))
    return mass.scatter_(1, order[upper].unsqueeze(-1), share.unsqueeze(-1))


def _spread(values: Tensor, live: Tensor | None, dead: Tensor | None, weights: Tensor | None) -> Tensor:
    """Values of the live rows as [N], with 0 in the others."""
    if live is not None:
        return values.new_zeros(weights.shape[0]).index_copy(0, live, values)
    return values if dead is None else values.masked_fill(dead, 0)


def _candidates(
    ids: Tensor | Sequence[int], values: Tensor | Sequence[float], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Candidates as int64 [C] and ``dtype`` [C]."""
    ids = _column("candidate_ids", ids, "integers", device, None)
    values = _column("candidate_values", values, "numbers", device, dtype)
    if ids.dtype not in (torch.int64, torch.int32) or ids.ndim != 1 or ids.numel() == 0:
        raise (TypeError if ids.numel() and ids.ndim == 1 else ValueError)(
            f"candidate_ids must be a non-empty [C] tensor or sequence of integers, got {ids.dtype} {tuple(ids.shape)}"
        )
    if not values.is_floating_point():
        raise TypeError(f"candidate_values must be floating-point numbers, got {values.dtype}")
    if values.shape != ids.shape:
        raise ValueError(f"candidate_values must have shape {tuple(ids.shape)}, got {tuple(values.shape)}")
    return ids.to(torch.int64), values.detach().to(dtype)


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


def _check_candidates(ids: Tensor, values: Tensor, vocab: int) -> None:
    if bool(((ids < 0) | (ids >= vocab)).any()):
        raise ValueError(f"candidate_ids must be in [0, {vocab}), got {ids.tolist()}")
    if ids.unique().numel() < ids.numel():
        raise ValueError(f"candidate_ids must be distinct, got {ids.tolist()}")
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(f"candidate_values must be in [0, 1], got {values.tolist()}")
    if values.unique().numel() < values.numel():
        raise ValueError(f"candidate_values must be distinct, got {values.tolist()}")
