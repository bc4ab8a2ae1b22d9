"""``caop_fast::token_rows``: log-probability, entropy and lse of each row of logits, and their gradient."""

from typing import Any

import torch
from torch import Tensor

from caop_fast.losses import checks, on_triton
from caop_fast.losses.reference.tokens import token_gradient, token_statistics
from caop_fast.losses.rows import live_rows, row_blocks, spread, take

ONCE = "token_statistics can be differentiated once: double backward through it is not supported"


@torch.library.custom_op("caop_fast::token_rows", mutates_args=())
def token_rows(
    logits: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab: int,
    inplace: bool,
    triton: bool,
    validate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits [N, V] to logprob (empty without labels), entropy, lse, [N] each, and what their gradient needs."""
    if validate:
        checks.check_labels(labels, vocab)
        checks.check_weights(weights)
    dtype = checks.statistics_dtype((logits,))
    if triton:
        found = on_triton.token_rows(logits, labels, weights, temperature, softcap, vocab)
        logprob, entropy, lse, normaliser = found
    else:
        n_rows = logits.shape[0]
        live, dead = live_rows(weights)
        blocks = [
            token_statistics(
                logits[rows, :vocab], take(labels, rows), temperature, softcap, dtype, consume=isinstance(rows, Tensor)
            )
            for rows in row_blocks(n_rows, vocab, logits.device, live)
        ]
        shift, total, lse, entropy, logprob = (
            None if parts[0] is None else spread(torch.cat(parts), n_rows, live, dead)
            for parts in zip(*blocks, strict=True)
        )
        normaliser = torch.stack([shift, total])
    return logits.new_empty(0, dtype=dtype) if logprob is None else logprob, entropy, lse, normaliser


@token_rows.register_fake
def _(
    logits: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab: int,
    inplace: bool,
    triton: bool,
    validate: bool,
) -> tuple[Tensor, ...]:
    dtype = checks.statistics_dtype((logits,))
    n_rows = logits.shape[0]
    sizes = (0 if labels is None else n_rows, n_rows, n_rows)
    return *(logits.new_empty(n, dtype=dtype) for n in sizes), logits.new_empty(
        (6 if triton else 2, n_rows), dtype=dtype
    )


def _gradient(
    logits: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    normaliser: Tensor,
    entropy: Tensor,
    upstream: dict[str, Tensor | None],
    temperature: float,
    softcap: float | None,
    vocab: int,
    triton: bool,
    *,
    inplace: bool,
) -> Tensor:
    upstream = {k: None if v is None else v.to(normaliser.dtype).contiguous() for k, v in upstream.items()}
    if triton:
        return on_triton.token_gradient(
            logits, labels, weights, normaliser, entropy, temperature, softcap, vocab, inplace=inplace, **upstream
        )
    live, _ = live_rows(weights)
    out = logits if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
    for rows in row_blocks(logits.shape[0], vocab, logits.device, live):
        out[rows, :vocab] = token_gradient(
            logits[rows, :vocab],
            take(labels, rows),
            temperature,
            softcap,
            *(column[rows].view(-1, 1) for column in (*normaliser, entropy)),
            **{k: None if v is None else v[rows].view(-1, 1) for k, v in upstream.items()},
            consume=isinstance(rows, Tensor),
        ).to(out.dtype)
    out[:, vocab:] = 0
    return out if weights is None else out.masked_fill_((weights == 0).view(-1, 1), 0)


@torch.library.custom_op("caop_fast::token_rows_backward", mutates_args=())
def token_rows_backward(
    logits: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    normaliser: Tensor,
    entropy: Tensor,
    d_logprob: Tensor | None,
    d_entropy: Tensor | None,
    d_lse: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab: int,
    triton: bool,
) -> Tensor:
    """Gradient of the logits, [N, V] in their dtype, for what flows into the outputs, [N] each or None."""
    upstream = {"d_logprob": d_logprob, "d_entropy": d_entropy, "d_lse": d_lse}
    rows = (logits, labels, weights, normaliser, entropy, upstream)
    return _gradient(*rows, temperature, softcap, vocab, triton, inplace=False)


@token_rows_backward.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op("caop_fast::token_rows_backward_", mutates_args=("logits",))
def token_rows_backward_(
    logits: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    normaliser: Tensor,
    entropy: Tensor,
    d_logprob: Tensor | None,
    d_entropy: Tensor | None,
    d_lse: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab: int,
    triton: bool,
) -> None:
    """The same, written over the logits."""
    upstream = {"d_logprob": d_logprob, "d_entropy": d_entropy, "d_lse": d_lse}
    rows = (logits, labels, weights, normaliser, entropy, upstream)
    _gradient(*rows, temperature, softcap, vocab, triton, inplace=True)


def _once(ctx: Any, *_: Any) -> None:
    raise RuntimeError(ONCE)


token_rows_backward.register_autograd(_once)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, weights, *scalars, inplace, triton, _ = inputs
    _, entropy, _, normaliser = output
    ctx.save_for_backward(logits, labels, weights, normaliser, entropy)
    ctx.labelled = labels is not None
    ctx.scalars, ctx.inplace, ctx.triton, ctx.consumed = scalars, inplace, triton, False
    ctx.mark_non_differentiable(normaliser)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, d_logprob: Tensor | None, d_entropy: Tensor | None, d_lse: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 8
    if ctx.consumed:
        raise RuntimeError("inplace=True: the first backward wrote its gradient over the logits; use inplace=False")
    if not ctx.labelled:  # the log-probabilities were empty
        d_logprob = None
    if d_logprob is None and d_entropy is None and d_lse is None:
        return None, *nothing
    arguments = (*ctx.saved_tensors, d_logprob, d_entropy, d_lse, *ctx.scalars, ctx.triton)
    if not ctx.inplace:
        return token_rows_backward(*arguments), *nothing
    ctx.consumed = True
    token_rows_backward_(*arguments)
    return arguments[0], *nothing


token_rows.register_autograd(_backward, setup_context=_setup)
