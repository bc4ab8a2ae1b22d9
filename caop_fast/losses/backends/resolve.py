"""Which implementation serves a tensor: plain PyTorch, or the Triton kernels."""

from __future__ import annotations

from typing import Any

import torch

import caop_kernels
from caop_fast.losses.backends.base import Backend
from caop_fast.losses.backends.torch import TorchBackend
from caop_fast.losses.backends.triton import TritonBackend
from caop_fast.losses.checks import choice

BACKENDS = ("auto", "torch", "triton")

_BACKENDS: dict[str, Backend] = {"torch": TorchBackend(), "triton": TritonBackend()}


def get_backend(name: str) -> Backend:
    """The backend called "torch" or "triton"."""
    return _BACKENDS[name]


def resolve_backend(backend: Any, device: torch.device) -> str:
    """ "torch" or "triton". "auto" takes Triton on GPUs where it is installed, PyTorch elsewhere."""
    choice("backend", backend, BACKENDS)
    if backend == "torch" or (backend == "auto" and device.type == "cpu"):
        return "torch"
    reason = _triton_unavailable(device.type)
    if reason is None:
        return "triton"
    if backend == "triton":
        raise ValueError(f"backend='triton' cannot serve tensors on {device}: {reason}")
    return "torch"


@torch.compiler.assume_constant_result
def _triton_unavailable(device_type: str) -> str | None:
    """Why the Triton kernels cannot serve such a device; None when they can."""
    return caop_kernels.available(device_type)
