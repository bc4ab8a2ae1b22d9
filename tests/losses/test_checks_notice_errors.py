"""The checks of the losses pass in the interpreter, and fail if a loss is slightly wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import caop_fast
from helpers import interpreted
from helpers.loss_checks import CHECKS
from helpers.loss_checks.check import SIZES, Check, Setting

pytestmark = pytest.mark.long

DEVICE = Path(__file__).parent / "device"
SETTING = Setting(torch.device("cpu"), "torch", SIZES["small"])
SMALL = [check for check in CHECKS if not check.rare]
FUNCTIONS = tuple(name for name in caop_fast.__all__ if name.islower() and name.isidentifier() and name[0] != "_")
GRADIENTS = tuple(f for f in FUNCTIONS if not f.endswith("_state") and f not in ("merge_states", "calibration_bins"))
NOTHING = ("n 0", "weights zero", "flows none")  # in the name of a check whose gradients are all 0, or none

Call = Callable[..., Any]
Change = Callable[[Call, tuple[Any, ...], dict[str, Any]], Any]


def of(function: str) -> list[Check]:
    return [check for check in SMALL if function in check.name.split(":")[0].split(", ")]


def failure(check: Check) -> str:
    """Why a check fails; "" if it passes."""
    try:
        check.run(SETTING)
    except Exception as error:
        return str(error)
    return ""


def replaced(monkeypatch: pytest.MonkeyPatch, function: str, change: Change) -> None:
    """``change(original, arguments, options)`` is called in place of the public function."""
    original = getattr(caop_fast, function)
    monkeypatch.setattr(caop_fast, function, lambda *arguments, **options: change(original, arguments, options))


def mapped(
    change: Callable[[Tensor], Tensor], arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """``change`` of every tensor among the arguments, the same for the same tensor."""
    seen: dict[int, Tensor] = {}

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in seen:
            seen[id(value)] = change(value)
        return seen[id(value)]

    return [one(a) for a in arguments], {name: one(value) for name, value in options.items()}


class WrongGradient(torch.autograd.Function):
    """The identity with a gradient that is 1 % too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return (grad_output.double() * 1.01).to(grad_output.dtype)


def test_every_public_loss_has_checks() -> None:
    assert all(of(function) for function in FUNCTIONS)
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    assert 0 < len(SMALL) < len(CHECKS)


@pytest.mark.slow
def test_everything_passes_in_the_interpreter() -> None:
    reason = interpreted.reason_to_skip()
    if reason is not None:
        pytest.skip(reason)
    command = [sys.executable, "-m", "pytest", str(DEVICE), "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=interpreted.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("function", GRADIENTS)
@pytest.mark.parametrize("which", [None, 0, 1], ids=["all", "first", "second"])
def test_a_gradient_wrong_by_a_hundredth_fails(
    monkeypatch: pytest.MonkeyPatch, function: str, which: int | None
) -> None:
    """In every check with gradients, for each input by itself."""
    changed = [0]

    def change(original: Call, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        number = iter(range(99))

        def one(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad or which not in (None, next(number)):
                return tensor
            changed[0] += 1
            return WrongGradient.apply(tensor)

        arguments_, options = mapped(one, arguments, options)
        return original(*arguments_, **options)

    replaced(monkeypatch, function, change)
    passed = []
    for check in of(function):
        changed[0] = 0
        found = failure(check)
        if changed[0] and "gradient of" not in found and not any(word in check.name for word in NOTHING):
            passed.append((check.name, found))
    assert not passed


FIELDS: dict[str, tuple[str | int, ...]] = {
    "soft_ece": ("error",),
    "calibration_bins": ("confidence_sum", "correct_sum"),
    "finish_state": caop_fast.RowStatistics._fields,
    "token_statistics": caop_fast.TokenStatistics._fields,
    "linear_token_statistics": caop_fast.TokenStatistics._fields,
    "linear_distillation_rows": tuple(f for f in caop_fast.DistillationOutput._fields if f != "loss"),
    "row_state": (0, 4, 7, 10),  # a maximum, a sum, a moment, a label
    "merge_states": (0, 4, 7, 10),
}


def fields(function: str) -> tuple[str | int, ...]:
    output = caop_fast.ConfidenceOutput if "confidence" in function else caop_fast.DistillationOutput
    return FIELDS.get(function, output._fields)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_statistic_wrong_by_a_thousandth_fails(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    """Each field of the output by itself; of states, some of the numbers."""

    def wrong(field: str | int) -> Change:
        def change(original: Call, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
            found = original(*arguments, **options)
            if isinstance(field, int):
                found[field] = found[field] * 1.001
                return found
            if isinstance(found, Tensor):
                return found * 1.001
            value = getattr(found, field)
            return found if value is None else found._replace(**{field: value * 1.001})

        return change

    for field in fields(function):
        with monkeypatch.context() as patch:
            replaced(patch, function, wrong(field))
            assert sum(bool(failure(check)) for check in of(function)) >= 2, field


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("function", ["distillation_loss", "linear_distillation_loss"])
def test_a_wrong_divergence_of_near_models_fails(monkeypatch: pytest.MonkeyPatch, function: str, factor: float) -> None:
    """It is as small as the error of plain PyTorch in float32."""

    def change(original: Call, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        found = original(*arguments, **options)
        return found._replace(divergence=factor * found.divergence)

    replaced(monkeypatch, function, change)
    near = [check for check in of(function) if "logits near" in check.name]
    assert len(near) >= 2
    assert [check.name for check in near if not failure(check)] == []


@pytest.mark.parametrize("function", [f for f in GRADIENTS if f != "soft_ece"])
def test_rows_of_weight_0_that_leak_fail(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    def change(original: Call, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if options.get("weights") is not None:
            options["weights"] = options["weights"].clamp(min=1e-3)
        weights = options.get("weights")

        def one(tensor: Tensor) -> Tensor:
            return tensor.nan_to_num(0.5) if tensor.is_floating_point() and tensor is not weights else tensor

        arguments_, options = mapped(one, arguments, options)
        return original(*arguments_, **options)

    replaced(monkeypatch, function, change)
    masked = [check for check in of(function) if "weights nan" in check.name]
    assert masked
    assert [check.name for check in masked if not failure(check)] == []
