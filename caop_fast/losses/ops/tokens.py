"""``caop_fast::token_rows``: log-probability, entropy and lse of each row of logits, and their gradient."""

import torch
from torch import Tensor

from caop_fast.losses import checks, on_triton, rows
from caop_fast.losses.ops.gradients import differentiate, gradient_operators
from caop_fast.losses.reference.tokens import token_statistics
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
        logprob, entropy, lse, saved_statistics = found
    else:
        n_rows = logits.shape[0]
        live, dead = live_rows(weights)
        blocks = [
            token_statistics(
                logits[block, :vocab],
                take(labels, block),
                temperature,
                softcap,
                dtype,
                consume=isinstance(block, Tensor),
            )
            for block in row_blocks(n_rows, vocab, logits.device, live)
        ]
        shift, total, lse, entropy, logprob = (
            None if parts[0] is None else spread(torch.cat(parts), n_rows, live, dead)
            for parts in zip(*blocks, strict=True)
        )
        saved_statistics = torch.stack([shift, total])
    return logits.new_empty(0, dtype=dtype) if logprob is None else logprob, entropy, lse, saved_statistics


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


def token_gradient_rows(
    logits: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    saved_statistics: Tensor,
    entropy: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab: int,
    triton: bool,
    *,
    inplace: bool,
) -> Tensor:
    """Gradient of the logits, [N, V] in their dtype, for what flows into the outputs, [N] each or None."""
    upstream = {
        name: None if value is None else value.to(saved_statistics.dtype).contiguous()
        for name, value in (("grad_logprob", grad_logprob), ("grad_entropy", grad_entropy), ("grad_lse", grad_lse))
    }
    run = on_triton.token_gradient if triton else rows.token_gradient
    return run(
        logits,
        labels,
        weights,
        saved_statistics,
        entropy,
        temperature,
        softcap,
        rows.Columns.whole(vocab),
        out=logits if inplace else None,
        **upstream,
    )


gradient = gradient_operators("token_rows_backward", token_gradient_rows, once=ONCE)
token_rows_backward, token_rows_backward_ = gradient.fresh, gradient.over
differentiate(token_rows, gradient, logits="logits", n_tensors=3, labels=1, saved=(3, 1), flows=(0, 1, 2), logprob=0)
