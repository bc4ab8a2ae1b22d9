"""Statistics of one model's logits, on blocks of rows, in plain PyTorch.

With a = z/T the tempered logits of a row and p = softmax(a):

    lse = log sum exp(a)        log p(y) = a[y] - lse        H = -sum p log p

    gradient with respect to a:    lse  p        log p(y)  [y] - p        H  -p (log p + H)

A logit of -inf is an impossible token: it adds nothing to the entropy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from caop_fast.losses.batches import TokenGrads
from caop_fast.losses.options import TokenOptions
from caop_fast.losses.reference.divergence import EXCLUDED, add_at_labels, blank_labels, label_logprob, temper


class TokenBlock(NamedTuple):
    """Statistics [R, 1] of a block of rows. lse = shift + log(total)."""

    shift: Tensor
    total: Tensor
    lse: Tensor
    entropy: Tensor
    logprob: Tensor | None


class KnownTokens(NamedTuple):
    """Statistics [R, 1] that the gradient takes from the forward pass."""

    shift: Tensor
    total: Tensor
    entropy: Tensor


class BlockLabels(NamedTuple):
    """Labels [R] of rows of which a block holds some columns."""

    ids: Tensor | None
    local: Tensor | None  # relative to the block's first column
    vocab: int  # all columns


def _open(
    logits: Tensor, options: TokenOptions, dtype: torch.dtype, shift: Tensor | None, consume: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """u = a - shift and e = exp(u), [R, V]; the shift (the maxima by default); the softcap's derivative."""
    a, slope, owned = temper(
        logits, options.temperature, options.softcap, dtype, consume=consume, slope=shift is not None
    )
    shift = a.amax(-1, keepdim=True) if shift is None else shift
    u = a.sub_(shift) if owned else a - shift
    e = u.exp()
    return u.clamp_(min=EXCLUDED), e, shift, slope


def token_statistics(
    logits: Tensor,
    labels: Tensor | None,
    options: TokenOptions,
    dtype: torch.dtype,
    *,
    consume: bool = False,
) -> TokenBlock:
    """Statistics of raw logits [R, V] in ``dtype``. ``consume`` allows overwriting the logits."""
    u, e, shift, _ = _open(logits, options, dtype, None, consume)
    total = e.sum(-1, keepdim=True)
    log_total = total.log()
    logprob = None if labels is None else label_logprob(u, log_total, labels)
    if logprob is not None:  # an excluded label
        logprob = logprob.masked_fill(logprob < EXCLUDED / 2, -torch.inf)
    entropy = (log_total - e.mul_(u).sum(-1, keepdim=True) / total).clamp_(min=0)
    return TokenBlock(shift, total, shift + log_total, entropy, logprob)


def token_gradient(
    logits: Tensor,
    options: TokenOptions,
    known: KnownTokens,
    labels: BlockLabels,
    grads: TokenGrads,
    *,
    consume: bool = False,
) -> Tensor:
    """Gradient [R, V] of the raw logits, maybe some columns of a vocabulary, for upstream gradients [R, 1] or None."""
    shift, total, entropy = known
    grad_logprob, grad_entropy, grad_lse = grads
    u, e, _, slope = _open(logits, options, shift.dtype, shift, consume)
    constant = torch.zeros_like(total) if grad_lse is None else grad_lse
    label = None
    if grad_logprob is not None and labels.ids is not None:
        label = blank_labels(grad_logprob, labels.ids.view(-1, 1), labels.vocab)
        constant = constant - label
    if grad_entropy is None:
        gradient = e.mul_(constant / total)
    else:  # log p = u - log(total)
        constant = constant - grad_entropy * (entropy - total.log())
        gradient = e.mul_(u.mul_(-grad_entropy).add_(constant).div_(total))
    if label is not None and labels.local is not None:
        add_at_labels(gradient, labels.local, label)
    gradient = gradient if slope is None else gradient.mul_(slope)
    return gradient.div_(options.temperature)
