"""Tensors in memory that shows what a kernel touches: fenced in, forbidden, or far apart."""

from __future__ import annotations

import ctypes
import mmap

import torch


def _protect(address: int, size: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), 0) == 0


def guarded(rows: int, columns: int) -> torch.Tensor:
    """A float32 [rows, columns] tensor with an unreadable page right before its first and right after its last byte."""
    page, size = mmap.PAGESIZE, rows * columns * 4
    assert size % page == 0
    area = mmap.mmap(-1, size + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for address in (start, start + page + size):
        _protect(address, page)
    return torch.frombuffer(area, dtype=torch.float32, count=rows * columns, offset=page).view(rows, columns)


def forbid(row: torch.Tensor) -> None:
    """Make a contiguous stretch of whole pages, of a tensor from ``guarded``, unreadable and unwritable."""
    size = row.numel() * row.element_size()
    assert row.data_ptr() % mmap.PAGESIZE == 0
    assert size % mmap.PAGESIZE == 0
    _protect(row.data_ptr(), size)


def far_apart(rows: int, columns: int, stride: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[rows, columns] of any row stride; on the CPU the memory between the rows is reserved but never there."""
    count = (rows - 1) * stride + columns
    if device.type != "cpu":
        return torch.empty(count, dtype=dtype, device=device).as_strided((rows, columns), (stride, 1))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    area = mmap.mmap(-1, dtype.itemsize * count, flags=flags)
    return torch.frombuffer(area, dtype=dtype).as_strided((rows, columns), (stride, 1))
