"""``torch.ops.caop_fast.confidence_rows``: scores of confidence candidates, with their derivative."""

import importlib
from typing import Any

import torch
from torch import Tensor

from caop_fast.losses import checks
from caop_fast.losses.reference import confidence as reference
from caop_fast.losses.rows import row_blocks

SAVED_FIELDS = 3
LOGPROB_SLACK = 1e-3  # rounding may take an honest log-probability this far above 0
ONCE = "the confidence losses can be differentiated once: double backward through them is not supported"


@torch.library.custom_op("caop_fast::confidence_rows", mutates_args=())
def confidence_rows(
    source: Tensor,
    ids: Tensor | None,
    values: Tensor,
    target: Tensor,
    weights: Tensor | None,
    kind: str,
    outside_weight: float,
    eps: float,
    temperature: float,
    softcap: float | None,
    vocab: int,
    triton: bool,
    validate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, expected value, variance and outside mass [N], and what the derivative of the Triton kernels needs.

    source [N, >= vocab] logits and ids [C] int64; or, with ids None, source [N, C] log-probabilities of the candidates.
    values [C], target and weights [N] in the dtype of the statistics. Rows of weight 0 hold 0.
    """
    if validate:
        check_values(source, ids, values, target, weights, vocab)
    dtype = checks.statistics_dtype((source,))
    if triton:
        return tuple(
            importlib.import_module("caop_kernels.confidence").confidence_scores(
                _unit_stride(source),
                ids,
                values,
                target,
                kind=kind,
                outside_weight=outside_weight,
                weights=weights,
                temperature=temperature,
                softcap=softcap,
                vocab_size=vocab,
                eps=eps,
            )
        )
    options = reference.Options(kind, outside_weight, eps, temperature, softcap)
    outputs = [source.new_zeros(source.shape[0], dtype=dtype) for _ in reference.Scores._fields]
    for rows in row_blocks(source.shape[0], vocab, source.device, live_index(weights)):
        if ids is None:
            log_p = source[rows].to(dtype)
        else:
            log_p = reference.candidate_log_p(reference.open_rows(source[rows, :vocab], options, dtype), ids)
        found = reference.scores(log_p, values, target[rows], options)
        for output, column in zip(outputs, found, strict=True):
            output[rows] = column
    if weights is not None:
        outputs = [output.masked_fill_(weights == 0, 0) for output in outputs]
    return (*outputs, source.new_empty((SAVED_FIELDS, 0), dtype=dtype))


@confidence_rows.register_fake
def _(source, ids, values, target, weights, kind, outside_weight, eps, temperature, softcap, vocab, triton, validate):
    dtype, n_rows = checks.statistics_dtype((source,)), source.shape[0]
    columns = [source.new_empty(n_rows, dtype=dtype) for _ in reference.Scores._fields]
    saved = n_rows if triton and ids is not None else 0
    return (*columns, source.new_empty((SAVED_FIELDS, saved), dtype=dtype))


@torch.library.custom_op("caop_fast::confidence_gradient", mutates_args=())
def confidence_gradient(
    source: Tensor,
    ids: Tensor | None,
    values: Tensor,
    target: Tensor,
    weights: Tensor | None,
    saved_statistics: Tensor,
    grad_loss: Tensor | None,
    grad_expected: Tensor | None,
    grad_variance: Tensor | None,
    grad_outside: Tensor | None,
    kind: str,
    outside_weight: float,
    eps: float,
    temperature: float,
    softcap: float | None,
    vocab: int,
    triton: bool,
) -> Tensor:
    """Gradient of ``source``, in its shape and dtype, for upstream gradients [N] of the four scores."""
    dtype = values.dtype
    if triton:
        return importlib.import_module("caop_kernels.confidence_gradient").confidence_gradient(
            _unit_stride(source),
            ids,
            values,
            target,
            saved_statistics,
            kind=kind,
            outside_weight=outside_weight,
            weights=weights,
            temperature=temperature,
            softcap=softcap,
            vocab_size=vocab,
            eps=eps,
            grad_loss=grad_loss,
            grad_expected=grad_expected,
            grad_variance=grad_variance,
            grad_outside=grad_outside,
        )
    options = reference.Options(kind, outside_weight, eps, temperature, softcap)
    index = live_index(weights)
    out = torch.empty_like(source, memory_format=torch.contiguous_format)
    if index is not None:
        out.zero_()
    for rows in row_blocks(source.shape[0], vocab, source.device, index):
        upstream = [None if up is None else up[rows] for up in (grad_loss, grad_expected, grad_variance, grad_outside)]
        if ids is None:
            out[rows] = reference.logprob_gradient(source[rows].to(dtype), values, target[rows], options, upstream).to(
                out.dtype
            )
        else:
            opened = reference.open_rows(source[rows, :vocab], options, dtype, slope=softcap is not None)
            gradient = reference.logit_gradient(opened, ids, values, target[rows], options, upstream)
            out[rows, :vocab] = gradient.to(out.dtype)
    out[:, vocab:] = 0
    if weights is not None and index is None:
        out.masked_fill_((weights == 0).unsqueeze(-1), 0)
    return out


@confidence_gradient.register_fake
def _(source, *_):
    return torch.empty_like(source, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    source, ids, values, target, weights, *settings, _ = inputs
    saved_statistics = output[-1]
    ctx.save_for_backward(source, ids, values, target, weights, saved_statistics)
    ctx.settings = settings
    ctx.mark_non_differentiable(saved_statistics)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    *grad_scores, _ = upstream
    gradient = None
    if any(d is not None for d in grad_scores):
        gradient = confidence_gradient(*ctx.saved_tensors, *grad_scores, *ctx.settings)
    return gradient, *(None,) * (len(ctx.settings) + 5)


def _once(ctx: Any, *_: Any) -> None:
    raise RuntimeError(ONCE)


confidence_rows.register_autograd(_backward, setup_context=_setup)
confidence_gradient.register_autograd(_once)


def live_index(weights: Tensor | None) -> Tensor | None:
    """The rows to compute: an index of those with weight where there are others and looking costs no sync (CPU)."""
    if weights is None or weights.device.type != "cpu" or not bool((weights == 0).any()):
        return None
    return weights.nonzero().view(-1)


def check_values(
    source: Tensor, ids: Tensor | None, values: Tensor, target: Tensor, weights: Tensor | None, vocab: int
) -> None:
    """Raise a ValueError for candidates, targets or weights that make no sense. Reads values."""
    checks.check_weights(weights)
    check_candidates(ids, values, vocab)
    live = torch.ones_like(target, dtype=torch.bool) if weights is None else weights != 0
    bad = live & ~((target >= 0) & (target <= 1))
    if bool(bad.any()):
        raise ValueError(f"target must be in [0, 1], got {float(target[bad][0])}")
    if ids is None:
        bad = live & (source > LOGPROB_SLACK).any(-1)
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


def _unit_stride(source: Tensor) -> Tensor:
    return source if source.shape[-1] == 1 or source.stride(-1) == 1 else source.contiguous()
