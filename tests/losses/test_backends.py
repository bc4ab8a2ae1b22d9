"""Both backends, the kernel in Triton's interpreter, against float64: offsets, excluded columns, strides, bad beta."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch

from helpers import backend_runs, interpreted
from helpers.backend_runs import BACKENDS, BETAS, EXCLUDED_PAIRS, NEAR, OFFSETS
from helpers.oracle import statistics

pytest.importorskip("triton", reason="Triton is not installed: there is one backend only")


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    reason = interpreted.reason_to_skip()
    if reason is not None:
        pytest.skip(reason)
    command = [sys.executable, "-m", "helpers.backend_runs"]
    run = subprocess.run(command, env=interpreted.environment(), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


def double(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("near", NEAR)
@pytest.mark.parametrize("offset", OFFSETS)
def test_a_common_offset_costs_no_digits(found, offset, near, beta, backend):
    """At 1e4 the log-sum-exp is rounded by 5e-4: a gradient of near rows cannot rest on it."""
    got = found["near"][str((offset, near, beta))][backend]
    student, teacher = backend_runs.near_rows(offset, near)
    student = student.double().requires_grad_()
    divergence = statistics(student, teacher, beta=beta)[0]
    divergence.mean().backward()
    torch.testing.assert_close(double(got["divergence"]), divergence.detach(), rtol=2e-6, atol=4e-8)
    assert (double(got["gradient"]) - student.grad).norm() < 5e-5 * student.grad.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", OFFSETS)
def test_entropy_gradient_with_an_offset(found, offset, backend):
    got = found["entropy"][str(offset)][backend]
    student, teacher = backend_runs.near_rows(offset, 0.3)
    student = student.double().requires_grad_()
    entropy = statistics(student, teacher)[3]
    entropy.sum().backward()
    torch.testing.assert_close(double(got["student_entropy"]), entropy.detach(), rtol=2e-6, atol=2e-6)
    assert (double(got["gradient"]) - student.grad).norm() < 5e-6 * student.grad.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("name", EXCLUDED_PAIRS)
def test_a_column_one_side_excludes(found, name, swap, beta, backend):
    """Infinite however small the other side's probability; 0 where both sides exclude, with masks of any kind."""
    got = found["excluded"][str((name, swap, beta))][backend]
    sides = [side.double().clamp(min=-(2.0**100)) for side in backend_runs.excluded_rows(name, swap)]
    gap = float(sides[1][0, 1] - sides[0][0, 1])  # teacher above student
    infinite = (beta == 0 and gap > 2.0**64) or (beta == 1 and gap < -(2.0**64))
    assert got["divergence"] == [math.inf] if infinite else math.isfinite(got["divergence"][0])
    if infinite:
        return
    student = sides[0].requires_grad_()
    divergence = statistics(student, sides[1], beta=beta)[0]
    divergence.sum().backward()
    torch.testing.assert_close(double(got["divergence"]), divergence.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(double(got["gradient"]), student.grad, rtol=2e-6, atol=2e-7)


def test_the_pairs_hold_both_outcomes(found):
    infinite = [
        name for name in EXCLUDED_PAIRS if found["excluded"][str((name, False, 0.0))]["torch"]["divergence"][0] > 1e30
    ]
    assert {"gap 0", "gap 100", "gap 110", "gap 300", "gap 1e+25", "mask, ordinary", "mask, underflow"} <= set(infinite)
    assert not {"mask, mask", "mask, other mask", "mask, -inf", "-inf, -inf", "-1e15, ordinary"} & set(infinite)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", list(backend_runs.strided_labels()))
def test_labels_of_any_stride(found, kind, backend):
    got = found["labels"][kind][backend]
    student, teacher = backend_runs.labelled_rows()
    student = student.double().requires_grad_()
    _, student_logprob, teacher_logprob, *_ = statistics(student, teacher, backend_runs.strided_labels()[kind])
    student_logprob.sum().backward()
    tolerance = {"rtol": 2e-6, "atol": 2e-6}
    torch.testing.assert_close(double(got["student_logprob"]), student_logprob.detach(), **tolerance)
    torch.testing.assert_close(double(got["teacher_logprob"]), teacher_logprob, **tolerance)
    torch.testing.assert_close(double(got["gradient"]), student.grad, **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unvalidated_beta_other_than_0_or_1_gives_nan_in_its_row(found, backend):
    got = found["beta"]["unvalidated"][backend]
    assert double(got["divergence"]).isnan().tolist() == [False, True, False, True]
    gradient = double(got["gradient"])
    assert gradient[[0, 2]].isfinite().all()
    assert gradient[[1, 3]].isnan().all()
