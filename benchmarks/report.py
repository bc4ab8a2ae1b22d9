"""RESULTS.md and a page for each results file, made from the records alone: the same bytes on every machine.

python -m benchmarks.report                             RESULTS.md and results/<stem>.md
python -m benchmarks.report --check                     exit code 1 and a diff if the records give other pages
python -m benchmarks.report --results DIR --out FILE    elsewhere; the pages lie beside the results files in DIR
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import statistics
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.records import OURS, RESULTS, Record, Results, Shape, load

Case = dict[str, Record]  # what was measured on one case, by implementation, ours first
NAMES = {  # what the linear loss replaces: always in the first table, measured or not
    "official": "released CaOPD trainer", "plain": "plain PyTorch", "plain-compiled": "PyTorch with torch.compile",
    "trl-chunked": "TRL, chunked", "liger-fused-linear-jsd": "Liger, fused", "liger-chunked-jsd": "Liger, chunked",
}  # fmt: skip
REFERENCE = Shape("Qwen3-8B", "bfloat16", 8192)  # of a GPU; beta 0, head trained, nothing masked
GPU = {"what you use today": "any of these", "machine": "NVIDIA H100", "speed: ours / its": "not measured"}
EQUAL, LEAST = 2.0, 1e-6  # equal accuracy: a gradient error of at most EQUAL times ours, or LEAST
UNITS = {"gbps": "GB/s", "tflops": "TFLOP/s"}  # of a profile
UNMEASURED = ("not measured", "reason", "implementation", "cases")
HIDDEN = ("format", "device", "device_type", "device_id", "interpreted", "sources", "profile")  # of the header
COLUMNS = f"""\
- **time**: median of a forward and backward (20 % to 80 % quantiles; rounds). **relative**: divided by the value of
  `{OURS}` in the same case; 2x is twice as long, or twice the memory.
- **floor**: a lower bound measured in the same run: the matrix products alone or, for losses on logits, each input read
  and each gradient written once at the bandwidth of a large copy. The percentage is floor / time.
- **memory**: peak beyond the inputs, 1 MB is 1e6 bytes. **errors**: relative to float64, the largest of all compared.
- **wrong**: too far from float64, so not timed; **crashed**: the process died; –: not known, or does not apply.
"""


def escape(text: Any, most: int = 300) -> str:
    """One line of at most ``most`` characters, in which nothing is Markdown or HTML."""
    line = " ".join(str(text).split())
    return re.sub(r"([\\|<>*`\[\]~$&])", r"\\\1", line if len(line) <= most else line[: most - 1] + "…")


def number(value: float | None, unit: str = "") -> str:
    """With 3 significant digits; without an exponent between 0.01 and 1e7."""
    if value is None or value == 0 or not math.isfinite(value):
        return "–" if value is None else f"{value:g}{unit}"
    text, exponent = f"{value:.2e}", int(f"{value:.2e}".split("e")[1])
    return (f"{float(text):.{max(0, 2 - exponent)}f}" if -2 <= exponent < 7 else text) + unit


def flat(value: Any) -> str:
    """What JSON holds in one line: "a 1.00, b 2.50"."""
    if isinstance(value, dict):
        return ", ".join(f"{escape(k)} {flat(v)}" for k, v in value.items() if v not in (None, [], {}))
    return number(value) if value is None or isinstance(value, float) else escape(value, 1000)


def ratio(one: Record | None, other: Record | None, name: str) -> float | None:
    """Of a number of two records; None if either is not known."""
    above, below = getattr(one, name, None), getattr(other, name, None)
    return above / below if above is not None and below else None


def table(rows: list[dict[str, str]]) -> list[str]:
    """Lines of a Markdown table and a blank one, none without rows."""
    heads = list(dict.fromkeys(name for row in rows for name in row))
    cells = [heads, ["---"] * len(heads), *([row.get(name, "–") for name in heads] for row in rows)]
    return [*(f"| {' | '.join(line)} |" for line in cells), ""] if rows else []


def title(results: Results) -> str:
    return f"{escape(results.header.get('device'))}, {escape(results.header.get('date'))[:10]}"


def on_gpu(results: Results) -> bool:
    return results.header.get("device_type") != "cpu"


def emulated(results: Results) -> str:
    """That the machine has no products in bfloat16 to speak of, or nothing."""
    rates = (results.header.get("ceilings") or {}).get("gemm_tflops") or {}
    short, full = rates.get("bfloat16") or 0, rates.get("float32") or 0
    text = f"not usable on this machine ({number(short)} TFLOP/s beside {number(full)} in float32)"
    return f"bfloat16 matrix products are {text}" if 0 < short < full / 4 else ""


def cases(results: Results) -> list[Case]:
    """By suite, dtype, setting and size, however the records are ordered; without floors of emulated products."""
    found: dict[tuple[Any, ...], Case] = defaultdict(dict)
    for r in sorted(results.records, key=lambda r: (not r.impl.startswith(OURS), r.impl)):
        s, useless = r.shape, r.floor == "gemms" and r.shape.dtype == "bfloat16" and emulated(results)
        setting = s.dtype or "", s.beta or 0, s.head_trained is False, s.masked, s.model or "", s.v or 0, s.h or 0
        if r.status == "ok" and r.time_ms:
            key = r.suite not in ("linear", "logits"), r.suite, *setting, s.n or 0, r.case
            found[key][r.impl] = replace(r, floor_ms=None) if useless else r
    return [found[key] for key in sorted(found)]


def peers(case: Case) -> list[Record]:
    """Those that are not caop_fast or a variant of it, the fastest first."""
    return sorted((r for r in case.values() if not r.impl.startswith(OURS)), key=lambda r: r.ms)


def reference(results: Results, suite: str = "linear") -> Case:
    """On a GPU the case the targets are stated for; else the largest of those with the most peers. Or nothing."""

    def merit(case: Case) -> tuple[bool, int, int]:
        r = next(iter(case.values()))
        at = Shape(r.shape.model, r.shape.dtype, r.shape.n) == REFERENCE if on_gpu(results) else r.impl == OURS
        plain = not r.shape.beta and not r.shape.masked and r.shape.head_trained is not False
        able = r.suite == suite and at and plain and not (r.shape.dtype == "bfloat16" and emulated(results))
        return able, len(peers(case)), (r.shape.n or 0) * (r.shape.v or 0) * (r.shape.h or 1)

    return max((case for case in cases(results) if merit(case)[0]), key=merit, default={})


def why(results: Results, case: Case, impl: str = OURS) -> str:
    """Why a number of ``impl`` is missing."""
    failed = {r.key: r for r in results.records if r.status != "ok"}
    r = next((failed.get((r.suite, r.case, impl)) for r in case.values()), None)
    known = "not recorded" if impl in case else "was not run" if case else "the reference case is not in the records"
    return "not measured: " + (escape(f"{r.status}, {r.reason or 'no reason'}") if r else known)


def answer(results: Results) -> list[dict[str, str]]:
    """How caop_fast compares with what is in use, in the reference case."""
    case, rows = reference(results), list[dict[str, str]]()
    ours = case.get(OURS)
    for impl in dict.fromkeys([*NAMES, *(r.impl for r in peers(case))]) if ours else [OURS]:
        r, today = case.get(impl), NAMES.get(impl, escape(impl)) if ours else "any of these"
        speed = number(ratio(r, ours, "time_ms"), "x") if r else why(results, case, impl)
        errors = f"{number(ours.grad_error)} / {number(r.grad_error)}" if r and ours else "–"
        row = {"what you use today": today, "machine": title(results), "speed: ours / its": speed}
        row |= {"memory: ours / its": number(ratio(ours, r, "peak_bytes"), "x"), "gradient error: ours / its": errors}
        rows.append(row)
    return rows


def targets(results: Results) -> list[dict[str, str]]:
    """The four targets, in the reference cases."""
    case, dense, rows = reference(results), reference(results, "logits"), []
    ours, logits, copied = case.get(OURS), dense.get(OURS), (results.header.get("ceilings") or {}).get("copy_gbps")
    allowed = max(EQUAL * (getattr(ours, "grad_error", None) or 0), LEAST)
    equal = next((r for r in peers(case) if r.grad_error is not None and r.grad_error <= allowed), None)
    rate = logits.traffic_gbps / copied if logits and logits.traffic_gbps and copied else None
    time = ours.ms / ours.floor_ms if ours and ours.floor == "gemms" and ours.floor_ms else None
    speed, memory = ratio(equal, ours, "time_ms"), ratio(ours, case.get("official"), "peak_bytes")
    near = "not measured: no peer is as accurate" if ours else why(results, case)
    bare = "not measured: the products alone took longer" if time else why(results, case)
    for what, sign, bound, value, missing in (
        (f"linear loss, speed: ours / {escape(equal.impl) if equal else 'fastest as accurate'}", "≥", 1.5, speed, near),
        ("linear loss, memory: ours / official", "≤", 1 / 8, memory, why(results, case, "official" if ours else OURS)),
        ("loss on logits, bandwidth: ours / a large copy", "≥", 0.8, rate, why(results, dense)),
        ("linear loss, time: ours / its matrix products", "≤", 1.2, time if time and time >= 1 else None, bare),
    ):
        met = missing if value is None else "yes" if value == bound or (value > bound) == (sign == "≥") else "**no**"
        rows.append({"target": what, "required": f"{sign} {bound:g}x", "measured": number(value, "x"), "met": met})
    return rows


def summary(found: list[Results], folder: str) -> str:
    """RESULTS.md; the pages are in ``folder``, seen from there."""
    ranked = sorted(found, key=lambda r: (OURS in reference(r), str(r.header.get("date"))))
    newest = sorted({r.header.get("device"): r for r in ranked}.values(), key=on_gpu, reverse=True)
    rows = [GPU] * (not any(map(on_gpu, found))) + [row for r in newest for row in answer(r)]
    lines = ["# Results", "", *table(rows)]
    for r in found:
        pairs = [(case[OURS], peer) for case in cases(r) if OURS in case for peer in peers(case)]
        total, won = Counter(p.impl for _, p in pairs), Counter(p.impl for ours, p in pairs if p.ms < ours.ms)
        who = "; ".join(f"{NAMES.get(i, escape(i))} in {n} of {total[i]} cases" for i, n in won.most_common()) or "none"
        name = next((escape(record.case) for record in reference(r).values()), "the reference case is not measured")
        known = r.header.get("correctness") or {}
        wrong = (
            "" if known.get("finished", True) and not known.get("failed") else " **Tests failed or did not finish.**"
        )
        link = f"- **{title(r)}** ([all numbers]({folder}/{r.path.stem}.md))"
        lines.append(f"{link}: {name}. Faster than {OURS}: {who}.{wrong}")
    lines += ["", "## Targets", "", "Stated for a GPU; the numbers of a CPU are shown for comparison.", ""]
    lines += [line for r in newest for line in (f"{title(r)}:", "", *table(targets(r)))]
    return "\n".join([*lines, "## What the columns mean", "", COLUMNS, "Generated by `python -m benchmarks.report`.\n"])


def row(case: Case, r: Record) -> dict[str, str]:
    """Of the table of a suite: an implementation on a case."""
    mark = "†" if (r.extra.get("host_ms") or 0) >= 0.9 * r.ms else ""
    share, step = 100 * (r.floor_ms or 0) / r.ms, {**(r.extra.get("split_ms") or {})}
    bound = f"{number(share)} % of {number(r.floor_ms)}{' (no lower bound)' if share > 100 else ''}" if share else "–"
    made = {"case": escape(r.case), "implementation": escape(r.impl), "returns": escape(r.gives or "–")}
    made |= {name.replace("_", " "): number(r.extra[name]) for name in r.extra if name.startswith("tokens_per_s")}
    made["time, ms"] = f"{number(r.ms)}{mark} ({number(r.time_low_ms)}–{number(r.time_high_ms)}; {r.rounds})"
    made["relative"] = number(ratio(r, case.get(OURS), "time_ms"), "x")
    made |= {f"{escape(name)}, ms": number(value) for name, value in step.items()} or {"floor, ms": bound}
    made["memory, MB"] = number(r.peak_bytes and r.peak_bytes / 1e6)
    made["relative memory"] = number(ratio(r, case.get(OURS), "peak_bytes"), "x")
    return made | {"loss error": number(r.loss_error), "gradient error": number(r.grad_error)}


def series(results: Results) -> list[list[list[Record]]]:
    """Records that differ in N only, by implementation, at 3 sizes or more."""
    found: dict[tuple[str, Shape], Any] = defaultdict(lambda: defaultdict(list))
    for r in (r for case in cases(results) for r in case.values() if r.shape.n and r.peak_bytes):
        found[r.suite, replace(r.shape, n=None)][r.impl].append(r)
    return [[rs for rs in same.values() if len({r.shape.n for r in rs}) >= 3] for same in found.values()]


def exponent(records: list[Record], name: str) -> str:
    """p of a number ~ N^p, by least squares between logarithms."""
    x, y = [math.log(r.shape.n or 1) for r in records], [math.log(getattr(r, name)) for r in records]
    return f"{statistics.linear_regression(x, y).slope:.2f}"


def page(results: Results) -> str:
    """All that a results file holds."""
    head, every = results.header, [(case, r) for case in cases(results) for r in case.values()]
    shown = {name: value for name, value in head.items() if name not in HIDDEN and value not in (None, "")}
    lines = [f"# {title(results)}", "", *(f"- {escape(name)}: {flat(value)}" for name, value in shown.items())]
    lines += ["- **the times are of incorrect code**"] if (head.get("correctness") or {}).get("failed") else []
    lines += [f"- **{emulated(results)}**"] if emulated(results) else []
    for what, name, again in ((OURS, "time_ms", "again_ms"), ("its floor", "floor_ms", "floor_again_ms")):
        times = [(r.extra.get(again), getattr(r, name)) for _, r in every]
        if drift := sorted(later / first for later, first in times if later and first):
            text = f"{number(statistics.median(drift), 'x')} ({number(drift[0])}–{number(drift[-1])})"
            lines.append(f"- {what} measured again at the end of its case: {text}")
    lines.append("")
    for key, same in groupby(every, lambda item: f"{escape(item[1].suite)}, {escape(item[1].shape.dtype or '–')}"):
        lines += [f"## {key}", "", *table(rows := [row(*item) for item in same])]
        lines += (
            ["†: bound by the host, launching kernels or waiting.", ""]
            if any("†" in r["time, ms"] for r in rows)
            else []
        )
    for name, found in (head.get("profile") or {}).items():
        rows = [{UNITS.get(k, escape(k)): flat(v) for k, v in r.items()} for r in found["rows"]]
        lines += [f"## Where the time goes: {escape(name)}, {number(found['ms'])} ms", "", *table(rows)]
    fits = [(rs[-1], exponent(rs, "time_ms"), exponent(rs, "peak_bytes")) for same in series(results) for rs in same]
    rows = [{"up to": escape(f"{r.suite}: {r.case}"), "of": escape(r.impl), "time": t, "memory": m} for r, t, m in fits]
    lines += ["## Growth: exponents of N", "", *table(rows)] if rows else []
    failed = Counter((r.status, r.reason or "–", r.impl) for r in results.records if r.status != "ok")
    rows = [dict(zip(UNMEASURED, map(escape, (*key, count)), strict=True)) for key, count in sorted(failed.items())]
    return "\n".join([*lines, *table(rows)]).rstrip() + "\n"


def main(argv: list[str] | None = None) -> int:
    """0, or 1 if ``--check`` finds a difference; exits with 2 if no report can be made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: RESULTS.md beside DIR")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    out, status = options.out or options.results.resolve().parent / "RESULTS.md", 0
    try:
        found = [load(path) for path in sorted(options.results.glob("*.json"))]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    played = [r.path.name for r in found if r.header.get("interpreted")]
    if played or not found:
        parser.error(f"times of Triton's interpreter: {played}" if played else f"no results file in {options.results}")
    found.sort(key=lambda r: (on_gpu(r), str(r.header.get("date")), r.path.name), reverse=True)
    texts = {out: summary(found, Path(os.path.relpath(options.results, out.resolve().parent)).as_posix())}
    texts |= {r.path.with_suffix(".md"): page(r) for r in found}
    for path, text in texts.items():
        there = path.read_bytes().decode(errors="replace") if path.is_file() else ""
        if options.check and there != text:
            lines = difflib.unified_diff(there.splitlines(), text.splitlines(), str(path), "from the records", n=0)
            print("\n".join([f"{path} is not what the records give", *lines][:40]), file=sys.stderr)
            status = 1
        elif not options.check:
            path.write_bytes(text.encode())
    return status


if __name__ == "__main__":
    sys.exit(main())
