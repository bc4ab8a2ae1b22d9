"""The module forms: the functions with their options fixed."""

from __future__ import annotations

import inspect

import pytest
import torch

import caop_fast

PAIRS = {
    "LinearDistillationLoss": "linear_distillation_loss",
    "LinearDistillationRows": "linear_distillation_rows",
    "LinearTopKDistillationLoss": "linear_topk_distillation_loss",
    "LinearTokenStatistics": "linear_token_statistics",
    "LinearConfidenceLoss": "linear_confidence_loss",
}
G = torch.Generator().manual_seed(0)
H_S, W_S, B_S, H_T, W_T = (torch.randn(*s, generator=G) for s in ((5, 8), (20, 8), (20,), (5, 6), (20, 6)))
LABELS = torch.tensor([1, 2, 3, -100, 19])
TOP = (H_T @ W_T.t()).log_softmax(-1).topk(3)


@pytest.mark.parametrize("name", PAIRS)
def test_every_option_and_tensor_of_the_function_is_there(name):
    """With the same default."""
    cls, function = getattr(caop_fast, name), getattr(caop_fast, PAIRS[name])
    fixed = inspect.signature(cls.__init__).parameters
    called = inspect.signature(cls.forward).parameters
    for argument, parameter in inspect.signature(function).parameters.items():
        holders = [p[argument] for p in (fixed, called) if argument in p]
        assert holders, argument
        assert holders[0].default == parameter.default, argument
    assert set(fixed) | set(called) == {"self", *inspect.signature(function).parameters}


def test_signatures_are_split_between_init_and_call():
    def shown(function) -> list[tuple]:
        return [(p.name, p.kind.name[0], p.default) for p in inspect.signature(function).parameters.values()]

    none, word = inspect.Parameter.empty, "K"
    run = [("logits_dtype", word, None), ("chunk_size", word, None)]
    last = [("process_group", word, None), ("backend", word, "auto"), ("validate", word, None)]
    assert shown(caop_fast.LinearTopKDistillationLoss) == [
        ("student_scale", word, 1.0), ("student_softcap", word, None), ("tail", word, "bucket"), ("beta", word, 0.0),
        ("temperature", word, 1.0), ("vocab_size", word, None), ("reduction", word, "mean"), *run, *last,
    ]  # fmt: skip
    assert shown(caop_fast.LinearTopKDistillationLoss.forward) == [
        ("self", "P", none), ("student_hidden", "P", none), ("student_weight", "P", none), ("teacher_ids", "P", none),
        ("teacher_logprobs", "P", none), ("labels", "P", None), ("student_bias", word, None), ("weights", word, None),
        ("beta", word, None),
    ]  # fmt: skip
    assert shown(caop_fast.LinearConfidenceLoss) == [
        ("candidate_ids", "P", none), ("candidate_values", "P", none), ("scale", word, 1.0), ("softcap", word, None),
        ("kind", word, "cross_entropy"), ("outside_weight", word, 1.0), ("reduction", word, "mean"),
        ("temperature", word, 1.0), ("vocab_size", word, None), ("eps", word, 1e-6), *run, *last,
    ]  # fmt: skip
    assert shown(caop_fast.LinearConfidenceLoss.forward)[1:] == [
        ("hidden", "P", none), ("weight", "P", none), ("target", "P", none), ("bias", word, None),
        ("weights", word, None),
    ]  # fmt: skip


def test_arguments_that_are_not_in_the_signature():
    module = caop_fast.LinearTokenStatistics()
    for wrong in ({"temperatur": 2.0}, {"bias": B_S}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            caop_fast.LinearTokenStatistics(**wrong)
    with pytest.raises(TypeError, match="positional"):
        caop_fast.LinearTokenStatistics(1.0)
    with pytest.raises(TypeError, match="positional"):
        module(H_S, W_S, LABELS, B_S)
    with pytest.raises(TypeError, match="labels"):
        module(H_S, W_S)
    for wrong in ({"temperature": 2.0}, {"beta": torch.ones(5)}, {"hidden": H_S}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            module(H_S, W_S, LABELS, **wrong)


def test_a_subclass_of_the_caller():
    class Halved(caop_fast.LinearDistillationLoss):
        def __init__(self) -> None:
            super().__init__(temperature=2.0)

        def forward(self, *tensors):
            return super().forward(*tensors).loss / 2

    want = caop_fast.linear_distillation_loss(H_S, W_S, H_T, W_T, LABELS, temperature=2.0).loss / 2
    assert torch.equal(Halved()(H_S, W_S, H_T, W_T, LABELS), want)
    assert repr(Halved()) == "Halved(temperature=2.0)"


def test_they_compile_as_a_whole():
    torch.compiler.reset()
    beta = torch.tensor([0.0, 1, 0, 1, 1])
    module = caop_fast.LinearDistillationLoss(student_softcap=5.0)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    want = module(H_S, W_S, H_T, W_T, LABELS, beta=beta)
    assert equal(compiled(H_S, W_S, H_T, W_T, LABELS, beta=beta), want)
    module = caop_fast.LinearConfidenceLoss([3, 4], [0.1, 0.85])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert equal(compiled(H_S, W_S, beta), module(H_S, W_S, beta))


def equal(got, want) -> bool:
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_they_do_what_the_functions_do():
    options = {"student_scale": 0.5, "beta": 0.4, "temperature": 1.5, "student_softcap": 9.0, "vocab_size": 20}
    tensors = {"student_bias": B_S, "weights": torch.tensor([1.0, 0, 2, 1, 1])}
    for name in ("LinearDistillationLoss", "LinearDistillationRows"):
        module = getattr(caop_fast, name)(**options)
        want = getattr(caop_fast, PAIRS[name])(H_S, W_S, H_T, W_T, LABELS, **tensors, **options)
        assert equal(module(H_S, W_S, H_T, W_T, LABELS, **tensors), want)
    module = caop_fast.LinearTopKDistillationLoss(tail="ignore", beta=1.0, reduction="sum")
    want = caop_fast.linear_topk_distillation_loss(
        H_S, W_S, TOP[1], TOP[0], student_bias=B_S, tail="ignore", beta=1.0, reduction="sum"
    )
    assert equal(module(H_S, W_S, TOP[1], TOP[0], student_bias=B_S), want)
    module = caop_fast.LinearTokenStatistics(scale=2.0, softcap=7.0)
    want = caop_fast.linear_token_statistics(H_S, W_S, LABELS, bias=B_S, scale=2.0, softcap=7.0)
    assert equal(module(H_S, W_S, LABELS, bias=B_S), want)
    target = torch.linspace(0, 1, 5)
    module = caop_fast.LinearConfidenceLoss([3, 4, 5], [0.1, 0.5, 0.85], kind="brier", outside_weight=0.3)
    want = caop_fast.linear_confidence_loss(
        H_S, W_S, [3, 4, 5], [0.1, 0.5, 0.85], target, kind="brier", outside_weight=0.3, bias=B_S
    )
    assert equal(module(H_S, W_S, target, bias=B_S), want)


def test_beta_per_token_at_the_call():
    beta = torch.tensor([0.0, 1, 0, 1, 1])
    module = caop_fast.LinearDistillationLoss(beta=0.3)
    want = caop_fast.linear_distillation_loss(H_S, W_S, H_T, W_T, beta=beta)
    assert equal(module(H_S, W_S, H_T, W_T, beta=beta), want)
    assert module.options["beta"] == 0.3


def test_candidates_move_with_the_module_and_keep_their_digits():
    module = caop_fast.LinearConfidenceLoss([3, 4], [0.1, 0.85])
    assert not module.state_dict()
    assert not list(module.parameters())
    outer = torch.nn.ModuleList([module]).to(torch.bfloat16)
    assert outer[0].candidate_values.tolist() == [0.1, 0.85]
    assert module.to("meta").candidate_ids.device.type == "meta"
    assert module.candidate_values.device.type == "meta"


def test_they_show_what_is_not_the_default():
    module = caop_fast.LinearDistillationLoss(beta=1.0, logits_dtype=torch.bfloat16)
    assert repr(module) == "LinearDistillationLoss(beta=1.0, logits_dtype=torch.bfloat16)"
    assert repr(caop_fast.LinearTokenStatistics()) == "LinearTokenStatistics()"


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ({"beta": 1.5}, ValueError), ({"beta": torch.tensor(0.5)}, TypeError), ({"beta": "x"}, TypeError),
        ({"temperature": 0.0}, ValueError),
        ({"student_softcap": -1.0}, ValueError), ({"teacher_scale": float("nan")}, ValueError),
        ({"reduction": "none"}, ValueError), ({"memory": "small"}, ValueError), ({"backend": "cuda"}, ValueError),
        ({"chunk_size": 0}, ValueError), ({"vocab_size": 2.5}, TypeError), ({"logits_dtype": "bf16"}, TypeError),
        ({"process_group": 3}, TypeError), ({"validate": 1}, TypeError),
    ],
)  # fmt: skip
def test_a_wrong_option_is_refused_when_the_module_is_made(option, error):
    with pytest.raises(error, match=next(iter(option))):
        caop_fast.LinearDistillationLoss(**option)


def test_wrong_options_of_the_others():
    with pytest.raises(ValueError, match="tail"):
        caop_fast.LinearTopKDistillationLoss(tail="all")
    for option in ({"kind": "nll"}, {"eps": 0.7}, {"outside_weight": -1.0}, {"reduction": "max"}):
        with pytest.raises(ValueError, match=next(iter(option))):
            caop_fast.LinearConfidenceLoss([1, 2], [0.0, 1.0], **option)
    wrong = (([1, 2], [0.0], "values"), ([1, 1], [0.0, 1.0], "ids"), ([1, 2], [0.0, 85.0], "values"))
    for ids, values, word in wrong:
        with pytest.raises(ValueError, match=f"candidate_{word}"):
            caop_fast.LinearConfidenceLoss(ids, values)
    with pytest.raises(ValueError, match="candidate_ids"):
        caop_fast.LinearConfidenceLoss([1, 9], [0.0, 1.0], vocab_size=9)
