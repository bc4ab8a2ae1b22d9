"""Linear losses over cut vocabularies: inputs, calls, and what float64 says; ``sharded_runs.py`` runs them."""

from __future__ import annotations

import hashlib
import math
import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from caop_fast import (
    confidence_loss,
    linear_confidence_loss,
    linear_distillation_loss,
    linear_distillation_rows,
    linear_token_statistics,
    linear_topk_distillation_loss,
)
from helpers.oracle import statistics, weighted_mean
from helpers.topk_oracle import oracle as topk_truth

N, H, H_T, VOCAB = 7, 6, 5, 29
MORE = 4  # rows that only the teacher has
UPSTREAM = -1.7
DISTILLATION = ("balanced", "min", "rows")
WAYS = (*DISTILLATION, "tokens", "topk", "confidence")
VARIANTS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(DISTILLATION, (0.0, 1.0, 0.4, "tensor")),
    "tokens": (0, 1, 2),
    "topk": ("bucket", "renormalize", "ignore"),
    "confidence": ("cross_entropy", "brier", "expected_brier", "bernoulli_nll"),
}
# "chunk": as torch.chunk cuts; "zero": a rank without rows; "fewer", "idle": fewer ids, or none, to compare on the
# last; "longer": the teacher has more rows; "shared": one tensor is both heads.
LAYOUTS = ("chunk", "zero", "fewer", "idle", "longer", "shared")
IDS, VALUES = [7, 2, 15, 4, 23], [0.5, 0.0, 1.0, 0.25, 0.75]
# Float64 is held to rounding; float32 and bfloat16 as in test_linear.py.
VALUE_TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-5, torch.bfloat16: 5e-5}
GRADIENT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-5, torch.bfloat16: torch.finfo(torch.bfloat16).eps}


class Case(NamedTuple):
    """One call."""

    ranks: int
    way: str
    layout: str
    variant: Any

    @property
    def name(self) -> str:
        return "-".join(map(str, self))

    @property
    def distils(self) -> bool:
        return self.way in DISTILLATION


def all_cases() -> list[Case]:
    """All combinations on four ranks, every other one on two."""
    return [
        Case(ranks, way, layout, variant)
        for ranks in (2, 4)
        for way in WAYS
        for i, layout in enumerate(LAYOUTS if way in DISTILLATION else LAYOUTS[:4])
        for j, variant in enumerate(VARIANTS[way])
        if ranks == 4 or (i + j) % 2 == 0
    ]


def interpreted_cases() -> list[Case]:
    """Few, on two ranks: in Triton's interpreter a call takes a large part of a second."""
    found = [
        Case(2, way, layout, beta) for way in DISTILLATION for layout, beta in (("chunk", 0.4), ("idle", "tensor"))
    ]
    found += [Case(2, "balanced", "zero", 0.0), Case(2, "min", "zero", 1.0), Case(2, "rows", "shared", 1.0)]
    found += [Case(2, "tokens", layout, 0) for layout in ("chunk", "zero")]
    found += [Case(2, "topk", "chunk", "bucket"), Case(2, "topk", "idle", "ignore")]
    return [*found, Case(2, "confidence", "fewer", "cross_entropy"), Case(2, "confidence", "zero", "expected_brier")]


def rows_per_rank(layout: str, ranks: int) -> list[int]:
    if layout == "zero":
        return {2: [0, VOCAB], 4: [10, 0, 14, 5]}[ranks]
    return [len(part) for part in torch.arange(VOCAB).chunk(ranks)]


class Inputs(NamedTuple):
    """Whole tensors of a case, and its options."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None
    labels: Tensor | None
    weights: Tensor | None
    live: Tensor  # the weights that count, [N]
    mix: Tensor  # what flows into statistics per row, [3, N]
    options: dict[str, Any]  # of student and teacher
    chunk: int | None
    mean: bool
    vocab_size: int | None
    rows: list[int]  # of the student, on each rank
    teacher_rows: list[int]
    listed: tuple[Tensor, Tensor]  # ids and log-probabilities
    target: Tensor

    @property
    def vocab(self) -> int:
        """Ids that are compared."""
        return VOCAB if self.vocab_size is None else self.vocab_size


def make(case: Case, seed: int = 0) -> Inputs:
    """Inputs of a case; what it does not fix is drawn, the same on every rank."""
    draw = random.Random(f"{case.name} {seed}")
    g = torch.Generator().manual_seed(draw.randrange(1 << 30))
    dtype = draw.choice([torch.float64, torch.float64, torch.float32, torch.float32, torch.bfloat16])
    rows = rows_per_rank(case.layout, case.ranks)
    last = max(r for r, n in enumerate(rows) if n)
    vocab_size = {"fewer": VOCAB - 3, "idle": sum(rows[:last]), "longer": VOCAB}.get(case.layout)
    more = MORE if case.layout == "longer" else 0
    h_t = H if case.layout == "shared" else H_T

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)

    hidden, weight, teacher_hidden = normal(N, H), normal(VOCAB, H, scale=0.6), normal(N, h_t)
    teacher_weight = weight if case.layout == "shared" else normal(VOCAB + more, h_t, scale=0.6)
    affine, capped = draw.random() < 0.6, draw.random() < 0.5
    vocab = vocab_size or VOCAB
    labels: Tensor | None = torch.randint(0, vocab, (N,), generator=g)
    labels[0], labels[1] = 0, vocab - 1
    kind = draw.choice(["all", "zeros", "labels", "unlabelled"])
    weights, live = None, torch.ones(N, dtype=torch.float64)
    if kind == "labels":
        labels[2] = labels[5] = -100
        if case.way != "confidence":
            live[2] = live[5] = 0
    if kind == "zeros":
        weights = torch.tensor([1.0, 0, 0.5, 2, 0, 1, 1])
        live = weights.double()
        hidden[1], hidden[4], teacher_hidden[4] = math.nan, math.inf, math.nan
    if kind == "unlabelled":
        labels = None
    options = {
        "student_scale": draw.choice([0.6, 1.4]) if affine else 1.0,
        "teacher_scale": 1.3 if affine else 1.0,
        "student_softcap": 4.0 if capped else None,
        "teacher_softcap": draw.choice([None, 5.0]) if capped else None,
        "temperature": draw.choice([0.8, 1.7]) if capped else 1.0,
    }
    teacher_logprobs = torch.randn(N, vocab, generator=g, dtype=torch.float64).log_softmax(-1)
    ids = teacher_logprobs.topk(5).indices
    listed = teacher_logprobs.gather(-1, ids).to(torch.float64 if dtype == torch.float64 else torch.float32)
    return Inputs(
        hidden, weight, normal(VOCAB) if affine else None,
        teacher_hidden, teacher_weight, normal(VOCAB + more) if affine else None,
        labels, weights, live, torch.randn(3, N, generator=g, dtype=torch.float64), options,
        draw.choice([None, 3, 2]), draw.random() < 0.5, vocab_size,
        rows, [*rows[:-1], rows[-1] + more], (ids, listed), torch.rand(N, generator=g),
    )  # fmt: skip


class Leaves(NamedTuple):
    """What gets gradients."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def cut(tensor: Tensor | None, rows: list[int], rank: int) -> Tensor | None:
    """Copies of this rank's rows."""
    return None if tensor is None else tensor.split(rows)[rank].clone()


def call(
    case: Case, i: Inputs, rank: int | None = None, group: Any = None, backend: str = "torch"
) -> tuple[Leaves, Any, Tensor]:
    """Leaves, output and the scalar to differentiate, on one rank's rows; on whole heads without a ``rank``."""
    weight, bias, teacher_weight, teacher_bias = i.weight.clone(), i.bias, i.teacher_weight, i.teacher_bias
    if rank is not None:
        weight, bias = cut(i.weight, i.rows, rank), cut(i.bias, i.rows, rank)
        teacher_weight = cut(teacher_weight, i.teacher_rows, rank)
        teacher_bias = cut(teacher_bias, i.teacher_rows, rank)
    elif bias is not None:
        bias = bias.clone()
    leaves = Leaves(
        i.hidden.clone().requires_grad_(), weight.requires_grad_(), None if bias is None else bias.requires_grad_()
    )
    options = {**i.options, "process_group": group, "backend": backend}
    options |= {"weights": i.weights, "vocab_size": i.vocab_size, "chunk_size": i.chunk}
    reduction = {"reduction": "mean" if i.mean else "sum"}
    if case.distils:
        both = (leaves.hidden, leaves.weight, i.teacher_hidden)
        both += (leaves.weight if case.layout == "shared" else teacher_weight, i.labels)
        options |= {"student_bias": leaves.bias, "teacher_bias": teacher_bias, "beta": _beta(case.variant)}
        if case.way == "rows":
            out = linear_distillation_rows(*both, **options)
            return leaves, out, _mixed(i, (out.divergence, out.student_logprob, out.student_entropy))
        out = linear_distillation_loss(*both, memory=case.way, **reduction, **options)
        return leaves, out, UPSTREAM * out.loss
    options = {k: v for k, v in options.items() if not k.startswith("teacher_")}
    if case.way == "topk":
        out = linear_topk_distillation_loss(
            leaves.hidden, leaves.weight, *i.listed, i.labels, student_bias=leaves.bias, tail=case.variant,
            beta=0.4 if i.mean else 1.0, **reduction, **options,
        )  # fmt: skip
        return leaves, out, UPSTREAM * out.loss
    options = {k.removeprefix("student_"): v for k, v in options.items()}
    if case.way == "tokens":
        out = linear_token_statistics(leaves.hidden, leaves.weight, i.labels, bias=leaves.bias, **options)
        return leaves, out, _mixed(i, (out.entropy, out.logprob, out.lse))
    out = linear_confidence_loss(
        leaves.hidden, leaves.weight, _ids(i), VALUES, i.target, bias=leaves.bias, kind=case.variant,
        outside_weight=0.7, **reduction, **options,
    )  # fmt: skip
    return leaves, out, UPSTREAM * out.loss + _mixed(i, (out.expected, out.variance, out.outside_mass))


def truth(case: Case, i: Inputs) -> tuple[Leaves, dict[str, Tensor], Tensor]:
    """The same in float64, from the definitions and torch's own autograd."""
    safe = torch.where((i.live > 0).view(-1, 1), i.hidden.double(), 0.0).requires_grad_()
    weight = i.weight.double().requires_grad_()
    bias = None if i.bias is None else i.bias.double().requires_grad_()
    raw = (safe @ weight.t() + (0 if bias is None else bias)) * i.options["student_scale"]
    raw = raw[:, : i.vocab]
    leaves, live = Leaves(safe, weight, bias), i.live > 0
    options = {k: i.options[k] for k in ("temperature", "student_softcap")}
    mean = 1.0 if i.mean else i.live.sum()
    if case.distils:
        t_hidden = torch.where(live.view(-1, 1), i.teacher_hidden.double(), 0.0)
        teacher = t_hidden @ i.teacher_weight.double().t() + (0 if i.teacher_bias is None else i.teacher_bias.double())
        teacher = (teacher * i.options["teacher_scale"])[:, : i.vocab]
        options |= {"teacher_softcap": i.options["teacher_softcap"], "beta": _beta(case.variant)}
        names = ("divergence", "student_logprob", "teacher_logprob", "student_entropy", "teacher_entropy")
        found = dict(zip(names, statistics(raw, teacher, i.labels, **options), strict=True))
        if case.way == "rows":
            total = _mixed(i, [found[n] for n in ("divergence", "student_logprob", "student_entropy")])
        else:
            found["loss"] = weighted_mean(found["divergence"], i.live) * mean
            total = UPSTREAM * found["loss"]
    elif case.way == "topk":
        found = topk_truth(raw, *i.listed, i.labels, tail=case.variant, beta=0.4 if i.mean else 1.0, **options)
        found["loss"] = weighted_mean(found["divergence"], i.live) * mean
        total = UPSTREAM * found["loss"]
    elif case.way == "tokens":
        options["softcap"] = options.pop("student_softcap")
        found = _token_truth(raw, i.labels, **options)
        total = _mixed(i, (found["entropy"], found["logprob"], found["lse"]))
    else:
        options["softcap"] = options.pop("student_softcap")
        out = confidence_loss(
            raw, _ids(i), VALUES, i.target, kind=case.variant, outside_weight=0.7, weights=i.weights,
            reduction="mean" if i.mean else "sum", **options,
        )  # fmt: skip
        found = out._asdict()
        total = UPSTREAM * out.loss + _mixed(i, (out.expected, out.variance, out.outside_mass))
    found = {k: v for k, v in found.items() if v is not None and not (i.labels is None and "logprob" in k)}
    return leaves, {k: v if v.ndim == 0 else torch.where(live, v, 0.0) for k, v in found.items()}, total


def _token_truth(raw: Tensor, labels: Tensor | None, temperature: float, softcap: float | None) -> dict[str, Tensor]:
    z = raw if softcap is None else softcap * torch.tanh(raw / softcap)
    logs = (z / temperature).log_softmax(-1)
    ids = torch.zeros(N, dtype=torch.int64) if labels is None else labels
    picked = logs.gather(-1, ids.clamp(min=0).view(-1, 1)).view(-1)
    return {
        "logprob": torch.where(ids == -100, 0.0, picked),
        "entropy": -(logs.exp() * logs).sum(-1),
        "lse": (z / temperature).logsumexp(-1),
    }


def _mixed(i: Inputs, columns: Any) -> Tensor:
    """A scalar in which something other than 1 flows into every column; without labels none into the second."""
    terms = []
    for place, (mix, column) in enumerate(zip(i.mix, columns, strict=True)):
        if column is not None and not (place == 1 and i.labels is None):
            terms.append(torch.where(i.live > 0, mix * column.double(), 0.0).sum())
    return sum(terms)


def _beta(variant: Any) -> Any:
    return torch.tensor([0.0, 1, 1, 0, 1, 0, 0]) if variant == "tensor" else variant


def _ids(i: Inputs) -> list[int]:
    return [k % i.vocab for k in IDS]


def fields(out: Any) -> dict[str, Tensor]:
    return {k: v.detach() for k, v in out._asdict().items() if v is not None}


def trouble(case: Case, i: Inputs, leaves: Leaves, out: Any, rank: int | None) -> list[str]:
    """What is wrong with an output, and with the gradients that its scalar left in the leaves."""
    want_leaves, want, total = truth(case, i)
    total.backward()
    wrong = []
    got, tolerance = fields(out), VALUE_TOLERANCE[i.hidden.dtype]
    if set(got) != set(want):
        wrong.append(f"fields {sorted(got)}, not {sorted(want)}")
    for name in set(got) & set(want):
        expected = want[name].detach()  # NaN: a top-k teacher's log-probability of an id that it does not list
        if not torch.allclose(got[name].double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True):
            wrong.append(f"{name} is {got[name].tolist()}, not {expected.tolist()}")
    for name, leaf, want_leaf in zip(Leaves._fields, leaves, want_leaves, strict=True):
        if leaf is None:
            continue
        full = want_leaf.grad
        part = full if rank is None or name == "hidden" else full.split(i.rows)[rank]
        bound = GRADIENT_TOLERANCE[leaf.dtype] * (part.abs() + 0.02 * full.abs().max())
        error = (leaf.grad.double() - part).abs()
        if leaf.grad.dtype != leaf.dtype or not bool((error <= bound).all()):
            wrong.append(f"gradient of {name} is off by {error.max() if error.numel() else 0}, of {full.abs().max()}")
    if not bool((leaves.hidden.grad[i.live == 0] == 0).all()):
        wrong.append("rows of weight 0 have a gradient")
    return wrong


def digest(*tensors: Tensor | None) -> str:
    """The bits of tensors."""
    sha = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            sha.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]
