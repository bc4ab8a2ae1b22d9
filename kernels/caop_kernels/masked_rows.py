"""Rows of weight 0: they are not read, whatever they hold, and report 0."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def live_row(weights_ptr, row):
    """Whether `row` has a weight other than 0; always without weights (None)."""
    if weights_ptr is not None:
        return tl.load(weights_ptr + row) != 0
    else:
        return tl.full((), True, tl.int1)


@triton.jit
def live_rows(weights_ptr, rows, mask):
    """The same for a vector of rows; those that `mask` leaves out are not live."""
    if weights_ptr is not None:
        return tl.load(weights_ptr + rows, mask=mask, other=0.0) != 0
    else:
        return mask


@triton.jit
def store_live(pointer, rows, value, live, mask):
    """Write one value per row, 0 in rows that are not live."""
    tl.store(pointer + rows, tl.where(live, value, 0.0), mask=mask)
