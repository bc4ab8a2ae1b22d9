"""The implementations that are measured: caop_fast and those it is compared with, each a ``Peer``.

A package is imported only when one of its losses is built, and each loss is called as its users call it. ``official``
is the loss of the released CaOPD trainer (SalesforceAIResearch/CaOPD, ``distil_trainer.py``, whose ``alpha`` is
``beta`` here), reimplemented: log-probabilities of the sampled tokens, all log-probabilities and the entropies of both
models, each with its own softmax, the divergence elementwise, and a masked mean; logits are float32, as a loss gets
them under mixed precision. ``plain`` is each loss as it is usually written in PyTorch. ``cut-cross-entropy`` is the
package on PyPI (25.1.1 at the time of writing), which is older than Apple's repository.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import caop_fast
from benchmarks.cases import SUITES, Case
from benchmarks.inputs import IGNORE_INDEX, Inputs

WRONG = 0.02  # relative error of loss or gradient above which an implementation is not timed, unless it has a limit
ROUNDED = (0.15, 0.8)  # those limits where logits are rounded to bfloat16, which is coarse for models that are near
STATISTICS = "loss, both log-probabilities, both entropies"
Loss = Callable[[Inputs], Tensor]  # maps inputs to a scalar, the mean over the unmasked tokens


@dataclass(frozen=True)
class Peer:
    """One implementation of the losses of some suites."""

    name: str
    suites: tuple[str, ...]
    build: Callable[[Case], Loss]  # the loss of a case, through the implementation's public API with its defaults
    gives: str | Mapping[str, str] = "loss"  # what a call returns besides the gradient, or that by ``Case.kind``
    limit: float = WRONG  # relative error of loss or gradient above which it is not timed
    rounding: bool = False  # rounds the logits of bfloat16 heads to bfloat16
    compiled: bool = False  # by ``torch.compile``, which takes a large part of a minute
    package: str | None = None  # import name of the package that must be installed
    kernel: bool = False  # a Triton kernel, which needs a GPU or the interpreter
    softcap: bool = True  # has a softcap
    interior: bool = True  # has divergences other than the forward KL
    dtypes: tuple[str, ...] = ("float32", "bfloat16")  # that it supports
    whole: float = 0.0  # float32 tensors of [N, V] that it holds at its peak, about; 0 if it works in chunks

    def gives_for(self, case: Case) -> str:
        return self.gives if isinstance(self.gives, str) else self.gives[case.kind]

    def limits(self, case: Case) -> tuple[float, float]:
        """Largest relative errors of the loss and of the gradients of what is timed."""
        rounds = self.rounding and case.dtype == "bfloat16" and case.suite in ("linear", "linear-topk")
        return ROUNDED if rounds else (self.limit, self.limit)

    def needed_bytes(self, case: Case) -> float:
        """Memory with the inputs, about; a divergence between the two KLs takes twice the tensors."""
        whole = self.whole * (2 if case.beta not in (0, 1) else 1)
        return case.input_bytes + whole * 4 * case.unmasked * case.v

    def refusal(self, case: Case, device: torch.device) -> str | None:
        """Why ``case`` is not measured on ``device``, or None."""
        if self.package is not None and not installed(self.package):
            return f"{self.package} is not installed"
        if self.kernel and device.type != "cuda" and not interpreted():
            return "a Triton kernel: needs a GPU"
        if case.softcap is not None and not self.softcap:
            return "has no softcap"
        if case.beta != 0 and not self.interior:
            return "forward KL only"
        if case.dtype not in self.dtypes:
            return f"for {' and '.join(self.dtypes)} only"
        return too_large(self.needed_bytes(case), device)


def installed(package: str) -> bool:
    """Whether ``package`` could be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def interpreted() -> bool:
    """Whether Triton runs its kernels in the interpreter in this process."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def too_large(needed_bytes: float, device: torch.device) -> str | None:
    """A reason if the device has less memory, 5 % of it left for workspaces and fragments; else None."""
    if device.type == "cuda":
        there = 0.95 * torch.cuda.get_device_properties(device).total_memory
    else:
        there = 0.95 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"needs about {needed_bytes / 1e9:.1f} GB of {there / 1e9:.1f} GB" if needed_bytes > there else None


def ours(case: Case, **options: Any) -> Loss:
    """The loss of ``case``; ``options`` are added to those of the public function."""
    options = {"backend": "triton" if interpreted() else "auto", **options}
    student = {"student_softcap": case.softcap, "beta": case.beta}
    both, one = {**student, "teacher_softcap": case.softcap}, {"softcap": case.softcap}
    listed, candidates = ("teacher_ids", "teacher_logprobs", "labels"), ("candidate_ids", "candidate_values", "target")
    functions: dict[str, tuple[Callable[..., Any], tuple[str, ...], dict[str, Any]]] = {
        "logits": (caop_fast.distillation_loss, ("teacher", "labels"), both),
        "linear": (caop_fast.linear_distillation_loss, ("teacher_hidden", "teacher_weight", "labels"), both),
        "topk": (caop_fast.topk_distillation_loss, listed, student),
        "linear-topk": (caop_fast.linear_topk_distillation_loss, listed, student),
        "confidence": (caop_fast.confidence_loss, candidates, one),
        "linear-confidence": (caop_fast.linear_confidence_loss, candidates, one),
        "tokens": (caop_fast.token_statistics, ("labels",), one),
        "linear-tokens": (caop_fast.linear_token_statistics, ("labels",), one),
    }
    function, names, more = functions[case.suite]
    names = ("hidden", "weight", *names) if case.linear else ("student", *names)

    def run(i: Inputs) -> Tensor:
        given = i.unmasked(*names) if case.linear else [i[name] for name in names]
        found = function(*given, **more, **options)
        return found.loss if case.kind != "tokens" else -found.logprob.sum() / i.count

    return run


def our_rows(case: Case) -> Loss:
    """``linear_distillation_rows``, for weights that depend on the statistics."""
    names = ("hidden", "weight", "teacher_hidden", "teacher_weight", "labels")
    options: dict[str, Any] = {"beta": case.beta, "backend": "triton" if interpreted() else "auto"}
    options |= {"student_softcap": case.softcap, "teacher_softcap": case.softcap}
    return lambda i: caop_fast.linear_distillation_rows(*i.unmasked(*names), **options).divergence.mean()


def known_traffic(case: Case) -> int | None:
    """Bytes of logits that our kernels move for the statistics (twice for a JSD) and for the gradient, if known."""
    reads = {"logits": 4 if case.beta in (0, 1) else 6, "tokens": 2}.get(case.suite)
    return None if reads is None else (reads * case.unmasked + case.n) * case.v * case.itemsize


def official_loss(student: Tensor, teacher: Tensor, labels: Tensor, beta: float) -> tuple[Tensor, ...]:
    """Masked mean of the divergence of float32 logits, and per token both log-probabilities and both entropies."""

    def statistics(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        chosen = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) - torch.logsumexp(logits, dim=-1)
        log_p = F.log_softmax(logits, dim=-1)
        return chosen, log_p, torch.logsumexp(logits, dim=-1) - (F.softmax(logits, dim=-1) * logits).sum(-1)

    with torch.no_grad():
        teacher_logprob, teacher_all, teacher_entropy = statistics(teacher)
    del teacher
    student_logprob, student_all, student_entropy = statistics(student)
    del student
    mask = (labels != IGNORE_INDEX).to(student_all.dtype)
    mean = (divergence(student_all, teacher_all, beta) * mask).sum() / mask.sum()
    return mean, student_logprob, teacher_logprob, student_entropy, teacher_entropy


def divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Of log-probabilities [..., V]: beta 0 forward KL, 1 reverse KL, between them that of GKD."""
    if beta == 0:
        return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    if beta == 1:
        return F.kl_div(teacher, student, reduction="none", log_target=True).sum(-1)
    shares = torch.tensor([1 - beta, beta], dtype=student.dtype, device=student.device).log()
    mixture = torch.logsumexp(torch.stack([student + shares[0], teacher + shares[1]]), dim=0)
    to_teacher = F.kl_div(mixture, teacher, reduction="none", log_target=True).sum(-1)
    return beta * to_teacher + (1 - beta) * F.kl_div(mixture, student, reduction="none", log_target=True).sum(-1)


def plain_loss(student: Tensor, teacher: Tensor, labels: Tensor, beta: float = 0.0) -> tuple[Tensor, ...]:
    """Mean divergence of float32 logits, and per token the divergence, both log-probabilities and both entropies."""
    student = F.log_softmax(student, dim=-1)  # the logits are freed before the next line
    teacher = F.log_softmax(teacher, dim=-1)
    per_token = divergence(student, teacher, beta)
    picked = [log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1) for log_p in (student, teacher)]
    return per_token.mean(), per_token, *picked, entropy(student), entropy(teacher)


@torch.no_grad()
def entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)


def plain_topk(student: Tensor, ids: Tensor, logprobs: Tensor, labels: Tensor, beta: float) -> tuple[Tensor, ...]:
    """Against k listed ids and one outcome for all others; also the log-probability of the label and the entropy."""

    def with_rest(log_p: Tensor) -> Tensor:
        inside = torch.logsumexp(log_p, dim=-1, keepdim=True).clamp(max=-1e-7)
        return torch.cat([log_p, torch.log(-torch.expm1(inside))], dim=-1)

    student = F.log_softmax(student, dim=-1)
    per_token = divergence(with_rest(student.gather(-1, ids)), with_rest(logprobs), beta)
    return per_token.mean(), student.gather(-1, labels.unsqueeze(-1)).squeeze(-1), entropy(student)


def plain_confidence(logits: Tensor, ids: Tensor, values: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Cross-entropy of the candidates to the interpolated target, minus the log of the mass on the candidates.

    Also the expected value, its variance and the mass outside, per token.
    """
    candidates = F.log_softmax(logits, dim=-1)[:, ids]
    inside = torch.logsumexp(candidates, dim=-1)
    above = torch.searchsorted(values, target).clamp(1, values.shape[0] - 1)
    low, high = values[above - 1], values[above]
    share = ((target - low) / (high - low)).clamp(0, 1).unsqueeze(-1)
    log_q = candidates - inside.unsqueeze(-1)
    picked = (1 - share) * log_q.gather(-1, above.unsqueeze(-1) - 1) + share * log_q.gather(-1, above.unsqueeze(-1))
    with torch.no_grad():
        q = log_q.exp()
        expected = (q * values).sum(-1)
        variance = (q * (values - expected.unsqueeze(-1)).square()).sum(-1)
    return -(picked.squeeze(-1) + inside).mean(), expected, variance, -torch.expm1(inside.detach())


def plain_tokens(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Mean negative log-probability of the labels, and the entropies."""
    log_p = F.log_softmax(logits, dim=-1)
    del logits
    return -log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1).mean(), entropy(log_p)


def _capped(logits: Tensor, case: Case) -> Tensor:
    """Float32 logits after the softcap."""
    logits = logits.float()
    return logits if case.softcap is None else case.softcap * torch.tanh(logits / case.softcap)


def _whole(case: Case, *, official: bool, compiled: bool) -> Loss:
    """``official`` or ``plain`` on whole [N, V] tensors; compiled as a whole, or the statistics would be eliminated.

    Logits are in no variable here, nor in a tuple of arguments, which would keep them alive.
    """
    pick = (lambda i, *names: tuple(i[name] for name in names)) if official else Inputs.unmasked

    def student(i: Inputs) -> Tensor:
        return _capped(pick(i, "hidden")[0] @ i["weight"].t() if case.linear else pick(i, "student")[0], case)

    @torch.no_grad()
    def teacher(i: Inputs) -> Tensor:
        if not case.linear:
            return _capped(pick(i, "teacher")[0], case)
        return _capped(pick(i, "teacher_hidden")[0] @ i["teacher_weight"].t(), case)

    def run(i: Inputs) -> tuple[Tensor, ...]:
        if case.kind == "confidence":
            return plain_confidence(student(i), i["candidate_ids"], i["candidate_values"], i["target"])
        (labels,) = pick(i, "labels")
        if case.kind == "tokens":
            return plain_tokens(student(i), labels)
        if case.kind == "topk":
            ids, logprobs = pick(i, "teacher_ids", "teacher_logprobs")
            return plain_topk(student(i), ids, logprobs, labels, case.beta)
        return (official_loss if official else plain_loss)(student(i), teacher(i), labels, case.beta)

    whole = torch.compile(run, dynamic=False) if compiled else run
    return lambda i: whole(i)[0]


def trl_chunked(case: Case) -> Loss:
    """The chunked divergence of its distillation trainer."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def run(i: Inputs) -> Tensor:
        hidden, weight, teacher, teacher_weight = i.unmasked("hidden", "weight", "teacher_hidden", "teacher_weight")
        options = case.beta, 1.0, 1.0, case.softcap, 1.0, case.softcap
        return ChunkedDivergenceFunction.apply(hidden, weight, None, teacher, teacher_weight, None, *options)[0].mean()

    return run


def trl_linear_tokens(case: Case) -> Loss:
    from trl.kernels import ChunkedLogProbFunction

    def run(i: Inputs) -> Tensor:
        hidden, weight, labels = i.unmasked("hidden", "weight", "labels")
        options = 1.0, 32768, case.softcap, 1.0, ("entropy",)  # the vocabulary chunk of trl's trainers
        return -ChunkedLogProbFunction.apply(hidden, weight, None, labels, *options)[0].mean()

    return run


def trl_tokens(case: Case) -> Loss:
    from trl.kernels import selective_log_softmax_and_entropy

    def run(i: Inputs) -> Tensor:
        mask = i["labels"] != IGNORE_INDEX if "keep" in i.tensors else None
        logprob, _ = selective_log_softmax_and_entropy(i["student"], i["labels"].clamp(min=0), 1.0, mask)
        return -logprob.sum() / i.count

    return run


def liger_linear(case: Case, *, chunked: bool) -> Loss:
    """On unmasked tokens: the modules mask by label, but project every token they are given."""
    module: Callable[..., Tensor]
    if chunked:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=case.beta)
    else:
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        module = LigerFusedLinearJSD(jsd_beta=case.beta)

    names = ("hidden", "weight", "teacher_hidden", "teacher_weight", "labels")
    return lambda i: module(*i.unmasked(*names))


def liger_logits(case: Case, *, kl: bool) -> Loss:
    """The modules take log-probabilities: computing them in float32 is part of the work, as for any user of them."""
    from liger_kernel.transformers.jsd import LigerJSD
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    module = LigerKLDIVLoss(reduction="batchmean", log_target=True) if kl else LigerJSD(beta=case.beta)

    def run(i: Inputs) -> Tensor:
        logits = i.unmasked("student", "teacher")
        log_p = (torch.log_softmax(x, dim=-1, dtype=torch.float32) for x in logits)
        return module(*log_p) if kl else module(*log_p, *i.unmasked("labels"))

    return run


def cut_cross_entropy(case: Case) -> Loss:
    """The kernels on a GPU; elsewhere the package's own ``torch_compile`` implementation."""
    from cut_cross_entropy import linear_cross_entropy

    def run(i: Inputs) -> Tensor:
        impl = "cce" if i["hidden"].is_cuda else "torch_compile"
        return linear_cross_entropy(i["hidden"], i["weight"], i["labels"], softcap=case.softcap, impl=impl)

    return run


def flash_cross_entropy(case: Case) -> Loss:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return lambda i: cross_entropy_loss(i["student"], i["labels"])[0].sum() / i.count


OUR_GIVES = {
    **dict.fromkeys(("logits", "topk"), STATISTICS),
    "confidence": "loss, expected value, variance, mass outside",
    "tokens": "log-probability, entropy, log-sum-exp",
}
PLAIN_GIVES = {**OUR_GIVES, "topk": "loss, log-probability, entropy", "tokens": "log-probability, entropy"}
DENSE = ("logits", "linear")
LIGER: dict[str, Any] = {"package": "liger_kernel", "softcap": False}
ALL: tuple[Peer, ...] = (
    Peer("caop_fast", SUITES, ours, OUR_GIVES),
    Peer("caop_fast-min", ("linear",), lambda c: ours(c, memory="min"), STATISTICS),
    Peer(
        "caop_fast-bf16-logits", ("linear",), lambda c: ours(c, logits_dtype=torch.bfloat16), STATISTICS, rounding=True,
        dtypes=("bfloat16",),
    ),
    Peer("official", DENSE, lambda c: _whole(c, official=True, compiled=False), STATISTICS, rounding=True, whole=7),
    Peer("plain", SUITES, lambda c: _whole(c, official=False, compiled=False), PLAIN_GIVES, rounding=True, whole=6),
    Peer("trl-chunked", ("linear",), trl_chunked, "loss, student entropy", package="trl"),
    Peer("liger-fused-linear-jsd", ("linear",), lambda c: liger_linear(c, chunked=False), rounding=True, kernel=True,
         **LIGER),
    Peer("liger-chunked-jsd", ("linear",), lambda c: liger_linear(c, chunked=True), rounding=True, compiled=True,
         **LIGER),
    Peer("liger-jsd", ("logits",), lambda c: liger_logits(c, kl=False), kernel=True, whole=5, **LIGER),
    Peer("liger-kl-div", ("logits",), lambda c: liger_logits(c, kl=True), kernel=True, whole=5, interior=False,
         **LIGER),
    Peer("trl-chunked-logprob", ("linear-tokens",), trl_linear_tokens, "log-probability, entropy", package="trl"),
    Peer("trl-logprob-entropy", ("tokens",), trl_tokens, "log-probability, entropy", package="trl", kernel=True,
         softcap=False, whole=1),
    # It accumulates gradients in bfloat16 over blocks of 128 ids: errors near 2 % for large V and small H.
    Peer("cut-cross-entropy", ("linear-tokens",), cut_cross_entropy, limit=0.1, package="cut_cross_entropy"),
    Peer("flash-attn-ce", ("tokens",), flash_cross_entropy, package="flash_attn", kernel=True, softcap=False, whole=1),
    Peer("caop_fast-rows", ("linear",), our_rows, f"{STATISTICS}, differentiable per token"),
    Peer("plain-compiled", SUITES, lambda c: _whole(c, official=False, compiled=True), PLAIN_GIVES, rounding=True,
         compiled=True, whole=2.5),
    Peer("official-compiled", DENSE, lambda c: _whole(c, official=True, compiled=True), STATISTICS, rounding=True,
         compiled=True, whole=5),
)  # fmt: skip


def named(name: str) -> Peer:
    """The implementation of that name."""
    return next(peer for peer in ALL if peer.name == name)


def of_case(case: Case) -> list[Peer]:
    """Those with a loss for the suite of ``case``, ours first."""
    return [peer for peer in ALL if case.suite in peer.suites]
