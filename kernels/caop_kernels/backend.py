"""Where the kernels can run, and why not where they cannot. Imports without Triton."""

from __future__ import annotations

import functools
import importlib
import warnings

import torch

# Device types that Triton compiles for. CPU tensors run in Triton's interpreter only.
COMPILED_DEVICES = ("cuda", "xpu")


@functools.cache
def missing_triton() -> str | None:
    """None when Triton can be imported, else a sentence that says why not and what to do."""
    try:
        importlib.import_module("triton")
        importlib.import_module("triton.language")
    except ImportError as error:
        return (
            f"Triton cannot be imported ({error}); install it with `pip install 'triton>=3.4'` (Linux), "
            "or use the plain PyTorch losses"
        )
    return None


def available(device: torch.device | str) -> str | None:
    """None when the kernels can run on tensors of `device`, else the reason why they cannot.

    Reads no device and starts no context; it does import Triton. CPU tensors are served by Triton's interpreter, which
    has to be asked for with TRITON_INTERPRET=1 before Triton is first imported: exact, and far slower than PyTorch.
    """
    device = torch.device(device)
    if device.type not in (*COMPILED_DEVICES, "cpu"):
        return f"no Triton kernels for device type {device.type!r}; they take CUDA, ROCm and XPU tensors"
    reason = missing_triton()
    if reason is not None:
        return reason
    if device.type != "cpu":
        return None
    if not _interpreted():
        return (
            "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 in the environment before Triton is "
            "imported, or use the plain PyTorch losses"
        )
    return _broken_interpreter()


def _interpreted() -> bool:
    """Whether the kernels of this process were made for the interpreter (decided when they were first imported)."""
    from caop_kernels.state import rebase

    return type(rebase).__module__.endswith("interpreter")


@functools.cache
def _broken_interpreter() -> str | None:
    """Interpreters up to Triton 3.6 turn one-element arrays into loop bounds with int(), which NumPy 2.4 refuses."""
    import numpy
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 7):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            int(numpy.zeros(1))
        except TypeError:
            return (
                f"the interpreter of Triton {triton.__version__} does not work with NumPy {numpy.__version__}; "
                "take Triton >= 3.7 or NumPy < 2.4 (compiled kernels are not concerned)"
            )
    return None


def require(device: torch.device) -> None:
    """Raise a RuntimeError that gives the reason when the kernels cannot run on `device`."""
    reason = available(device)
    if reason is not None:
        raise RuntimeError(reason)
