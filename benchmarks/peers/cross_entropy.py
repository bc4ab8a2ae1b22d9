"""Cross-entropies: cut-cross-entropy from hidden states, flash-attn's Triton kernel on logits.

``cut-cross-entropy`` is the package of that name on PyPI (25.1.1 at the time of writing); Apple's repository is newer
and is installed from git. The header of a run has the version, not the source.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.inputs import Inputs
from benchmarks.peers.peer import Loss, Peer, needs_gpu


def cut(case: Case) -> Loss:
    """The kernels on a GPU; elsewhere the package's own ``torch_compile`` implementation."""
    from cut_cross_entropy import linear_cross_entropy

    def run(i: Inputs) -> Tensor:
        impl = "cce" if i["hidden"].is_cuda else "torch_compile"
        return linear_cross_entropy(i["hidden"], i["weight"], i["labels"], softcap=case.softcap, impl=impl)

    return run


def flash(case: Case) -> Loss:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    def run(i: Inputs) -> Tensor:
        losses, _ = cross_entropy_loss(i["student"], i["labels"])
        return losses.sum() / i.count

    return run


def _flash(case: Case, device: torch.device) -> str | None:
    return needs_gpu(case, device) or ("has no softcap" if case.softcap is not None else None)


PEERS = (
    # It accumulates gradients in bfloat16 over blocks of 128 ids: errors near 2 % for large V and small H.
    Peer("cut-cross-entropy", ("linear-tokens",), cut, limit=0.1, package="cut_cross_entropy"),
    Peer("flash-attn-ce", ("tokens",), flash, refuses=_flash, package="flash_attn"),
)
