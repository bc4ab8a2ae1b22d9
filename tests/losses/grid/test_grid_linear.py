"""The linear distillation losses on every backend: all ways through, pairs of options, against float64 autograd."""

from __future__ import annotations

import zlib

import pytest
import torch
from torch import Tensor

from caop_fast import (
    linear_confidence_loss,
    linear_distillation_loss,
    linear_distillation_rows,
    linear_token_statistics,
    linear_topk_distillation_loss,
)
from caop_fast.losses.linear import chunking
from helpers.oracle import pairwise, statistics, weighted_mean

FIELDS = ("divergence", "student_logprob", "teacher_logprob", "student_entropy", "teacher_entropy")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
AXES: dict[str, list] = {
    "way": ["balanced", "min", "rows"],
    "dtype": list(DTYPES),
    "beta": [0.0, 0.3, 1.0, "rows"],
    "temperature": [0.7, 2.0],
    "softcap": [None, 6.0],
    "scale": [1.0, 0.5],
    "bias": [False, True],
    "heads": ["two", "shared", "sizes"],  # sizes: V_s != V_t and vocab_size
    "weights": ["unlabelled", "labels", "zeros"],
    "vocab": [8, 1031],
    "chunk": [None, 3],
}
COVER = pairwise(**AXES)
# GEMM and statistics in float32, relative to the largest value; float64 has room to spare.
VALUE = {torch.float64: 1e-11}
GRADIENT = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def make(case: dict, n: int, device: torch.device) -> tuple[dict[str, Tensor], dict, Tensor | None, Tensor]:
    """Tensors by name, options, weights of the rows, and which rows are alive."""
    g = torch.Generator().manual_seed(zlib.crc32(repr(sorted(case.items(), key=str)).encode()))
    dtype, vocab = DTYPES[case["dtype"]], case["vocab"]
    h_s, h_t = (20, 20) if case["heads"] == "shared" else (20, 12)
    v_t = vocab + 5 if case["heads"] == "sizes" else vocab

    def normal(*shape: int, factor: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * factor).to(dtype).to(device)

    t = {
        "student_hidden": normal(n, h_s),
        "student_weight": normal(vocab, h_s, factor=0.5),
        "teacher_hidden": normal(n, h_t),
        "teacher_weight": normal(v_t, h_t, factor=0.5),
        "student_bias": normal(vocab) if case["bias"] else None,
        "teacher_bias": normal(v_t) if case["bias"] else None,
    }
    if case["heads"] == "shared":
        t["teacher_weight"] = t["student_weight"]
    compared = vocab - 1 if case["heads"] == "sizes" else vocab
    labels = None
    if case["weights"] != "unlabelled":
        labels = torch.randint(0, compared, (n,), generator=g).to(device)
    live, weights = torch.ones(n, dtype=torch.bool), None
    if case["weights"] != "unlabelled" and n > 2:
        live[[1, n - 1]] = False
        if case["weights"] == "one":
            live[:] = torch.arange(n) == 2
        t["student_hidden"][~live], t["teacher_hidden"][~live] = torch.nan, torch.inf
        if case["weights"] == "labels":
            labels[~live] = -100
        else:
            weights = ((torch.rand(n, generator=g) + 0.25) * live).to(device)
    beta = torch.randint(0, 2, (n,), generator=g).float().to(device) if case["beta"] == "rows" else case["beta"]
    options = {
        "beta": beta,
        "temperature": case["temperature"],
        "student_softcap": case["softcap"],
        "student_scale": case["scale"],
        "teacher_scale": 1.25 * case["scale"],
        "vocab_size": compared if case["heads"] == "sizes" else None,
        "weights": weights,
    }
    return t, options, labels, live


def exact(t: dict[str, Tensor], options: dict, labels: Tensor | None, live: Tensor) -> tuple[list, dict[str, Tensor]]:
    """The five statistics, and float64 leaves that they are made of."""
    leaves = {}
    for name, value in t.items():
        leaves[name] = None if value is None else value.detach().cpu().double()
        if name.endswith("hidden"):
            leaves[name][~live] = 0.0
    sides = []
    for side in ("student", "teacher"):
        if side == "student":
            for name in ("hidden", "weight", "bias"):
                if leaves[f"{side}_{name}"] is not None:
                    leaves[f"{side}_{name}"].requires_grad_()
        z = (
            leaves[f"{side}_hidden"] @ leaves[f"{side}_weight"].detach().t()
            if side == "teacher"
            else (leaves["student_hidden"] @ leaves["student_weight"].t())
        )
        if leaves[f"{side}_bias"] is not None:
            z = z + leaves[f"{side}_bias"]
        sides.append((z * options[f"{side}_scale"])[:, : options["vocab_size"]])
    beta = options["beta"].cpu() if isinstance(options["beta"], Tensor) else options["beta"]
    found = statistics(
        *sides, None if labels is None else labels.cpu(), beta=beta, temperature=options["temperature"],
        student_softcap=options["student_softcap"],
    )  # fmt: skip
    return list(found), leaves


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where logits are recomputed, as few ids at a time as there may be: five blocks of 1031."""
    for budget in ("CPU_BLOCK_BYTES", "DEVICE_BLOCK_BYTES"):
        monkeypatch.setattr(chunking, budget, 0)


def complaints(case: dict, n: int, place, *, narrow: bool = False) -> list[str]:
    """What is wrong. ``narrow``: the gradient of the logits is rounded to the operands' dtype on its way."""
    t, options, labels, live = make(case, n, place.device)
    found, truth = exact(t, options, labels, live)
    leaves = {k: v.clone().requires_grad_() for k, v in t.items() if v is not None and k.startswith("student")}
    shared = {"teacher_weight": leaves["student_weight"]} if case["heads"] == "shared" else {}
    arguments = {**t, **leaves, **shared, "labels": labels, "backend": place.backend}
    chunk = case["chunk"]
    if chunk and case["way"] == "min":  # ids, not tokens
        chunk = case["vocab"] // 3 + 1
    arguments["chunk_size"] = chunk
    g = torch.Generator().manual_seed(1)
    if case["way"] == "rows":
        out = linear_distillation_rows(**arguments, **options)
        flows = (torch.rand(3, n, generator=g) + 0.5) * torch.tensor([[1.5], [-0.7], [0.4]])
        got, want = [], []
        for i, (name, value) in enumerate(
            zip(("divergence", "student_logprob", "student_entropy"), (0, 1, 3), strict=True)
        ):
            if found[value] is None:
                continue
            got.append((getattr(out, name) * flows[i].to(place.device)).sum())
            want.append((found[value] * flows[i].double())[live].sum())
        sum(got).backward()
        sum(want).backward()
        wrong = [] if out.loss is None else ["a loss from rows"]
    else:
        reduction = "sum" if case["chunk"] else "mean"
        out = linear_distillation_loss(**arguments, **options, memory=case["way"], reduction=reduction)
        (out.loss * -1.7).backward()
        weights = live.double() if options["weights"] is None else options["weights"].cpu().double()
        loss = weighted_mean(found[0], weights) * (weights.sum() if reduction == "sum" else 1)
        (loss * -1.7).backward()
        error = float((out.loss.detach().cpu().double() - loss.detach()).abs() / loss.detach().abs().clamp(min=1))
        wrong = [] if error <= 2e-5 else [f"loss off by {error}"]
        wrong += [
            f"{name} is differentiable" for name in FIELDS if labels is not None and getattr(out, name).requires_grad
        ]
    dtype = t["student_hidden"].dtype
    for name, value in zip(FIELDS, found, strict=True):
        if value is None:
            continue
        want = torch.where(live, value.detach(), 0.0)
        got = getattr(out, name).detach().cpu()
        error = ((got.double() - want).abs() / want.abs().clamp(min=1)).max()
        if not error <= VALUE.get(dtype, 2e-5):
            wrong.append(f"{name} off by {float(error)}")
    for name, leaf in leaves.items():
        want = truth[name].grad
        scale = want.abs().max().clamp(min=1e-30)
        error = (leaf.grad.cpu().double() - want).abs().max() / scale
        allowed = GRADIENT[dtype] * (2 if narrow or place.device.type != "cpu" else 1)
        if leaf.grad.dtype != dtype or not error <= allowed:
            wrong.append(f"gradient of {name} off by {float(error)} of its largest entry")
        if name == "student_hidden" and bool((leaf.grad.cpu()[~live] != 0).any()):
            wrong.append("gradient in rows of weight 0")
    return wrong


@pytest.mark.parametrize("way", AXES["way"])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_pairs_of_options_match_float64(place, dtype, way):
    cases = [case for case in COVER if (case["dtype"], case["way"]) == (dtype, way)]
    assert cases
    failures = [f"{case}: {what}" for case in cases for what in complaints(case, 7, place)]
    assert not failures, "\n".join(failures)


BASE = {
    "dtype": "fp32", "beta": 0.3, "temperature": 2.0, "softcap": 6.0, "scale": 0.5, "bias": True, "heads": "two",
    "weights": "zeros", "vocab": 37, "chunk": 16,
}  # fmt: skip


@pytest.mark.parametrize("way", AXES["way"])
@pytest.mark.parametrize("n", [1, 64, 515])
def test_any_number_of_tokens(place, n, way):
    """515 is not divided by the chunk; blocks of 13 ids do not divide 37."""
    if n > 64 and place.backend == "triton" and place.device.type == "cpu":
        pytest.skip("the interpreter takes a second per ten rows")
    assert not complaints({**BASE, "way": way}, n, place)


@pytest.mark.parametrize("way", AXES["way"])
def test_a_single_token_alive(place, way):
    assert not complaints({**BASE, "way": way, "weights": "one"}, 7, place)


@pytest.mark.parametrize("way", AXES["way"])
def test_no_tokens_and_none_alive(place, way):
    for n, weights in ((0, None), (5, torch.zeros(5, device=place.device))):
        t, options, _, _ = make({**BASE, "weights": "unlabelled"}, n, place.device)
        t["student_hidden"].fill_(torch.nan)
        leaves = {k: v.clone().requires_grad_() for k, v in t.items() if k.startswith("student")}
        options |= {"weights": weights, "backend": place.backend}
        if way == "rows":
            out = linear_distillation_rows(**{**t, **leaves}, **options)
            total = out.divergence.sum() + out.student_entropy.sum()
        else:
            out = linear_distillation_loss(**{**t, **leaves}, **options, memory=way)
            total = out.loss
        assert total == 0
        total.backward()
        assert all(leaf.grad.shape == leaf.shape and bool((leaf.grad == 0).all()) for leaf in leaves.values())


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inputs", [torch.float32, torch.float64])
def test_statistics_have_the_dtype_of_the_inputs_whatever_that_of_the_logits(place, inputs, logits_dtype):
    g = torch.Generator().manual_seed(0)
    h, w, b = (torch.randn(*s, generator=g, dtype=inputs).to(place.device) for s in ((5, 8), (37, 8), (37,)))
    labels = torch.arange(5, device=place.device)
    options = {"logits_dtype": logits_dtype, "backend": place.backend}
    leaf = h.clone().requires_grad_()
    ids, values = torch.tensor([1, 5], device=place.device), torch.tensor([0.0, 1.0], device=place.device)
    target = torch.full((5,), 0.4, device=place.device)
    listed = (h @ w.t()).log_softmax(-1).topk(3)
    outs = [
        linear_distillation_loss(leaf, w, h + 1, w, labels, student_bias=b, **options),
        linear_distillation_loss(leaf, w, h + 1, w, labels, memory="min", beta=0.5, **options),
        linear_distillation_rows(leaf, w, h + 1, w, labels, **options),
        linear_token_statistics(leaf, w, labels, **options),
        linear_topk_distillation_loss(leaf, w, listed[1], listed[0], listed[1][:, 0], **options),
        linear_confidence_loss(leaf, w, ids, values, target, **options),
    ]
    for out in outs:
        assert {field.dtype for field in out if field is not None} == {inputs}
        first = out[0] if out[0] is not None else out.divergence
        leaf.grad = None
        first.sum().backward()
        assert leaf.grad.dtype == inputs
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("way", ["balanced", "min"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_row_without_a_distribution_is_nan_and_no_other(place, way, beta):
    """A bias of -inf throughout excludes every id; a NaN hidden state spoils its own token."""
    t, options, _, _ = make({**BASE, "weights": "unlabelled", "bias": False}, 5, place.device)
    options |= {"beta": beta, "backend": place.backend, "memory": way, "reduction": "sum"}
    t["student_hidden"][2] = torch.nan
    leaf = t["student_hidden"].clone().requires_grad_()
    linear_distillation_loss(**{**t, "student_hidden": leaf}, **options).loss.backward()
    assert leaf.grad[2].isnan().all()
    assert leaf.grad[[0, 1, 3, 4]].isfinite().all()
    leaf = torch.ones_like(t["student_hidden"]).requires_grad_()
    t["student_bias"] = torch.full_like(t["student_weight"][:, 0], -torch.inf)
    out = linear_distillation_loss(**{**t, "student_hidden": leaf}, **{**options, "student_softcap": None})
    out.loss.backward()
    assert out.loss.isnan()
    assert leaf.grad.isnan().all()
