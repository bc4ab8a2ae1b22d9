"""liger-kernel: its divergences on log-probabilities, its fused linear JSD and its chunked linear JSD."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.inputs import Inputs
from benchmarks.peers.peer import Loss, Peer, needs_gpu


def fused_linear_jsd(case: Case) -> Loss:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    return _from_hidden(LigerFusedLinearJSD(jsd_beta=case.beta))


def chunked_jsd(case: Case) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    return _from_hidden(LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=case.beta))


def _from_hidden(module: Callable[..., Tensor]) -> Loss:
    """On unmasked tokens: the module masks by label, but projects every token it is given."""

    def run(i: Inputs) -> Tensor:
        hidden, teacher, labels = i.unmasked("hidden", "teacher_hidden", "labels")
        return module(hidden, i["weight"], teacher, i["teacher_weight"], labels)

    return run


def jsd(case: Case) -> Loss:
    """The module takes log-probabilities: computing them in float32 is part of the work, as for any user of it."""
    from liger_kernel.transformers.jsd import LigerJSD

    module = LigerJSD(beta=case.beta)

    def run(i: Inputs) -> Tensor:
        student, teacher, labels = i.unmasked("student", "teacher", "labels")
        return module(_log_p(student), _log_p(teacher), labels)

    return run


def kl_div(case: Case) -> Loss:
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    module = LigerKLDIVLoss(reduction="batchmean", log_target=True)
    return lambda i: module(*(_log_p(x) for x in i.unmasked("student", "teacher")))


def _log_p(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1, dtype=torch.float32)


def _no_softcap(case: Case, device: torch.device) -> str | None:
    return "has no softcap" if case.softcap is not None else None


def _kernel(case: Case, device: torch.device) -> str | None:
    return needs_gpu(case, device) or _no_softcap(case, device)


def _forward_kl(case: Case, device: torch.device) -> str | None:
    return _kernel(case, device) or ("forward KL only" if case.beta != 0 else None)


PEERS = (
    Peer(
        "liger-fused-linear-jsd", ("linear",), fused_linear_jsd, rounding=True, refuses=_kernel, package="liger_kernel"
    ),
    Peer("liger-chunked-jsd", ("linear",), chunked_jsd, refuses=_no_softcap, package="liger_kernel", rounding=True),
    Peer("liger-jsd", ("logits",), jsd, refuses=_kernel, package="liger_kernel"),
    Peer("liger-kl-div", ("logits",), kl_div, refuses=_forward_kl, package="liger_kernel"),
)
