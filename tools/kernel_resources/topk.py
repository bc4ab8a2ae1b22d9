"""Variants of the kernels against a sparse teacher: the tail's read, finishing, listed gradient and scatter."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import triton
import triton.language as tl

from caop_kernels.constants import TAILS
from caop_kernels.launch import CHUNK, ELEMENTS, tail_launch
from caop_kernels.topk import finish_warps, topk_finish_kernel
from caop_kernels.topk_gradient import listed_gradient_kernel, scatter_kernel
from caop_kernels.topk_tail import TAIL_FIELDS, lanes, tail_kernel
from tools.kernel_resources.variant import ITEMSIZE, Variant, argument_types

BACKENDS = ("cuda", "hip")
LISTED = 64  # k of the variants whose name does not say it
VOCABULARY = 151936
CHUNK_BLOCK = triton.next_power_of_2(triton.cdiv(VOCABULARY, CHUNK))
DIVERGENCES: dict[str, dict[str, Any]] = {
    "forward": {"FORWARD": True, "REVERSE": False, "beta_ptr": None},
    "reverse": {"FORWARD": False, "REVERSE": True, "beta_ptr": None},
    "interior": {"FORWARD": False, "REVERSE": False, "beta_ptr": None},
    "per-row": {"FORWARD": True, "REVERSE": True},
}


def variants() -> Iterator[Variant]:
    """Every specialisation of these kernels that the budget covers."""
    for dtype, aligned, softcap in product(("bf16", "fp16", "fp32", "fp64"), (True, False), (False, True)):
        yield _tail(dtype, aligned=aligned, softcap=softcap)
    for dtype in ("bf16", "fp32"):
        yield _tail(dtype, aligned=True, softcap=False, k=256)
    for kernel, name in ((topk_finish_kernel, "topk-finish"), (listed_gradient_kernel, "topk-listed-gradient")):
        for tail, divergence in product(TAILS, DIVERGENCES):
            yield _listed(kernel, name, "bf16", tail, divergence)
        for k in (8, 256):
            yield _listed(kernel, f"{name}-{k}", "bf16", "bucket", "per-row", k=k)
        for dtype in ("fp32", "fp64"):
            yield _listed(kernel, name, dtype, "bucket", "per-row", softcap=True)
    for dtype in ("bf16", "fp32", "fp64"):
        yield _scatter(dtype)


def _tail(dtype: str, *, aligned: bool, softcap: bool, k: int = LISTED) -> Variant:
    double = dtype == "fp64"
    launch = {b: tail_launch(b, ITEMSIZE[dtype], aligned=aligned, softcap=softcap, double=double) for b in BACKENDS}
    types = argument_types(tail_kernel, {"student_ptr": f"*{dtype}", "sorted_ids_ptr": "*i32"}, double=double)
    pointers = tuple(n for n, t in types.items() if t.startswith("*"))
    return Variant(
        name=f"topk-tail-{'' if k == LISTED else f'{k}-'}{dtype}-{'aligned' if aligned else 'unaligned'}"
        + ("-softcap" if softcap else ""),
        kernel=tail_kernel,
        types=types,
        constants={
            **launch["cuda"].constants(),
            "K_BLOCK": lanes(k),
            "SOFTCAP": softcap,
            "COMPUTE": tl.float64 if double else tl.float32,
            "FIELDS": TAIL_FIELDS,
        },
        hip_constants={"THREADS": launch["hip"].threads},
        divisible=(*pointers, "k", *(("student_stride", "n_cols") if aligned else ())),
        num_warps={b: config.num_warps for b, config in launch.items()},
        num_stages=launch["cuda"].num_stages,
        pair_bytes=ITEMSIZE[dtype],
        pairs=ELEMENTS * launch["cuda"].unroll,
        ids_per_pair=k * launch["cuda"].threads / VOCABULARY,  # each thread meets every id of its chunk
        aligned=aligned,
        double=double,
    )


def _listed(
    kernel: Any, name: str, dtype: str, tail: str, divergence: str, *, k: int = LISTED, softcap: bool = False
) -> Variant:
    double = dtype == "fp64"
    special = {"student_ptr": f"*{dtype}", "ids_ptr": "*i64", "labels_ptr": "*i64"}
    types = argument_types(kernel, special, double=double)
    constants: dict[str, Any] = {
        "K_BLOCK": lanes(k),
        "TAIL": tail,
        "SOFTCAP": softcap,
        "COMPUTE": tl.float64 if double else tl.float32,
        **DIVERGENCES[divergence],
    }
    if kernel is topk_finish_kernel:
        constants |= {"CHUNK_BLOCK": CHUNK_BLOCK, "FIELDS": TAIL_FIELDS}
    return Variant(
        name=f"{name}-{dtype}-{tail}-{divergence}{'-softcap' if softcap else ''}",
        kernel=kernel,
        types=types,
        constants=constants,
        divisible=tuple(n for n, t in types.items() if t.startswith("*") and n not in constants),
        num_warps={b: finish_warps(b, k) for b in BACKENDS},
        double=double,
    )


def _scatter(dtype: str) -> Variant:
    double = dtype == "fp64"
    types = argument_types(scatter_kernel, {"ids_ptr": "*i64", "out_ptr": f"*{dtype}"}, double=double)
    return Variant(
        name=f"topk-scatter-{dtype}",
        kernel=scatter_kernel,
        types=types,
        constants={"K_BLOCK": lanes(LISTED)},
        divisible=tuple(n for n, t in types.items() if t.startswith("*")),
        num_warps={b: finish_warps(b, LISTED) for b in BACKENDS},
        double=double,
    )
