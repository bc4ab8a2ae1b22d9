"""The correctness stage of the benchmarks: it passes here, and it fails where a loss or a kernel is slightly wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import interpreted  # noqa: E402

import caop_fast  # noqa: E402
from benchmarks import correctness  # noqa: E402
from benchmarks.cases import tiny  # noqa: E402
from benchmarks.checks import definitions  # noqa: E402
from benchmarks.checks.trial import SIZES, Setting, Trial  # noqa: E402
from benchmarks.inputs import make  # noqa: E402
from benchmarks.truth import truth  # noqa: E402

CPU = torch.device("cpu")
SETTING = Setting(CPU, "torch", SIZES["small"])
TRIALS = correctness.trials("small")
FUNCTIONS = tuple(name for name in caop_fast.__all__ if name.islower() and name.isidentifier() and name[0] != "_")
GRADIENTS = tuple(f for f in FUNCTIONS if not f.endswith("_state") and f not in ("merge_states", "calibration_bins"))
NOTHING = ("n 0", "weights zero", "flows none")  # in the name of a check whose gradients are all 0, or none


def of(function: str) -> list[Trial]:
    return [t for t in TRIALS if function in t.name.split(":")[0].split(", ")]


def failure(trial: Trial) -> str:
    """Why a check fails; "" when it passes."""
    check, _ = correctness._run(trial, SETTING)
    return check.detail if check.outcome == "failed" else ""


def replaced(monkeypatch: pytest.MonkeyPatch, function: str, change) -> None:
    """``change(original, arguments, options)`` is called in place of the public function."""
    original = getattr(caop_fast, function)
    monkeypatch.setattr(caop_fast, function, lambda *arguments, **options: change(original, arguments, options))


def mapped(change, arguments: tuple, options: dict) -> tuple[list, dict]:
    """``change`` of every tensor among the arguments, the same for the same tensor."""
    seen: dict[int, torch.Tensor] = {}

    def one(value):
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in seen:
            seen[id(value)] = change(value)
        return seen[id(value)]

    return [one(a) for a in arguments], {name: one(value) for name, value in options.items()}


class Bent(torch.autograd.Function):
    """The identity, but for the gradient."""

    @staticmethod
    def forward(ctx, x, bend):
        ctx.bend = bend
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.bend(gradient.clone()), None


def bending(bend, which: int | None = None):
    """Bends the gradients of all tensors that have one, or of one of them. Counts how often."""
    count = [0]

    def change(original, arguments, options):
        number = iter(range(99))

        def one(tensor):
            if not tensor.requires_grad or which not in (None, next(number)):
                return tensor
            count[0] += 1
            return Bent.apply(tensor, bend)

        arguments, options = mapped(one, arguments, options)
        return original(*arguments, **options)

    return change, count


def test_everything_passes_in_plain_pytorch():
    seen = []
    found = correctness.check_losses(CPU, "torch", sizes="small", deadline=None, report=seen.append)
    summary = correctness.summary(found)
    assert summary == {"passed": len(TRIALS), "failed": 0, "skipped": 0, "failures": [], "skips": {}}
    assert seen == found
    assert len({c.name for c in found}) == len(found)
    assert all(of(function) for function in FUNCTIONS), "a public loss without a check"
    assert len(correctness.trials("full")) > len(TRIALS)


@pytest.mark.slow
def test_everything_passes_in_the_interpreter():
    reason = interpreted.reason_to_skip()
    if reason is not None:
        pytest.skip(reason)
    code = (
        "import json, torch; from benchmarks import correctness as c; found = c.check_losses(torch.device('cpu'), "
        "'triton', sizes='small', deadline=None); print(json.dumps(c.summary(found)))"
    )
    environment = {**interpreted.environment(), "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["failures"] == []
    assert summary["passed"] == len(TRIALS)


@pytest.mark.parametrize("which", [None, 0, 1, 2], ids=["all", "first", "second", "third"])
@pytest.mark.parametrize("function", GRADIENTS)
def test_a_gradient_wrong_by_a_hundredth_fails_every_check_of_it(monkeypatch, function, which):
    change, count = bending(lambda g: (g.double() * 1.01).to(g.dtype), which)
    replaced(monkeypatch, function, change)
    passed = []
    for trial in of(function):
        count[0] = 0
        found = failure(trial)
        if count[0] and not any(word in trial.name for word in (*NOTHING, "no answers")):
            passed += [] if "gradient of" in found else [(trial.name, found)]
    assert not passed


@pytest.mark.parametrize("function", GRADIENTS)
def test_a_gradient_lost_in_the_last_row_or_column_fails(monkeypatch, function):
    def no_last_row(gradient):
        gradient[-1:] = 0
        return gradient

    def no_last_column(gradient):
        gradient[..., -1:] = 0
        return gradient

    for bend in (no_last_row, no_last_column):
        with monkeypatch.context() as patch:
            replaced(patch, function, bending(bend)[0])
            assert sum("gradient of" in failure(trial) for trial in of(function)) >= 2, bend


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_statistic_wrong_by_a_thousandth_fails(monkeypatch, function):
    """Each field of the output by itself; of states, each number."""
    original = getattr(caop_fast, function)
    if function in ("row_state", "merge_states"):
        fields = [0, 4, 7, 10]  # a maximum, a sum, a moment, a label
    else:
        fields = {
            "soft_ece": ["error"], "calibration_bins": ["confidence_sum", "correct_sum"],
            "finish_state": list(caop_fast.RowStatistics._fields),
            "token_statistics": list(caop_fast.TokenStatistics._fields),
        }.get(function.removeprefix("linear_"))  # fmt: skip
        if fields is None:
            output = caop_fast.ConfidenceOutput if "confidence" in function else caop_fast.DistillationOutput
            fields = [f for f in output._fields if f != "loss" or function != "linear_distillation_rows"]

    def wrong(field):
        def change(_, arguments, options):
            found = original(*arguments, **options)
            if isinstance(field, int):
                found[field] = found[field] * 1.001
                return found
            if isinstance(found, torch.Tensor):
                return found * 1.001
            value = getattr(found, field)
            return found if value is None else found._replace(**{field: value * 1.001})

        return change

    for field in fields:
        with monkeypatch.context() as patch:
            replaced(patch, function, wrong(field))
            assert sum(bool(failure(trial)) for trial in of(function)) >= 2, field


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("function", ["distillation_loss", "linear_distillation_loss"])
def test_a_wrong_divergence_of_near_models_fails(monkeypatch, function, factor):
    """It is as small as the error of plain PyTorch in float32."""

    def change(original, arguments, options):
        found = original(*arguments, **options)
        return found._replace(divergence=factor * found.divergence)

    replaced(monkeypatch, function, change)
    near = [t for t in of(function) if "logits near" in t.name]
    assert len(near) >= 2
    assert [t.name for t in near if not failure(t)] == []


LABELLED = ("distillation_loss", "linear_distillation_loss", "linear_distillation_rows", "topk_distillation_loss")


@pytest.mark.parametrize("function", [*LABELLED, "token_statistics", "linear_token_statistics", "row_state"])
def test_shifted_labels_fail(monkeypatch, function):
    def change(original, arguments, options):
        arguments = [
            torch.where(a < 0, a, (a - 1).clamp(min=0)) if isinstance(a, torch.Tensor) and a.dtype == torch.int64 else a
            for a in arguments
        ]
        return original(*arguments, **options)

    replaced(monkeypatch, function, change)
    with_labels = [t for t in of(function) if ", labels" in t.name and not any(w in t.name for w in NOTHING[:2])]
    assert with_labels
    assert [t.name for t in with_labels if not failure(t)] == []


@pytest.mark.parametrize("function", [f for f in GRADIENTS if f != "soft_ece"])
def test_rows_of_weight_0_that_leak_fail(monkeypatch, function):
    def change(original, arguments, options):
        if options.get("weights") is not None:
            options["weights"] = options["weights"].clamp(min=1e-3)
        number = options.get("weights")

        def one(tensor):
            return tensor.nan_to_num(0.5) if tensor.is_floating_point() and tensor is not number else tensor

        arguments, options = mapped(one, arguments, options)
        return original(*arguments, **options)

    replaced(monkeypatch, function, change)
    masked = [t for t in of(function) if "weights nan" in t.name]
    assert masked
    assert [t.name for t in masked if not failure(t)] == []


@pytest.mark.parametrize(
    ("function", "option", "value"),
    [
        ("distillation_loss", "beta", 0.31),
        ("linear_distillation_loss", "beta", 0.31),
        ("topk_distillation_loss", "temperature", 0.701),
        ("linear_topk_distillation_loss", "student_softcap", 9.01),
        ("confidence_loss", "outside_weight", 1.001),
        ("token_statistics", "temperature", 0.701),
    ],
)
def test_an_option_slightly_off_fails(monkeypatch, function, option, value):
    def change(original, arguments, options):
        near = isinstance(options.get(option), float) and 0 < abs(options[option] - value) < 0.02
        return original(*arguments, **({**options, option: value} if near else options))

    replaced(monkeypatch, function, change)
    assert any(failure(trial) for trial in of(function))


@pytest.mark.parametrize("case", [c for c in tiny() if c.suite not in ("topk", "linear-topk")], ids=lambda c: c.suite)
def test_the_definitions_agree_with_the_other_truth(case):
    """Two float64 versions, written apart, of the loss and of its gradient in the logits."""
    given = make(case, CPU)
    want = truth(given)
    if case.linear:
        z = (given.hidden.detach().double() @ given.weight.detach().double().t()).requires_grad_()
    else:
        z = given.student.detach().double().requires_grad_()
    kind = case.suite.removeprefix("linear-")
    if kind == "confidence":
        log_p = definitions.log_softmax(z)[:, given.candidate_ids]
        loss = definitions.confidence(
            log_p, given.candidate_values, given.target, None, kind="cross_entropy", outside_weight=1.0, eps=1e-6,
            reduction="mean",
        )["loss"]  # fmt: skip
    elif kind == "tokens":
        logprob = definitions.tokens(z, given.labels, None, temperature=1.0, softcap=None)["logprob"]
        loss = -logprob.sum() / (given.labels != -100).sum()
    else:
        teacher = (
            given.teacher
            if given.teacher is not None
            else given.teacher_hidden.double() @ (given.teacher_weight.double().t())
        )
        loss = definitions.dense(
            z, teacher, given.labels, None, beta=case.beta, temperature=1.0, student_softcap=None,
            teacher_softcap=None, reduction="mean",
        )["loss"]  # fmt: skip
    torch.testing.assert_close(loss, want.loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], want.dlogits, rtol=1e-8, atol=1e-14)


def test_the_deadline_skips_what_is_left():
    assert {c.outcome for c in correctness.check_losses(CPU, "torch", sizes="small", deadline=0.0)} == {"skipped"}
    seen = []
    deadline = time.monotonic() + 0.3
    found = correctness.check_losses(CPU, "torch", sizes="small", deadline=deadline, report=seen.append)
    summary = correctness.summary(found)
    assert summary["passed"] > 0
    assert summary["skips"] == {correctness.OUT_OF_TIME: len(TRIALS) - summary["passed"]}
    assert seen == found


def stage(monkeypatch: pytest.MonkeyPatch, *runs) -> list[correctness.Check]:
    monkeypatch.setattr(correctness, "trials", lambda _: [Trial(f"check {i}", run) for i, run in enumerate(runs)])
    return correctness.check_losses(CPU, "torch", sizes="small", deadline=None)


def raises(error: BaseException):
    def run(_):
        raise error

    return run


def test_an_exception_fails_its_check_only(monkeypatch):
    found = stage(
        monkeypatch, raises(ZeroDivisionError("of all things")), lambda _: None, raises(torch.OutOfMemoryError())
    )
    assert [c.outcome for c in found] == ["failed", "passed", "failed"]
    assert "ZeroDivisionError: of all things" in found[0].detail
    assert "raise error" in found[0].detail
    assert correctness.summary(found)["failures"][0] == f"check 0: {found[0].detail}"
    with pytest.raises(KeyboardInterrupt):
        stage(monkeypatch, raises(KeyboardInterrupt()))


def test_a_dead_device_skips_the_rest(monkeypatch):
    error = RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    alive = iter([True, False])
    monkeypatch.setattr(correctness, "alive", lambda device: next(alive))
    found = stage(monkeypatch, raises(ValueError("harmless")), raises(error), lambda _: None, lambda _: None)
    assert [c.outcome for c in found] == ["failed", "failed", "skipped", "skipped"]
    assert correctness.summary(found)["skips"] == {"the device is dead since check 1": 2}
