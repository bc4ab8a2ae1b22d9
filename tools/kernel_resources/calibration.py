"""Variants of the calibration kernels: confidence scores, their gradient, hard and soft bins."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import triton.language as tl

from caop_kernels.bins import (
    BIN_FIELDS,
    RUN,
    add_runs_kernel,
    bin_kernel,
    soft_bin_kernel,
    soft_error_kernel,
    soft_gradient_kernel,
    tile,
)
from caop_kernels.confidence import candidate_warps, confidence_kernel
from caop_kernels.confidence_gradient import candidate_gradient_kernel, column_gradient_kernel
from caop_kernels.constants import CONFIDENCE_KINDS
from caop_kernels.launch import RowLaunch, gradient_launch, statistics_launch
from tools.kernel_resources.variant import ITEMSIZE, Variant, argument_types

BACKENDS = ("cuda", "hip")
DTYPES = ("bf16", "fp16", "fp32", "fp64")
KIND = "bernoulli_nll"  # the one with the most arithmetic
CANDIDATES = 128  # 101 values: 0.00 ... 1.00


def variants() -> Iterator[Variant]:
    """Every specialisation of these kernels that the budget covers."""
    for dtype, aligned, softcap in product(DTYPES, (True, False), (False, True)):
        yield _scores(dtype, aligned=aligned, softcap=softcap)
        yield _columns(dtype, aligned=aligned, softcap=softcap)
    # Chunks of the linear losses: float32 logits in, the gradient in the dtype of the GEMMs that follow.
    for out, softcap in product(("bf16", "fp16"), (False, True)):
        yield _columns("fp32", aligned=True, softcap=softcap, out=out)
    yield _candidates("fp32", out="bf16")
    for kind in CONFIDENCE_KINDS:
        yield _scores("bf16", aligned=True, kind=kind, suffix=f"-{kind}")
        yield _candidates("bf16", kind=kind)
    yield _scores("bf16", aligned=True, candidates=1024, suffix="-1024")
    yield _candidates("bf16", candidates=1024)
    for dtype in ("fp32", "fp64"):
        yield _scores(dtype, aligned=True, logits=False, suffix="-logprobs")
        yield _candidates(dtype)
        yield _candidates(dtype, logits=False)
        yield from _bins(dtype)


def _name(kind: str, dtype: str, aligned: bool, softcap: bool, suffix: str = "") -> str:
    return f"{kind}-{dtype}-{'aligned' if aligned else 'unaligned'}{'-softcap' if softcap else ''}{suffix}"


def _variant(
    name: str,
    kernel: Any,
    dtype: str,
    constants: dict[str, Any],
    num_warps: dict[str, int],
    *,
    aligned: bool = True,
    looped: bool = False,
    special: dict[str, str] | None = None,
    num_stages: int | None = None,
) -> Variant:
    double = dtype == "fp64"
    pointers = {"source_ptr": f"*{dtype}", "logits_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "ids_ptr": "*i64"}
    types = argument_types(kernel, {**pointers, **(special or {})}, double=double)
    known = [n for n, t in types.items() if t.startswith("*") and constants.get(n, 0) is not None]
    if aligned:
        known += [n for n in ("source_stride", "logits_stride", "out_stride", "n_cols", "n_out") if n in types]
    compute = {"COMPUTE": tl.float64 if double else tl.float32} if "COMPUTE" in kernel.arg_names else {}
    return Variant(
        name=name,
        kernel=kernel,
        types=types,
        constants={**compute, **constants},
        divisible=tuple(known),
        num_warps=num_warps,
        num_stages=num_stages,
        pair_bytes=ITEMSIZE[dtype] if looped else 0,
        aligned=aligned and looped,
        double=double,
    )


def _warps(launch: dict[str, RowLaunch]) -> dict[str, int]:
    return {backend: config.num_warps for backend, config in launch.items()}


def _scores(
    dtype: str,
    *,
    aligned: bool,
    softcap: bool = False,
    kind: str = KIND,
    candidates: int = CANDIDATES,
    logits: bool = True,
    suffix: str = "",
) -> Variant:
    double = dtype == "fp64"
    launch = {
        b: statistics_launch(b, ITEMSIZE[dtype], aligned=aligned, softcap=softcap, double=double) for b in BACKENDS
    }
    config = launch["cuda"]
    constants: dict[str, Any] = {n: value for n, value in config.constants().items() if n != "CHUNK"}
    constants |= {"KIND": kind, "CANDIDATES": candidates, "SOFTCAP": softcap}
    if not logits:
        constants |= {"ids_ptr": None, "saved_statistics_ptr": None}
    return _variant(
        _name("confidence", dtype, aligned, softcap, suffix),
        confidence_kernel,
        dtype,
        constants,
        _warps(launch) if logits else dict.fromkeys(BACKENDS, candidate_warps(candidates)),
        aligned=aligned,
        looped=logits,
        num_stages=config.num_stages,
    )


def _columns(dtype: str, *, aligned: bool, softcap: bool, out: str | None = None) -> Variant:
    lean = not softcap and dtype != "fp64"
    launch = {b: gradient_launch(b, ITEMSIZE[dtype], aligned=aligned, lean=lean) for b in BACKENDS}
    return _variant(
        _name("confidence-columns", dtype, aligned, softcap, f"-to-{out}" if out else ""),
        column_gradient_kernel,
        dtype,
        {**launch["cuda"].constants(), "SOFTCAP": softcap},
        _warps(launch),
        aligned=aligned,
        looped=True,
        special={"out_ptr": f"*{out or dtype}"},
        num_stages=launch["cuda"].num_stages,
    )


def _candidates(
    dtype: str, *, kind: str = KIND, candidates: int = CANDIDATES, logits: bool = True, out: str | None = None
) -> Variant:
    constants: dict[str, Any] = {"KIND": kind, "CANDIDATES": candidates, "SOFTCAP": False}
    if not logits:
        constants |= {"ids_ptr": None, "saved_statistics_ptr": None}
    suffix = f"{'' if logits else '-logprobs'}{f'-to-{out}' if out else ''}"
    return _variant(
        f"confidence-candidates-{dtype}-{kind}-{candidates}{suffix}",
        candidate_gradient_kernel,
        dtype,
        constants,
        dict.fromkeys(BACKENDS, candidate_warps(candidates)),
        special={"out_ptr": f"*{out or dtype}"},
    )


def _bins(dtype: str) -> Iterator[Variant]:
    rows = {"confidence_ptr": f"*{dtype}", "correct_ptr": f"*{dtype}"}
    four, few = dict.fromkeys(BACKENDS, 4), dict.fromkeys(BACKENDS, 1)
    hard = {**rows, "edges_ptr": "*fp64", "partial_ptr": "*fp64"}
    constants: dict[str, Any] = {"RUN": RUN, "FIELDS": BIN_FIELDS, **tile(10, whole=False)}
    yield _variant(f"bins-{dtype}", bin_kernel, dtype, constants, four, special=hard)
    for n_bins in (10, 1024):
        shape = tile(n_bins, whole=True)
        name = f"{dtype}-{n_bins}"
        yield _variant(f"soft-bins-{name}", soft_bin_kernel, dtype, {"RUN": RUN, **shape}, four, special=rows)
        yield _variant(f"soft-bins-gradient-{name}", soft_gradient_kernel, dtype, shape, four, special=rows)
    yield _variant(f"soft-bins-error-{dtype}", soft_error_kernel, dtype, {"BINS": 16}, few)
    yield _variant(f"add-runs-{dtype}", add_runs_kernel, dtype, {"BLOCK": 64}, dict.fromkeys(BACKENDS, 2))
