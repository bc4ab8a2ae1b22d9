"""A GPU that is not there: what a process would JIT for an H100 is recorded (or found in a cache), nothing is launched.

``start`` makes this process believe in a CUDA device of compute capability 9.0. CPU tensors stand in for CUDA tensors:
they say that their device is ``cuda:0``, and what is made on or moved to CUDA is made on the CPU. Code that asks for
the device is answered as on a GPU, so it needs no knowledge of the recording. What a kernel's key holds of a tensor is
its dtype and whether its address divides by 16, as addresses from PyTorch's allocators do on both devices.

Kernels write nothing: new memory is 0 where a GPU would have left it as it was, and results are wrong. A test that
compares them would end there and hide what it launches later, so ``assert`` statements are stripped (PYTHONOPTIMIZE,
with pytest's ``--assert=plain``), ``assert_close`` and its likes accept everything, and so do the functions of a
project's module that derives an exception of its own from AssertionError. This module is also the pytest plugin that
tells which tests ended early all the same.

``torch.compile`` runs functions as they are: kernels that Inductor writes are not recorded.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
import threading
from collections.abc import Callable, Generator
from inspect import isfunction
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy.testing
import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tools.triton_cache.journal import CACHED, FOLDER, write
from tools.triton_cache.keys import settle

TARGET = GPUTarget("cuda", 90, 32)
GPU = torch.device("cuda", 0)
MEMORY = 80 << 30
MOST_FLOPS, MOST = 1 << 30, 1 << 25  # of a product, and random numbers of a tensor, that are computed; others are 0
_started = threading.Lock()


def start() -> None:
    """Record from here on in this process."""
    if not _started.acquire(blocking=False):
        return
    settle()
    driver.set_active(Driver())
    if os.environ.get(CACHED) == "1":
        triton.knobs.compilation.listener = tell_cached
    else:
        triton.knobs.runtime.jit_cache_hook = Recorder()
    stand_in()


class Recorder:
    """The hook that the JIT calls with a new key: True tells it that somebody else compiles and launches."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def __call__(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        data = compile["specialization_data"]
        if data not in self.seen:
            self.seen.add(data)
            write({"module": fn.module, "kernel": fn.name, "data": data})
        return True


def tell_cached(*, src: Any, metadata: dict[str, Any], cache_hit: bool, **_: Any) -> None:
    write({"kernel": src.name, "hash": metadata["hash"], "hit": cache_hit})


class Driver:
    """Triton's driver of an H100 that loads and launches nothing."""

    def __init__(self) -> None:
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {
                "max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "sm_clock_rate": 1980000,
                "mem_clock_rate": 2619000, "mem_bus_width": 5120, "max_num_regs": 65536,
            },
            load_binary=lambda name, binary, shared, device: (None, None, 0, 0, 1024),
        )  # fmt: skip
        self.launcher_cls = lambda src, metadata: lambda *arguments: None

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def set_current_device(self, device: int) -> None: ...

    def get_active_torch_device(self) -> torch.device:
        return GPU

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def measure(call: Callable[[], object], quantiles: Any = None, **_: Any) -> list[float]:
            call()
            return [1.0] * 3

        return measure

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(1)

    def clear_cache(self, cache: torch.Tensor) -> None: ...


FACTORIES = """arange as_tensor asarray empty empty_like empty_strided eye full full_like linspace logspace normal ones
ones_like rand rand_like randint randint_like randn randn_like randperm scalar_tensor tensor zeros zeros_like"""
METHODS = "new_empty new_empty_strided new_full new_ones new_tensor new_zeros to"
PRODUCTS = " addmm bmm matmul mm"


def on_cpu(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """``function`` with the CPU for CUDA among its arguments.

    Products with ``out_dtype`` are emulated. Neither large products nor many random numbers are computed.

    Nobody knows any more where a tensor that is moved comes from. One whose address or gaps could show in a key is
    taken to come from the CPU, and copied: the kernels get what the GPU's allocator would give them.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if name.strip("_") in PRODUCTS.split() and (
            kwargs.get("out_dtype") is not None or flops(*args[-2:]) > MOST_FLOPS
        ):
            return product(*args, **kwargs)
        if name in ("rand", "randn") and math.prod(torch.Size(args if isinstance(args[0], int) else args[0])) > MOST:
            return torch.zeros(*args, **{key: value for key, value in kwargs.items() if key != "generator"})
        made = function(*map(to_cpu, args), **{key: to_cpu(value) for key, value in kwargs.items()})
        if "empty" in name and made.device.type == GPU.type:
            return made.zero_()
        if name == "to" and made is args[0] and any(map(is_gpu, (*args[1:], *kwargs.values()))):
            compact = made.data_ptr() % 16 == 0 and torch.ops.aten.is_non_overlapping_and_dense(made)
            return made if compact else made.clone()
        return made

    return wrapped


def is_gpu(value: Any) -> bool:
    """Whether an argument says CUDA."""
    return isinstance(value, str | torch.device) and str(value).partition(":")[0] == GPU.type


def to_cpu(value: Any) -> Any:
    return torch.device("cpu") if is_gpu(value) else value


def flops(first: torch.Tensor, second: torch.Tensor) -> int:
    return 2 * first.numel() * second.shape[-1] if second.ndim > 1 else 0


def product(
    *operands: Any, out_dtype: torch.dtype | None = None, out: torch.Tensor | None = None, **_: Any
) -> torch.Tensor:
    """``torch.mm``, ``bmm``, ``matmul``, or ``addmm`` (three operands) with ``out_dtype``, which the CPU lacks.

    A large one is 0, but has a gradient where the operands have one.
    """
    *added, first, second = operands
    dtype = out_dtype or first.dtype
    if flops(first, second) <= MOST_FLOPS:
        found = first.to(dtype) @ second.to(dtype)
    else:
        corners = (operand[(0,) * operand.ndim].to(dtype) for operand in (first, second))
        found = torch.zeros(*first.shape[:-1], second.shape[-1], dtype=dtype) + 0 * sum(corners)
    found = sum(added, found)
    return found if out is None else out.copy_(found)


class CPUGenerator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> CPUGenerator:
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]  # typed as object's


def stand_in() -> None:
    """CPU tensors for CUDA tensors, from here on."""
    base = torch._C.TensorBase.device

    def device(tensor: torch.Tensor) -> torch.device:
        found = base.__get__(tensor)
        return GPU if found.type == "cpu" else found

    def nothing(*_: Any, **__: Any) -> None: ...

    handle = mock.MagicMock(cuda_stream=0)  # an event, a stream, or a context
    handle.elapsed_time.return_value = 1.0
    properties = SimpleNamespace(
        name="NVIDIA H100 (recording)", major=9, minor=0, multi_processor_count=132, total_memory=MEMORY,
        L2_cache_size=50 << 20, uuid=None, warp_size=32,
    )  # fmt: skip
    constants = {
        "is_available": True, "is_current_stream_capturing": False, "device_count": 1, "current_device": 0,
        "get_device_name": properties.name, "get_device_capability": (9, 0), "get_device_properties": properties,
        "mem_get_info": (MEMORY, MEMORY), "is_bf16_supported": True, "memory_stats": {},
        **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), 0),
        **dict.fromkeys(("synchronize", "empty_cache", "reset_peak_memory_stats", "set_device", "ipc_collect"), None),
    }  # fmt: skip
    for name, value in constants.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    for name in ("Event", "Stream", "device", "current_stream", "default_stream", "stream"):
        setattr(torch.cuda, name, lambda *_, **__: handle)
    torch.Tensor.device = property(device)  # type: ignore[assignment]
    torch.Tensor.is_cuda = property(lambda tensor: tensor.device.type == GPU.type)  # type: ignore[assignment]
    torch.Tensor.get_device = lambda self: 0  # type: ignore[method-assign]
    torch.Generator = CPUGenerator  # type: ignore[misc]
    torch.compile = lambda model=None, **_: (lambda function: function) if model is None else model  # type: ignore
    profile, activities = torch.profiler.profile, [torch.profiler.ProfilerActivity.CPU]
    torch.profiler.profile = lambda **options: profile(**options | {"activities": activities})  # type: ignore
    torch.testing.assert_close = nothing
    for name in ("allclose", "array_equal", "array_almost_equal", "array_less", "equal"):
        setattr(numpy.testing, f"assert_{name}", nothing)
    for owner, names in ((torch, FACTORIES + PRODUCTS), (torch.Tensor, METHODS + PRODUCTS + " __matmul__")):
        for name in names.split():
            known: Any = getattr(owner, name)
            setattr(owner, name, on_cpu(known, name))
    torch.Tensor.cuda = lambda self, *_, **__: self.to(GPU)  # type: ignore[method-assign]
    for name in ("pin_memory", "record_stream"):
        setattr(torch.Tensor, name, lambda tensor, *_, **__: tensor)


def overlook(compares: Any) -> None:
    """No function of the module ``compares`` raises an AssertionError any more, wherever it was imported."""
    known = {f: overlooking(f) for f in vars(compares).values() if isfunction(f) and f.__module__ == compares.__name__}
    for module in list(sys.modules.values()):
        for key, value in list(getattr(module, "__dict__", {}).items()):
            if isfunction(value) and value in known:
                setattr(module, key, known[value])


def overlooking(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with contextlib.suppress(AssertionError):
            return function(*args, **kwargs)

    return wrapped


def raises(expected: Any, *args: Any, **kwargs: Any) -> Any:
    """``pytest.raises``; ``assert`` statements are not there to raise."""
    if expected is AssertionError:
        return contextlib.suppress(Exception)
    return _raises(expected, *args, **kwargs)


_raises = pytest.raises


def pytest_configure() -> None:
    if FOLDER in os.environ:
        start()
        pytest.raises = raises  # type: ignore[assignment]


def pytest_collection_finish(session: pytest.Session) -> None:
    kinds = AssertionError.__subclasses__() if FOLDER in os.environ else []
    for module in {sys.modules.get(kind.__module__) for kind in kinds}:
        path = Path(getattr(module, "__file__", None) or "/")
        if path.is_relative_to(session.config.rootpath) and "site-packages" not in path.parts:
            overlook(module)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Generator[None, Any, Any]:
    report = yield
    if FOLDER in os.environ and call.excinfo is not None and report.failed:
        told = f"{call.excinfo.typename}: {call.excinfo.value}"
        write({"ended": item.nodeid, "error": " ".join(told.split())[:300]})
    return report
