"""The arithmetic of GPUs, for Triton's interpreter, where it has another: both take the place of its own methods."""

from __future__ import annotations

from typing import Any

import torch


def create_fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """``InterpreterBuilder.create_fma``, rounded once; the product of two float32 is exact in float64."""
    from triton.runtime.interpreter import TensorHandle

    exact = x.data.astype("float64") * y.data.astype("float64") + z.data.astype("float64")
    return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)


def nearest_bfloat16(cast_impl: Any) -> Any:
    """``InterpreterBuilder.cast_impl``, but float32 to bfloat16 (which it keeps as uint16) rounded instead of cut."""
    from triton import language as tl
    from triton.runtime.interpreter import TensorHandle

    def cast(builder: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cast_impl(builder, source, target)
        rounded = torch.from_numpy(source.data.copy()).bfloat16().view(torch.int16).numpy().view("uint16")
        return TensorHandle(rounded, target.scalar)

    return cast
