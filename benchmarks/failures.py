"""How a failed measurement is classified: wrong, out of memory, an error, or a device that stopped working."""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Callable

import torch

from benchmarks import measure
from benchmarks.records import Record, Status

# Messages of CPU allocators and of libraries that have no exception of their own for it.
OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator")


class Dead(RuntimeError):
    """The device no longer works in this process."""


class Wrong(Exception):
    """An implementation's loss or gradient is too far from the reference."""


def attempt(record: Record, measure_it: Callable[[], Record]) -> Record:
    """What ``measure_it`` returns, or ``record`` with the reason why it raised. ``Dead`` if the device is.

    No traceback, and so no tensor of the frames, is referenced after the return.
    """
    try:
        return measure_it()
    except Wrong as error:
        return record.failed("wrong", str(error))
    except Exception as error:
        return record.failed(*classify(error))


def classify(error: Exception) -> tuple[Status, str]:
    """Status and reason of an exception. ``Dead`` if the device no longer works."""
    if out_of_memory(error):
        return "oom", "out of memory"
    if dead(error):
        raise Dead(last_line(error)) from error
    return "error", last_line(error)


def dead(error: BaseException) -> bool:
    """Whether ``error`` left the GPU of this process unusable; the GPU is asked, since messages differ."""
    accelerator = isinstance(error, RuntimeError) and torch.cuda.is_initialized()
    return accelerator and not measure.alive(torch.device("cuda"))


def out_of_memory(error: BaseException) -> bool:
    """PyTorch's own error, or that of an allocator or library."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(text in str(error) for text in OUT_OF_MEMORY)


def last_line(error: BaseException) -> str:
    """Type and message of the exception, in one line."""
    text = traceback.format_exception_only(error)[-1].strip().splitlines()
    return text[0][:300] if text else type(error).__name__


def release(device: torch.device) -> None:
    """Free the memory that the last implementation left cached, so that the next one does not run out of it."""
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # raised by a dead device, which is reported elsewhere
            torch.cuda.empty_cache()
