"""RESULTS.md and a page for each results file, made from the records; no number in them is written by hand.

    python -m benchmarks.report                             benchmarks/RESULTS.md, benchmarks/results/<stem>.md and .png
    python -m benchmarks.report --check                     exit code 1 and a diff if a page is not what the records give
    python -m benchmarks.report --results DIR --out FILE    elsewhere; the pages lie beside the results files in DIR

The same records give the same pages on every machine; only the pictures need matplotlib.
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
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.records import OURS, RESULTS, Record, Results, Shape, load

NAMES = {  # what the linear loss replaces: always in the first table, measured or not
    "official": "released CaOPD trainer",
    "plain": "plain PyTorch",
    "plain-compiled": "plain PyTorch under torch.compile",
    "trl-chunked": "TRL, chunked",
    "liger-fused-linear-jsd": "Liger, fused linear JSD",
    "liger-chunked-jsd": "Liger, chunked JSD",
}
REFERENCE = Shape("Qwen3-8B", "bfloat16", 8192)  # of a GPU; beta 0, head trained, nothing masked
GPU = "NVIDIA H100"  # named as not measured while there is no results file of a GPU
EQUAL, LEAST = 2.0, 1e-6  # equal accuracy: a gradient error of at most EQUAL times ours, or LEAST
HIDDEN = ("format", "device", "device_type", "device_id", "interpreted", "sources", "profile")  # of the header
STEP = ("tokens_per_s", "tokens_per_s_without_rollout", "split_ms", "tokens", "layers", "layers_published", "optimiser")
COLUMNS = f"""\
- **time**: median of a forward and backward (20 % to 80 % quantiles; rounds). **relative**: divided by the value of
  `{OURS}` in the same case; 2x is twice as long, or twice the memory.
- **floor**: a lower bound measured in the same run: the matrix products alone or, for losses on logits, each input read
  and each gradient written once at the bandwidth of a large copy. The percentage is floor / time.
- **memory**: peak beyond the inputs, 1 MB is 1e6 bytes; gradients of the inputs count.
- **loss error**, **gradient error**: relative to float64 (Euclidean norms), the largest of all that was compared.
- **skipped**: not installed, or does not support the case; **oom**: out of memory; **wrong**: too far from float64, so
  not timed; **error**: raised an exception; **crashed**: the process died; –: not known, or does not apply.
"""


class Case(NamedTuple):
    """The records of a case by implementation, ours first; the shape is that of a record that knows it."""

    suite: str
    name: str
    shape: Shape
    records: dict[str, Record]

    def ok(self, impl: str = OURS) -> Record | None:
        record = self.records.get(impl)
        return record if record is not None and record.status == "ok" and record.time_ms else None

    def peers(self) -> list[Record]:
        """Those measured that are not caop_fast or a variant of it, the fastest first."""
        found = (self.ok(impl) for impl in self.records if not impl.startswith(OURS))
        return sorted((r for r in found if r is not None), key=lambda r: r.ms)

    def why(self, impl: str = OURS) -> str:
        """Why there is no time of ``impl``."""
        if (r := self.records.get(impl)) is None:
            return "not measured: " + ("was not run" if self.records else self.name)
        return f"not measured: {escape(f'{r.status}, {r.reason}' if r.reason else r.status)}"


def cases(results: Results) -> list[Case]:
    """By suite, dtype and setting, then by size, however the records are ordered."""
    found: dict[tuple[str, str], dict[str, Record]] = defaultdict(dict)
    for r in sorted(results.records, key=lambda r: (not r.impl.startswith(OURS), r.impl)):
        found[r.suite, r.case][r.impl] = r
    made = [Case(*key, next((r.shape for r in rs.values() if r.shape.n), Shape()), rs) for key, rs in found.items()]

    def order(case: Case) -> tuple[Any, ...]:
        s, main = case.shape, case.suite not in ("linear", "logits")
        setting = s.dtype or "", s.beta or 0, s.head_trained is False, s.masked, s.model or "", s.v or 0, s.h or 0
        return main, case.suite, *setting, s.n or 0, case.name

    return sorted(made, key=order)


def escape(text: Any, most: int = 300) -> str:
    """One line of at most ``most`` characters, in which nothing is Markdown or HTML."""
    line = " ".join(str(text).split())
    return re.sub(r"([\\|<>*`\[\]~$&])", r"\\\1", line if len(line) <= most else line[: most - 1] + "…")


def number(value: float | None, unit: str = "") -> str:
    """With 3 significant digits; without an exponent between 0.01 and 1e7."""
    if value is None or value == 0 or not math.isfinite(value):
        return "–" if value is None else f"{value:g}{unit}"
    text = f"{value:.2e}"
    exponent = int(text.split("e")[1])
    return (f"{float(text):.{max(0, 2 - exponent)}f}" if -2 <= exponent < 7 else text) + unit


def flat(value: Any) -> str:
    """What JSON holds in one line: "a 1.00, b 2.50"."""
    if isinstance(value, dict):
        return ", ".join(f"{escape(k)} {flat(v)}" for k, v in value.items() if v not in (None, [], {}))
    if isinstance(value, list):
        return ", ".join(map(flat, value[:20]))
    return number(value) if isinstance(value, float) else escape(value)


def over(value: float | None, other: float | None) -> float | None:
    return None if value is None or not other else value / other


def ratio(one: Record | None, other: Record | None, name: str) -> float | None:
    """Of a number of two records; None if either is not known."""
    return over(getattr(one, name, None), getattr(other, name, None))


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table and a blank one, none without rows; short rows are filled, cells are escaped already."""
    full = [[*row, *["–"] * (len(headers) - len(row))] for row in rows]
    return [*(f"| {' | '.join(row)} |" for row in (headers, ["---"] * len(headers), *full)), ""] if rows else []


def title(results: Results) -> str:
    return f"{escape(results.header.get('device'))}, {escape(results.header.get('date'))[:10]}"


def on_gpu(results: Results) -> bool:
    return results.header.get("device_type") != "cpu"


def emulated(results: Results) -> str:
    """That the machine has no products in bfloat16 to speak of, or nothing."""
    rates = (results.header.get("ceilings") or {}).get("gemm_tflops") or {}
    short, full = rates.get("bfloat16"), rates.get("float32")
    beside = f"({number(short)} TFLOP/s beside {number(full)} in float32)"
    return (
        f"bfloat16 matrix products are not usable on this machine {beside}" if (over(short, full) or 1) < 1 / 4 else ""
    )


def reference(results: Results, suite: str = "linear") -> Case:
    """On a GPU the case the targets are stated for; else the largest of those with the most peers."""
    plain = [c for c in cases(results) if c.suite == suite and not c.shape.beta and not c.shape.masked]
    able = [c for c in plain if c.shape.head_trained is not False and (on_gpu(results) or c.ok())]
    if on_gpu(results):
        able = [c for c in able if Shape(c.shape.model, c.shape.dtype, c.shape.n) == REFERENCE]
    elif emulated(results):
        able = [c for c in able if c.shape.dtype != "bfloat16"]
    able.sort(key=lambda c: (len(c.peers()), (c.shape.n or 0) * (c.shape.v or 0) * (c.shape.h or 1)))
    return able[-1] if able else Case(suite, "the reference case is not in the records", Shape(), {})


def answer(found: Sequence[Results]) -> list[str]:
    """How caop_fast compares with what is in use, in the reference case of each file."""
    rows = [] if any(map(on_gpu, found)) else [["any of these", GPU, "not measured"]]
    for results in found:
        case, where = reference(results), title(results)
        if (ours := case.ok()) is None:
            rows.append(["any of these", where, case.why()])
            continue
        for impl in dict.fromkeys([*NAMES, *(i for i in case.records if not i.startswith(OURS))]):
            row, r = [NAMES.get(impl, escape(impl)), where], case.ok(impl)
            shares = number(ratio(r, ours, "time_ms"), "x"), number(ratio(ours, r, "peak_bytes"), "x")
            row += [*shares, f"{number(r.grad_error)} / {number(ours.grad_error)}"] if r else [case.why(impl)]
            rows.append(row)
    heads = ["what you use today", "machine", f"speed of {OURS} relative to it", "memory relative to it"]
    return table([*heads, f"gradient error: its / {OURS}"], rows)


def wins(results: Results) -> str:
    """Where others are faster, or need less memory."""
    pairs = [(ours, r) for case in cases(results) if (ours := case.ok()) for r in case.peers()]
    total, text = Counter(r.impl for _, r in pairs), ""
    for what, name in (("Faster", "time_ms"), ("Less memory", "peak_bytes")):
        won = Counter(r.impl for ours, r in pairs if (ratio(r, ours, name) or 1) < 1)
        named = [f"{NAMES.get(i, escape(i))} in {won[i]} of {total[i]} cases" for i in sorted(won)]
        text += f" {what} than {OURS}: {', '.join(named) or 'none'}."
    return text


def targets(results: Results) -> list[str]:
    """The four targets in the reference case: required, measured, verdict."""
    case, on_logits = reference(results), reference(results, "logits")
    ours, logits, official = case.ok(), on_logits.ok(), case.ok("official")
    peers = case.peers() if ours else []
    allowed = max(EQUAL * (getattr(ours, "grad_error", None) or 0), LEAST)
    equal = next((r for r in peers if r.grad_error is not None and r.grad_error <= allowed), None)
    near = f"{escape(peers[0].impl)}: {number(ratio(peers[0], ours, 'time_ms'), 'x')}" if peers else "no peer"
    copied = over(getattr(logits, "traffic_gbps", None), (results.header.get("ceilings") or {}).get("copy_gbps"))
    gemms = over(ours.time_ms, ours.floor_ms) if ours and ours.floor == "gemms" else None
    absent = f"no peer of equal accuracy; the fastest is {near}" if ours else case.why()
    no_floor = emulated(results) or "the floor is no lower bound" if ours else case.why()
    rows = []
    for what, sign, bound, value, why in (
        ("linear loss, time: fastest peer of equal accuracy / ours", "≥", 1.5, ratio(equal, ours, "time_ms"), absent),
        ("linear loss, memory: ours / official", "≤", 1 / 8, ratio(ours, official, "peak_bytes"), case.why("official")),
        ("loss on logits, bandwidth: ours / a large copy", "≥", 0.8, copied, on_logits.why()),
        (
            "linear loss, time: ours / its matrix products alone",
            "≤",
            1.2,
            gemms if (gemms or 0) >= 1 else None,
            no_floor,
        ),
    ):
        met = value is not None and (value >= bound if sign == "≥" else value <= bound)
        verdict = "met" if met else "**not met**" if value else why
        rows.append([what, f"{sign} {bound:g}x", number(value, "x"), verdict])
    return table(["target", "required", "measured", "verdict"], rows)


def summary(found: Sequence[Results], folder: str) -> str:
    """RESULTS.md; the pages are in ``folder``, seen from there."""
    newest = {r.header.get("device"): r for r in sorted(reversed(found), key=lambda r: reference(r).ok() is not None)}
    chosen = [r for r in found if r in newest.values()]
    lines = ["# Results", "", *answer(chosen)]
    for r in found:
        lines.append(f"- **{title(r)}** ([page]({folder}/{r.path.stem}.md)): {escape(reference(r).name)}.{wins(r)}")
    lines += ["", "## Targets", "", "Stated for a GPU, in the case above; what a CPU gives is shown beside.", ""]
    lines += [] if any(map(on_gpu, found)) else [f"{GPU}: not measured.", ""]
    lines += [line for r in chosen for line in (f"{title(r)}:", "", *targets(r))]
    return "\n".join(
        [*lines, "## What the columns mean", "", COLUMNS, "Generated by `python -m benchmarks.report`.", ""]
    )


def measured(same: Iterable[Case]) -> list[str]:
    """A row for each case and implementation."""
    rows: list[list[str]] = []
    for case, r in ((case, r) for case in same for r in case.records.values() if r.status != "skipped"):
        mark = "†" if (over(r.extra.get("host_ms"), r.time_ms) or 0) >= 0.9 else ""
        time = f"{number(r.time_ms)}{mark} ({number(r.time_low_ms)}–{number(r.time_high_ms)}; {r.rounds})"
        share = over(r.floor_ms, r.time_ms) or 0
        least = (
            f"{number(100 * share)} % of {number(r.floor_ms)}{', no lower bound' if share > 1 else ''}"
            if share
            else "–"
        )
        row = [escape(case.name), escape(r.impl), time if r.status == "ok" else r.status]
        row += [number(ratio(r, case.ok(), "time_ms"), "x"), least]
        row += [number(over(r.peak_bytes, 1e6)), number(ratio(r, case.ok(), "peak_bytes"), "x")]
        step = flat({name.replace("_", " "): r.extra[name] for name in STEP if name in r.extra})
        rows.append([*row, number(r.loss_error), number(r.grad_error), f"{escape(r.gives or '–')} {step}".strip()])
    heads = "case|implementation|time, ms|relative|floor, ms|memory, MB|relative|loss error|gradient error|returns"
    note = ["†: bound by the host launching kernels.", ""] if any("†" in row[2] for row in rows) else []
    return table(heads.split("|"), rows) + note


def series(results: Results) -> list[list[Case]]:
    """Cases that differ in N only, by increasing N."""
    found: dict[tuple[str, Shape], list[Case]] = defaultdict(list)
    for case in cases(results):
        found[case.suite, replace(case.shape, n=None)] += [case] if case.shape.n else []
    return list(found.values())


def scaling(results: Results) -> list[str]:
    """Exponents p of time and memory ~ N^p, by least squares between logarithms, where 3 sizes were measured."""
    rows = []
    for same in series(results):
        for impl in dict.fromkeys(impl for case in same for impl in case.records):
            ok = [r for case in same if (r := case.ok(impl)) and r.peak_bytes]
            x = [math.log(r.shape.n or 1) for r in ok]
            if len(set(x)) >= 3:
                both = [math.log(r.ms) for r in ok], [math.log(r.peak_bytes or 1) for r in ok]
                slopes = [f"{statistics.linear_regression(x, y).slope:.2f}" for y in both]
                sizes = f"{ok[0].shape.n}–{ok[-1].shape.n}"
                rows.append([ok[0].suite, escape(ok[-1].case), escape(impl), sizes, str(len(ok)), *slopes])
    return table(["suite", "largest case", "implementation", "N", "sizes", "time", "memory"], rows)


def unmeasured(results: Results) -> list[str]:
    """Each reason once, whatever numbers it holds, with the implementations."""
    found: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for r in results.records:
        if r.status != "ok":
            found[r.status, re.sub(r"[\d.]+", "#", r.reason or "no reason")].append(r)
    lines = []
    for (status, _), same in sorted(found.items()):
        who = ", ".join(f"{escape(impl)} ({n})" for impl, n in sorted(Counter(r.impl for r in same).items()))
        lines.append(f"- {status}: {escape(min(r.reason or 'no reason' for r in same))}: {who}")
    return lines


def page(results: Results, picture: bool) -> str:
    """All that a results file holds."""
    head, stem = results.header, results.path.stem
    lines = [
        f"# {title(results)}",
        "",
        *(f"- {escape(k)}: {flat(v)}" for k, v in head.items() if v and k not in HIDDEN),
    ]
    lines += ["- the time ran out before all was measured"] if head.get("finished") is False else []
    lines += [f"- **{emulated(results)}**"] if emulated(results) else []
    for what, name, again in ((OURS, "time_ms", "again_ms"), ("its floor", "floor_ms", "floor_again_ms")):
        if drift := [x for r in results.records if (x := over(r.extra.get(again), getattr(r, name)))]:
            middle = number(statistics.median(drift), "x")
            lines.append(f"- {what} measured again at the end: {middle} ({number(min(drift))}–{number(max(drift))})")
    if drawn(results):
        lines += [
            "",
            f"![time and memory against N]({stem}.png)" if picture else "No picture: matplotlib was not installed.",
        ]
    for key, same in groupby(cases(results), lambda c: f"{escape(c.suite)}, {escape(c.shape.dtype or '–')}"):
        lines += ["", f"## {key}", "", *measured(same)]
    for name, found in (head.get("profile") or {}).items():
        rows = [
            [escape(r["name"]), str(r["calls"]), *(number(r.get(k)) for k in ("ms", "gbps", "tflops"))]
            for r in found["rows"]
        ]
        lines += [f"## Where the time goes: {escape(name)}, {number(found['ms'])} ms on the device", ""]
        lines += table(["kernel", "calls", "ms", "GB/s", "TFLOP/s"], rows)
    for name, part in (("Scaling: exponents of N", scaling(results)), ("Not measured", unmeasured(results))):
        lines += [f"## {name}", "", *part] if part else []
    return "\n".join(lines).rstrip() + "\n"


def drawn(results: Results) -> list[Case]:
    """The series of the picture: the linear loss at the most sizes, the largest head; empty if there is none."""
    able = [same for same in series(results) if same[0].suite == "linear" and sum(c.ok() is not None for c in same) > 1]
    return max(
        able,
        key=lambda same: (sum(c.ok() is not None for c in same), (same[0].shape.v or 0) * (same[0].shape.h or 0)),
        default=[],
    )


def draw(results: Results, path: Path) -> bool:
    """Time and memory against N; False where there is nothing to draw, or no matplotlib."""
    same = drawn(results)
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not same:
        return False
    with matplotlib.rc_context({"text.parse_math": False, "axes.grid": True, "grid.color": "#dde1e6"}):
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        for axes, name, label in zip(
            figure.subplots(1, 2), ("time_ms", "peak_bytes"), ("time, ms", "memory, bytes"), strict=True
        ):
            for impl in dict.fromkeys(impl for case in same for impl in case.records):
                points = [(r.shape.n, getattr(r, name)) for case in same if (r := case.ok(impl)) and getattr(r, name)]
                width = 3 if impl == OURS else 1.5
                axes.plot(*zip(*points, strict=True), "o-", label=impl, linewidth=width) if points else None
            axes.set(xscale="log", yscale="log", xlabel="tokens N", ylabel=label)
        figure.suptitle(f"{results.header.get('device')}: {same[-1].name}")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
        figure.savefig(path, dpi=100)
    return True


def read(folder: Path) -> list[Results]:
    """All results files, GPUs first, then by date; ValueError if one cannot be reported."""
    found = [load(path) for path in sorted(folder.glob("*.json"))]
    for results in found:
        if emulated(results):  # then the time of the products is no floor
            useless = [r.floor == "gemms" and r.shape.dtype == "bfloat16" for r in results.records]
            results.records = [
                replace(r, floor_ms=None) if u else r for r, u in zip(results.records, useless, strict=True)
            ]
    if played := [str(r.path) for r in found if r.header.get("interpreted")]:
        raise ValueError(f"{', '.join(played)}: measured in Triton's interpreter, where times mean nothing")
    if not found:
        raise ValueError(f"no results file in {folder}: measure with python -m benchmarks.gpu or benchmarks.cpu")
    return sorted(found, key=lambda r: (on_gpu(r), str(r.header.get("date")), r.path.name), reverse=True)


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 if ``--check`` finds a difference; 2 if no report can be made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="folder of the results files")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the summary (default: RESULTS.md beside DIR)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page differs")
    options = parser.parse_args(argv)
    out = options.out or options.results.resolve().parent / "RESULTS.md"
    try:
        found = read(options.results)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    texts = {out: summary(found, Path(os.path.relpath(options.results, out.resolve().parent)).as_posix())}
    for results in found:
        png = results.path.with_suffix(".png")
        if not options.check and not draw(results, png):
            png.unlink(missing_ok=True)
        texts[results.path.with_suffix(".md")] = page(results, png.is_file())
    differ = False
    for path, text in texts.items():
        if not options.check:
            path.write_bytes(text.encode())
        elif (there := path.read_bytes().decode(errors="replace") if path.is_file() else "") != text:
            differ = True
            lines = difflib.unified_diff(there.splitlines(), text.splitlines(), str(path), "from the records", n=0)
            print("\n".join([*lines][:40]), file=sys.stderr)
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
