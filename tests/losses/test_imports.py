"""What importing costs, and the agreement of the backends (in processes of their own)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

import caop_fast


def run(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_caop_fast_does_not_import_torch():
    code = "import sys, caop_fast; dir(caop_fast); print('torch' in sys.modules, 'distillation_loss' in dir(caop_fast))"
    assert run(code).split() == ["False", "True"]


def test_lazy_names():
    for name in caop_fast.__all__:
        assert getattr(caop_fast, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = caop_fast.no_such_name
    namespace: dict = {}
    exec("from caop_fast import *", namespace)
    assert set(caop_fast.__all__) - {"__version__"} <= set(namespace)


def test_losses_do_not_need_triton():
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'triton':
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import torch, caop_fast
x = torch.randn(3, 5, requires_grad=True)
caop_fast.distillation_loss(x, torch.randn(3, 5)).loss.backward()
try:
    caop_fast.distillation_loss(x, x, backend='triton')
except ValueError as error:
    print('Triton' in str(error))
"""
    assert run(code).strip() == "True"


def test_triton_on_cpu_tensors_without_the_interpreter_is_a_clear_error():
    code = """
import torch, caop_fast
try:
    caop_fast.distillation_loss(torch.zeros(2, 4), torch.zeros(2, 4), backend='triton')
except ValueError as error:
    print(error)
"""
    assert "backend='triton'" in run(code, TRITON_INTERPRET="0")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_backends_agree():
    """The kernel in Triton's interpreter against the PyTorch code: values and gradients."""
    code = """
import math, torch
from caop_fast import distillation_loss, linear_distillation_loss
torch.manual_seed(0)
seen = 0
for beta in (0.0, 0.4, 1.0, torch.tensor([0.0, 1, 1, 0, 1, 0])):
    for dtype, cap, vocab in ((torch.float32, None, 1031), (torch.float32, 7.0, 64), (torch.bfloat16, None, 64)):
        s, t = (torch.randn(6, vocab) * 3).to(dtype), (torch.randn(6, vocab) * 3).to(dtype)
        if cap is None:
            s[2, 5] = t[2, 5] = -math.inf
        y = torch.randint(0, vocab - 3, (6,)); y[3] = -100
        w = torch.tensor([1.0, 0, 2, 1, 1, 1])
        s[1] = math.nan
        results = []
        for backend in ('torch', 'triton'):
            x = s.clone().requires_grad_()
            out = distillation_loss(x, t, y, beta=beta, temperature=0.8, student_softcap=cap, weights=w,
                                    vocab_size=vocab - 3, backend=backend)
            (out.loss + 0.3 * out.student_logprob.sum() + 0.2 * out.student_entropy.sum()).backward()
            results.append([*(v.detach() for v in out), x.grad.float()])
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-2 if dtype == torch.bfloat16 else 2e-5, atol=5e-6)
            seen += 1
    h, head, h2 = torch.randn(6, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True), torch.randn(6, 8)
    results = []
    for backend in ('torch', 'triton'):
        h.grad = head.grad = None
        out = linear_distillation_loss(h, head, h2, head, y % 40, beta=beta, chunk_size=4, backend=backend)
        out.loss.backward()
        results.append([out.loss.detach(), out.divergence, out.student_entropy, h.grad, head.grad])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=5e-6)
        seen += 1
print(seen)
"""
    assert run(code, TRITON_INTERPRET="1").strip() == str(4 * (3 * 7 + 5))
