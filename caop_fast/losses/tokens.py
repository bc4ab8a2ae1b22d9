"""Statistics of one model's tokens, for policy gradients, entropy bonuses and sampled-token distillation."""

from __future__ import annotations

from torch import Tensor

from caop_fast.losses import checks
from caop_fast.losses.backend import resolve_backend
from caop_fast.losses.ops.tokens import token_rows
from caop_fast.losses.outputs import TokenStatistics


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
    label_ids = checks.label_ids(labels, lead, vocab, values=False)
    row_weights = checks.row_weights(weights, label_ids, lead, dtype, values=False)
    checks.overwritable("logits", logits, inplace)
    logprob, entropy, lse, _ = token_rows(
        logits.reshape(-1, logits.shape[-1]),
        label_ids,
        row_weights,
        checks.positive("temperature", temperature),
        checks.positive("softcap", softcap, optional=True),
        vocab,
        inplace,
        resolve_backend(backend, device) == "triton",
        checks.checks_values(validate, device),
    )
    return TokenStatistics(None if labels is None else logprob.view(lead), entropy.view(lead), lse.view(lead))
