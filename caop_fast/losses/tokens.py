"""Statistics of one model's tokens, for policy gradients, entropy bonuses and sampled-token distillation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from caop_fast.losses import checks
from caop_fast.losses.backends.resolve import get_backend, resolve_backend
from caop_fast.losses.batches import Columns, SavedTokens, TokenBatch, TokenGrads, TokenRows
from caop_fast.losses.operator import GradientOperator, Operator, Overwrites
from caop_fast.losses.options import ExecutionConfig, TokenOptions
from caop_fast.losses.outputs import TokenStatistics

ONCE = "token_statistics can be differentiated once: double backward through it is not supported"
DIFFERENTIABLE = ("logprob", "entropy", "lse")


def token_statistics(
    logits: Tensor,
    labels: Tensor | None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    weights: Tensor | None = None,
    inplace: bool = False,
    backend: str = "auto",
    validate: bool | None = None,
) -> TokenStatistics:
    """Log-probability of the label, entropy and log-sum-exp of each token, in nats, from one read of the logits.

    All three are differentiable with respect to ``logits``, in any mix, once. No shift is applied: ``logits[i]`` and
    ``labels[i]`` speak of the same token. Works under ``torch.compile(fullgraph=True)`` and ``torch.autocast``.

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64; any leading shape, N tokens in all.
        labels: [...] integers in [0, V), or -100 for none; None for entropy and lse alone.
        temperature: divides the logits, > 0.
        softcap: ``c * tanh(z / c)`` on the logits before the temperature; None for none.
        vocab_size: the softmax runs over the first ids only; None for all. Columns past it get gradient 0.
        weights: [...], finite, >= 0; they only mask: a token of weight 0 reports 0 everywhere, gets gradient 0, and may
            hold anything. None masks the tokens whose label is -100.
        inplace: the backward writes the gradient over ``logits`` (not a leaf, nor a view of one); a second backward is
            an error.
        backend: "torch", "triton", or "auto" (Triton on GPUs where it is installed).
        validate: check values of labels and weights, which makes the host wait for a GPU; None does so on the CPU only.
            Unchecked, a bad label gives NaN in its row.

    Returns:
        TokenStatistics in float32 (float64 when ``logits`` is), with the leading shape of ``logits``.

    Raises:
        TypeError, ValueError: on bad arguments, naming the argument, what it got and what it takes.
    """
    checks.floating_tensor("logits", logits, min_ndim=2)
    lead = logits.shape[:-1]
    device = checks.one_device({"logits": logits, "labels": labels, "weights": weights})
    vocab = checks.vocabulary(vocab_size, logits=logits.shape[-1])
    dtype = checks.statistics_dtype((logits,))
    label_ids = checks.label_ids(labels, lead)
    row_weights = checks.row_weights(weights, label_ids, lead, dtype)
    options = TokenOptions(checks.positive("temperature", temperature), checks.optional_positive("softcap", softcap))
    checks.overwritable("logits", logits, inplace)
    execution = ExecutionConfig(resolve_backend(backend, device), checks.checks_values(validate, device), inplace)
    batch = TokenBatch(logits.reshape(-1, logits.shape[-1]), label_ids, row_weights)
    return token_output(token_rows(TokenInputs(batch, options, vocab, execution)), lead)


def token_output(found: TokenRows, lead: torch.Size) -> TokenStatistics:
    """Statistics [N] with the leading shape of the inputs."""
    logprob = None if found.logprob is None else found.logprob.view(lead)
    return TokenStatistics(logprob, found.entropy.view(lead), found.lse.view(lead))


class TokenInputs(NamedTuple):
    """Arguments of ``caop_fast::token_rows``."""

    batch: TokenBatch
    options: TokenOptions
    vocab: int
    execution: ExecutionConfig


class GradientInputs(NamedTuple):
    """Arguments of ``caop_fast::token_gradient``."""

    forward: TokenInputs
    saved: SavedTokens
    grads: TokenGrads


def _rows(inputs: TokenInputs) -> TokenRows:
    batch, options, vocab, execution = inputs
    if execution.validate:
        checks.check_labels(batch.labels, vocab)
        checks.check_weights(batch.weights)
    dtype = checks.statistics_dtype((batch.logits,))
    return get_backend(execution.backend).token_rows(batch, options, vocab, dtype)


def _fake_rows(inputs: TokenInputs) -> TokenRows:
    batch = inputs.batch
    dtype = checks.statistics_dtype((batch.logits,))
    return fake_token_rows(batch.logits, batch.labels, dtype, inputs.execution.backend)


def fake_token_rows(like: Tensor, labels: Tensor | None, dtype: torch.dtype, backend: str) -> TokenRows:
    """Rows without values, for ``like`` [N, ...]."""
    n_rows, fields = like.shape[0], get_backend(backend).token_saved_fields
    logprob = None if labels is None else like.new_empty(n_rows, dtype=dtype)
    entropy, lse = (like.new_empty(n_rows, dtype=dtype) for _ in range(2))
    return TokenRows(logprob, entropy, lse, like.new_empty((fields, n_rows), dtype=dtype))


def _gradient(inputs: GradientInputs, out: Tensor | None) -> Tensor:
    batch, options, vocab, execution = inputs.forward
    return get_backend(execution.backend).token_gradient(
        batch, options, Columns.whole(vocab), inputs.saved, inputs.grads, out
    )


def _backward(inputs: TokenInputs, found: TokenRows, grads: TokenRows) -> tuple[Tensor]:
    saved = SavedTokens(found.saved_statistics, found.entropy)
    upstream = TokenGrads(grads.logprob, grads.entropy, grads.lse)
    return (token_gradient(GradientInputs(inputs, saved, upstream), inplace=inputs.execution.inplace),)


token_rows = Operator("token_rows", TokenInputs, TokenRows, _rows, _fake_rows)
token_gradient = GradientOperator("token_gradient", GradientInputs, _gradient, logits="forward_batch_logits", once=ONCE)
token_rows.register_autograd(
    _backward,
    inputs=["batch_logits"],
    outputs=DIFFERENTIABLE,
    saved=["entropy", "saved_statistics"],
    overwrites=Overwrites(lambda inputs: inputs.execution.inplace, "logits", ONCE),
)
