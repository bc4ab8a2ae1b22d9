"""Cross-entropies of one model: cut-cross-entropy from hidden states, flash-attn's Triton kernel on logits.

``cut-cross-entropy`` is the package of that name on PyPI (25.1.1 at the time of writing); Apple's repository goes on
and asks to be installed from git: the header of a run says which version was measured, not whose.
"""

from __future__ import annotations

from torch import Tensor

from benchmarks.cases import Case
from benchmarks.inputs import Inputs
from benchmarks.peers.peer import Loss, Peer, needs_gpu


def cut(case: Case) -> Loss:
    """The kernels on a GPU; elsewhere they do not run and the package's own ``torch_compile`` is taken."""
    from cut_cross_entropy import linear_cross_entropy

    def run(i: Inputs) -> Tensor:
        impl = "cce" if i.hidden.is_cuda else "torch_compile"
        return linear_cross_entropy(i.hidden, i.weight, i.labels, softcap=case.softcap, impl=impl)

    return run


def flash(case: Case) -> Loss:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    def run(i: Inputs) -> Tensor:
        losses, _ = cross_entropy_loss(i.student, i.labels)
        return losses.sum() / i.count

    return run


def _flash(case: Case, device) -> str | None:
    return needs_gpu(case, device) or ("has no softcap" if case.softcap is not None else None)


PEERS = (
    # It adds up gradients in bfloat16, block by block of 128 ids: near 2 % at large V and small H.
    Peer("cut-cross-entropy", ("linear-tokens",), cut, limit=0.1, package="cut_cross_entropy"),
    Peer("flash-attn-ce", ("tokens",), flash, refuses=_flash, package="flash_attn"),
)
