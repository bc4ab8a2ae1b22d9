"""Which implementation serves a tensor: the Triton kernels, or the plain PyTorch definition."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from caop_fast.losses.checks import choice

BACKENDS = ("auto", "torch", "triton")


def resolve_backend(backend: Any, device: torch.device) -> str:
    """ "torch" or "triton". "auto" takes Triton on GPUs where it is installed, PyTorch elsewhere."""
    choice("backend", backend, BACKENDS)
    if backend == "torch" or (backend == "auto" and device.type == "cpu"):
        return "torch"
    reason = triton_unavailable(device.type)
    if reason is None:
        return "triton"
    if backend == "triton":
        raise ValueError(f"backend='triton' cannot serve tensors on {device}: {reason}")
    return "torch"


@torch.compiler.assume_constant_result
def triton_unavailable(device_type: str) -> str | None:
    """Why the Triton kernels cannot serve such a device; None when they can."""
    return importlib.import_module("caop_kernels").available(device_type)
