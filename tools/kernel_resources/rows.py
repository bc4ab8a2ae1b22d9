"""Variants of the kernels that read whole rows: states, finishing, mixture, coefficients and gradient."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import product
from typing import Any

import triton.language as tl

from caop_kernels.chunk_state import chunk_state_kernel, statistics_flags
from caop_kernels.constants import STATISTICS, STUDENT_STATISTICS
from caop_kernels.gradient import coefficients_kernel, gradient_kernel
from caop_kernels.launch import (
    MERGE_ROWS,
    RowLaunch,
    fast_log2,
    gradient_launch,
    merge_warps,
    mixture_launch,
    statistics_launch,
)
from caop_kernels.mixture import finish_mixture_kernel, mixture_kernel
from caop_kernels.row_stats import finish_kernel
from caop_kernels.state import CHUNK_STATE_FIELDS
from tools.kernel_resources.variant import ITEMSIZE, Variant, argument_types

BACKENDS = ("cuda", "hip")
DTYPES = ("bf16", "fp16", "fp32", "fp64")

# Which terms each use of the gradient kernel has.
GRADIENT_TERMS = {
    "forward": {"TEACHER"},
    "reverse": {"RATIO"},
    "per-row": {"RATIO", "TEACHER"},
    "interior": {"RATIO", "INTERIOR"},
    "student": {"LOG", "LABEL"},
    "logprob": {"LABEL"},
    "everything": {"RATIO", "TEACHER", "LOG", "LABEL"},
    "interior-everything": {"RATIO", "INTERIOR", "LOG", "LABEL"},
}


def variants() -> Iterator[Variant]:
    """Every specialisation of these kernels that the budget covers."""
    mixed = (("fp32", "bf16"), ("bf16", "fp32"))
    for dtype, aligned, softcap in product(DTYPES, (True, False), (False, True)):
        yield _states(dtype, dtype, aligned=aligned, softcap=softcap)
        yield _states(dtype, None, aligned=aligned, softcap=softcap, asked=STUDENT_STATISTICS, suffix="-student")
        yield _mixture(dtype, dtype, aligned=aligned, softcap=softcap)
        # The terms add up; they are tried one by one where speed matters.
        each = dtype == "bf16" or (dtype == "fp32" and aligned and not softcap)
        for kind in GRADIENT_TERMS if each else ("everything", "interior-everything"):
            yield _gradient(dtype, dtype, kind, aligned=aligned, softcap=softcap)
    for student, teacher in mixed:
        yield _states(student, teacher, aligned=True)
        yield _mixture(student, teacher, aligned=True)
        yield _gradient(student, teacher, "everything", aligned=True)
    # Chunks of the linear losses: float32 logits in, the gradient in the dtype of the GEMMs that follow.
    for dtype, softcap in product(("bf16", "fp16"), (False, True)):
        for kind in GRADIENT_TERMS if dtype == "bf16" else ("everything", "interior-everything"):
            yield _gradient("fp32", "fp32", kind, aligned=True, softcap=softcap, out=dtype, suffix=f"-to-{dtype}")
    yield _states("fp32", "fp32", aligned=True, suffix="-ragged", ragged=True)
    yield _mixture("fp32", "fp32", aligned=True, suffix="-ragged", ragged=True)
    yield _gradient("fp32", "fp32", "everything", aligned=True, out="bf16", suffix="-to-bf16-ragged", ragged=True)
    subsets = {
        "forward": ("forward_kl",),
        "reverse": ("reverse_kl",),
        "both-kl": ("forward_kl", "reverse_kl"),
        "interior": ("saved_statistics", "student_entropy", "teacher_entropy"),
        "entropies": ("student_entropy", "teacher_entropy"),
        "lse": ("student_lse", "teacher_lse"),
    }
    for name, asked in subsets.items():
        yield _states("bf16", "bf16", aligned=True, asked=asked, suffix=f"-{name}")
    for dtype in DTYPES:
        for labels, softcap in ((True, False), (True, True), (False, False)):
            yield _finish(dtype, labels=labels, softcap=softcap)
        yield _finish(dtype, labels=True, softcap=False, teacher=False)
    for double in (False, True):
        yield _small("finish-mixture", finish_mixture_kernel, double, {})
        for kind, constants in {
            "forward": {"FORWARD": True, "INTERIOR": False},
            "interior": {"FORWARD": False, "INTERIOR": True},
        }.items():
            yield _small(f"coefficients-{kind}", coefficients_kernel, double, {**constants, "beta_ptr": None})
        per_row = {"FORWARD": False, "INTERIOR": False}
        yield _small("coefficients-per-row", coefficients_kernel, double, per_row)


def _name(kind: str, student: str, teacher: str | None, aligned: bool, softcap: bool, suffix: str = "") -> str:
    dtypes = student if teacher in (student, None) else f"{student}+{teacher}"
    return f"{kind}-{dtypes}-{'aligned' if aligned else 'unaligned'}{'-softcap' if softcap else ''}{suffix}"


def _looped(
    name: str,
    kernel: Any,
    student: str,
    teacher: str | None,
    launch: dict[str, RowLaunch],
    constants: dict[str, Any],
    *,
    aligned: bool,
    hip_constants: dict[str, Any] | None = None,
    out: str | None = None,
    ragged: bool = False,
) -> Variant:
    """A variant of a kernel that walks over rows of logits.

    ``out`` is the dtype of what it writes; ``ragged`` rows start aligned and end anywhere, as in the padded chunks of
    the linear losses.
    """
    double = "fp64" in (student, teacher)
    special = {
        "student_ptr": f"*{student}",
        "teacher_ptr": f"*{teacher}",
        "out_ptr": f"*{out or student}",
        "labels_ptr": "*i64",
    }
    types = argument_types(kernel, special, double=double)
    known = [n for n, t in types.items() if t.startswith("*") and constants.get(n, 0) is not None]
    if aligned:
        divisible = ("student_stride", "teacher_stride", "out_stride", *(() if ragged else ("n_cols", "n_out")))
        known += [n for n in divisible if n in types]
    return Variant(
        name=name,
        kernel=kernel,
        types=types,
        constants={**launch["cuda"].constants(), "COMPUTE": tl.float64 if double else tl.float32, **constants},
        hip_constants=hip_constants or {},
        divisible=tuple(known),
        num_warps={b: config.num_warps for b, config in launch.items()},
        num_stages=launch["cuda"].num_stages,
        pair_bytes=ITEMSIZE[student] + (ITEMSIZE[teacher] if teacher else 0),
        aligned=aligned,
        double=double,
    )


def _itemsize(*dtypes: str | None) -> int:
    return min(ITEMSIZE[d] for d in dtypes if d)


def _states(
    student: str,
    teacher: str | None,
    *,
    aligned: bool,
    softcap: bool = False,
    asked: Collection[str] = STATISTICS,
    suffix: str = "",
    ragged: bool = False,
) -> Variant:
    launch = {
        b: statistics_launch(
            b, _itemsize(student, teacher), aligned=aligned, softcap=softcap, double="fp64" in (student, teacher)
        )
        for b in BACKENDS
    }
    constants = {
        **statistics_flags(asked),
        "SOFTCAP_S": softcap,
        "SOFTCAP_T": softcap and teacher is not None,
        "FIELDS": CHUNK_STATE_FIELDS,
        **({} if teacher else {"teacher_ptr": None}),
    }
    name = _name("statistics", student, teacher, aligned, softcap, suffix)
    return _looped(name, chunk_state_kernel, student, teacher, launch, constants, aligned=aligned, ragged=ragged)


def _mixture(
    student: str, teacher: str, *, aligned: bool, softcap: bool = False, suffix: str = "", ragged: bool = False
) -> Variant:
    double = "fp64" in (student, teacher)
    launch = {
        b: mixture_launch(b, _itemsize(student, teacher), aligned=aligned, lean=not (softcap or double))
        for b in BACKENDS
    }
    constants = {"SOFTCAP_S": softcap, "SOFTCAP_T": softcap, "FAST_LOG2": fast_log2("cuda", double)}
    return _looped(
        _name("mixture", student, teacher, aligned, softcap, suffix),
        mixture_kernel,
        student,
        teacher,
        launch,
        constants,
        aligned=aligned,
        hip_constants={"FAST_LOG2": False},
        ragged=ragged,
    )


def _gradient(
    student: str,
    teacher: str,
    kind: str,
    *,
    aligned: bool,
    softcap: bool = False,
    out: str | None = None,
    suffix: str = "",
    ragged: bool = False,
) -> Variant:
    terms = GRADIENT_TERMS[kind]
    needs_teacher = bool(terms & {"TEACHER", "RATIO"})
    double = "fp64" in (student, teacher)
    interior = "INTERIOR" in terms
    launch = {
        b: gradient_launch(
            b,
            _itemsize(student, teacher if needs_teacher else None),
            aligned=aligned,
            lean=not (softcap or double or interior),
        )
        for b in BACKENDS
    }
    constants = {
        "SOFTCAP_S": softcap,
        "SOFTCAP_T": softcap and needs_teacher,
        **{term: term in terms for term in ("RATIO", "LOG", "TEACHER", "LABEL", "INTERIOR")},
        "FAST_LOG2": fast_log2("cuda", double),
        **({} if needs_teacher else {"teacher_ptr": None}),
        **({} if "LABEL" in terms else {"labels_ptr": None}),
    }
    return _looped(
        _name("gradient", student, teacher if needs_teacher else None, aligned, softcap, f"-{kind}{suffix}"),
        gradient_kernel,
        student,
        teacher if needs_teacher else None,
        launch,
        constants,
        aligned=aligned,
        hip_constants={"FAST_LOG2": False},
        out=out,
        ragged=ragged,
    )


def _finish(dtype: str, *, labels: bool, softcap: bool, teacher: bool = True) -> Variant:
    double = dtype == "fp64"
    absent = [] if labels else ["labels_ptr", "student_logprob_ptr", "teacher_logprob_ptr"]
    if not teacher:
        absent += [
            "teacher_ptr",
            "beta_ptr",
            "divergence_ptr",
            "saved_statistics_ptr",
            "forward_kl_ptr",
            "reverse_kl_ptr",
        ]
        absent += ["teacher_lse_ptr", "teacher_logprob_ptr", "teacher_entropy_ptr"]
    special = {"student_ptr": f"*{dtype}", "teacher_ptr": f"*{dtype}", "labels_ptr": "*i64"}
    types = argument_types(finish_kernel, special, double=double)
    pointers = tuple(n for n, t in types.items() if t.startswith("*") and n not in absent)
    options = {"-labels": labels, "-softcap": softcap, "-student": not teacher}
    return Variant(
        name=f"finish-{dtype}" + "".join(name for name, on in options.items() if on),
        kernel=finish_kernel,
        types=types,
        constants={
            "ROWS": MERGE_ROWS,
            "SOFTCAP_S": softcap,
            "SOFTCAP_T": softcap,
            "TEACHER": teacher,
            "FORWARD": teacher,
            "REVERSE": teacher,
            "COMPUTE": tl.float64 if double else tl.float32,
            "FIELDS": CHUNK_STATE_FIELDS,
            **dict.fromkeys(absent),
        },
        divisible=(*pointers, "student_stride", "teacher_stride", "n_cols"),
        num_warps={b: merge_warps(b) for b in BACKENDS},
        double=double,
    )


def _small(name: str, kernel: Any, double: bool, constants: dict[str, Any]) -> Variant:
    """A variant of a kernel with one thread per row and no logits."""
    types = argument_types(kernel, {"labels_ptr": "*i64"}, double=double)
    return Variant(
        name=f"{name}-{'fp64' if double else 'fp32'}",
        kernel=kernel,
        types=types,
        constants={"ROWS": MERGE_ROWS, "COMPUTE": tl.float64 if double else tl.float32, **constants},
        divisible=tuple(n for n, t in types.items() if t.startswith("*") and constants.get(n, 0) is not None),
        num_warps={b: merge_warps(b) for b in BACKENDS},
        double=double,
    )
