"""RESULTS.md and its pictures from the records in results/: the only way a figure gets there.

    python -m benchmarks.report                                 benchmarks/RESULTS.md, benchmarks/results/plots/*.png
    python -m benchmarks.report --check                         1 where RESULTS.md is not what the records give
    python -m benchmarks.report --results DIR --out FILE        elsewhere; pictures go to DIR/plots

The same records give the same bytes, on any machine.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import growth, plots, sections
from benchmarks.fits import chosen, sweeps
from benchmarks.groups import SUITES, by, groups
from benchmarks.records import RESULTS, Results, load
from benchmarks.tables import cut, escape, listed, number, over, plural, spread_of, table
from benchmarks.targets import targets

PLOTS = "plots"
FAILURES = 20  # of the correctness stage that are shown
DIFFERENCES = 40  # lines that --check prints
INTRODUCTION = """\
# Results

Written by `python -m benchmarks.report` from the records in `{folder}/`; `python -m benchmarks.report --check` fails if
a figure in it is any other than the records give. Newest first.

- **time**: median of a forward and backward, in ms; in brackets the 20 % and 80 % quantiles (of 3 rounds: the extremes)
  and the number of rounds, or the ratio to that of `caop_fast` (2x: takes twice as long).
- **floor**: the least the work can take, measured in the same run. "gemms": the bare matrix products; "copy": each
  input read once and each gradient written once, at the rate of a large copy. Share of floor is floor over time.
- **memory**: most bytes held at one time beyond the inputs; gradients of the inputs count. MB is 1e6 bytes, GB is 1e9.
- **GB/s**, **TFLOP/s**: bytes or operations of the floor over the time; **GB/s moved**: bytes that the implementation
  is known to read and write.
- **loss error**, **gradient error**: relative to float64, the largest of: loss of 64 tokens and of all, every gradient
  of 64 tokens as a whole, and of all tokens 64 rows of each gradient, tokens and ids from the first to the last.
- **skipped**: not installed or not made for the case; **oom**: out of memory; **wrong**: too far from float64, so not
  timed; **error**: raised; **crashed**: took the process with it; –: not run, or not known.
"""
NO_PICTURES = "Without pictures: matplotlib was not installed where this was written.\n"


class Refused(Exception):
    """There is nothing a report could be made of."""


def read(folder: Path) -> list[Results]:
    """All results files in ``folder``, newest first; ``Refused`` where one has no meaning for a report."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            results = load(path)
        except (OSError, ValueError) as error:
            raise Refused(str(error)) from error
        if results.header.get("interpreted"):
            raise Refused(f"{path} was measured in Triton's interpreter: its times mean nothing. Move it elsewhere.")
        found.append(results)
    if not found:
        raise Refused(f"no results file in {folder}: measure with python -m benchmarks.gpu or benchmarks.cpu")
    return sorted(found, key=lambda r: (str(r.header.get("date")), r.path.name), reverse=True)


def markdown(found: Sequence[Results], folder: Path, out: Path, *, pictures: bool) -> str:
    """The whole report, to be written to ``out``; with or without links to the pictures below ``folder``."""
    start = out.resolve().parent
    lines = INTRODUCTION.format(folder=_link(folder, start)).split("\n")
    lines += [] if pictures else NO_PICTURES.split("\n")
    rows = []
    for results in found:
        count = [t.met for t in targets(results)]
        ok = sum(r.status == "ok" for r in results.records)
        met = f"{count.count(True)} of {len(count)}" + (f" ({count.count(None)} not measured)" if None in count else "")
        name, when = escape(results.path.name), _date(results.header)
        rows.append([name, _device(results.header), when, str(len(results.records)), str(ok), met])
    lines += table(["file", "device", "date", "records", "measured", "targets met"], rows, left=3)
    plot_folder = _link(folder / PLOTS, start)
    for results in found:
        lines += section(results, plot_folder if pictures else None)
    return "\n".join(lines).rstrip("\n") + "\n"


def section(results: Results, plot_folder: str | None) -> list[str]:
    """One results file; ``plot_folder`` is where its pictures lie, None for none."""
    found = groups(results.records)
    lines = [f"## {_device(results.header)}, {_date(results.header)}", "", *header(results)]
    lines += target_table(results)
    pictures = by(plots.plan(results), lambda p: p.suite) if plot_folder is not None else {}
    for suite, same in by(found, lambda g: g.suite).items():
        lines += [f"### {escape(suite)}: {SUITES.get(suite, 'not known')}", ""]
        lines += sections.step(same) if suite == "step" else sections.summary(same)
        for picture in pictures.get(suite, []):
            lines += [f"![{escape(picture.alt)}]({plot_folder}/{picture.name})", ""]
        lines += sections.every_case(same) if suite != "step" else []
        lines += sections.reasons(same)
    every = sweeps(found)
    grown = growth.growth(chosen(every), len(every))
    return lines + (["### Growth", "", *grown] if grown else [])


def header(results: Results) -> list[str]:
    """Where and with what it was measured, what was right, and what the device reaches."""
    head = results.header
    versions = [f"{escape(k)} {escape(v)}" for k, v in sorted((head.get("versions") or {}).items()) if v is not None]
    driver = [
        f"driver {head['driver']}" if head.get("driver") else "",
        f"CUDA {head['cuda']}" if head.get("cuda") else "",
    ]
    driver += [f"ROCm {head['hip']}" if head.get("hip") else ""]
    rows = {
        "file": results.path.name,
        "date": head.get("date"),
        "device": head.get("device"),
        "driver": listed(filter(None, driver)),
        "platform": head.get("platform"),
        "commit": _commit(head),
        "command": head.get("command"),
        "threads": head.get("threads"),
        "instructions": head.get("cpu_capability") if head.get("device_type") == "cpu" else None,
        "note": head.get("note"),  # written by hand, where something is known of a run that its code did not know
    }
    lines = [f"- {name}: {escape(value)}" for name, value in rows.items() if value not in (None, "")]
    python = [f"python {escape(head['python'])}"] if head.get("python") else []
    lines += [f"- versions: {listed([*python, *versions])}"] if python or versions else []
    lines += _ceilings(head.get("ceilings")) + _correctness(head.get("correctness"))
    lines += _drift(results)
    if head.get("finished") is False:
        lines.append("- the time ran out before everything was measured")
    return [*lines, ""]


def _commit(head: dict[str, Any]) -> str:
    return f"{head.get('commit') or 'not known'}{' with uncommitted changes' if head.get('dirty') else ''}"


def _ceilings(ceilings: dict[str, Any] | None) -> list[str]:
    """Rates of a large copy and of large products."""
    if not ceilings:
        return []
    words = [f"copy {number(ceilings['copy_gbps'])} GB/s"] if ceilings.get("copy_gbps") is not None else []
    products = ceilings.get("gemm_tflops") or {}
    words += [f"GEMM {escape(k)} {number(v)} TFLOP/s" for k, v in sorted(products.items()) if v is not None]
    lines = [f"- measured ceilings: {listed(words)}"] if words else []
    narrow = ceilings.get("gemm_to_float32")
    if narrow:
        words = [f"{escape(name)} {'yes' if there else 'no'}" for name, there in narrow.items()]
        lines.append(f"- products of bfloat16 to float32, without which caop_fast makes another pass: {listed(words)}")
    return lines


def _drift(results: Results) -> list[str]:
    """What became of the first contender's time and of the floor while the others of a case ran."""
    lines = []
    for what, first, later in (("caop_fast", "time_ms", "again_ms"), ("the floor", "floor_ms", "floor_again_ms")):
        known = ((r.extra.get(later), getattr(r, first)) for r in results.records)
        ratios = [ratio for again, before in known if (ratio := over(again, before)) is not None]
        lines += [f"{what} {spread_of(ratios)}"] if ratios else []
    if not lines:
        return []
    return [f"- order: behind all other contenders of a case, over the first time of it: {listed(lines)}"]


def _correctness(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return ["- correctness: not checked in this run"]
    count = {name: found.get(name) or 0 for name in ("passed", "failed", "skipped")}
    failures = found.get("failures") or []
    line = f"- correctness: {count['passed']} passed, {count['failed']} failed, {count['skipped']} skipped"
    line += "; **the times below are of code that is wrong**" if count["failed"] or failures else ""
    lines = [line, *(f"  - failed: {escape(cut(str(text)))}" for text in failures[:FAILURES])]
    if len(failures) > FAILURES:
        lines.append(f"  - and {len(failures) - FAILURES} more in the file")
    skips = sorted((found.get("skips") or {}).items())
    return [*lines, *(f"  - skipped, {plural(count, 'check')}: {escape(cut(str(text)))}" for text, count in skips)]


def target_table(results: Results) -> list[str]:
    found = targets(results)
    cpu = results.header.get("device_type") == "cpu"
    lines = ["### Targets", ""]
    if cpu:
        lines += [
            "Measured on a CPU. The targets are stated for a GPU; of the four, the two that compare implementations "
            "are given here, at the largest case that most of them share.",
            "",
        ]
    if not found:
        return [*lines, "Not measured: no linear case with a time of caop_fast.", ""]
    rows = [[t.what, t.at, t.required, t.measured or "–", t.verdict, t.note] for t in found]
    return lines + table(["target", "case", "required", "measured", "verdict", "note"], rows, left=6)


def draw(found: Sequence[Results], folder: Path) -> list[Path]:
    """The pictures of all results files, below ``folder``."""
    made = []
    for results in found:
        for picture in plots.plan(results):
            made.append(folder / PLOTS / picture.name)
            plots.draw(picture, made[-1])
    return made


def check(found: Sequence[Results], folder: Path, out: Path) -> str | None:
    """None where ``out`` is what the records give, with or without pictures, and has those; else what is not."""
    try:
        there = out.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return f"{out} cannot be read: {error}"
    with_pictures = markdown(found, folder, out, pictures=True)
    if there == with_pictures:
        missing = [p.name for r in found for p in plots.plan(r) if not (folder / PLOTS / p.name).is_file()]
        return f"pictures are missing in {folder / PLOTS}: {listed(missing)}" if missing else None
    without = markdown(found, folder, out, pictures=False)
    if there == without:
        return None
    expected = without if NO_PICTURES in there else with_pictures
    lines = difflib.unified_diff(
        there.splitlines(), expected.splitlines(), str(out), "from the records", lineterm="", n=0
    )
    head = f"{out} is not what the records give; write it with python -m benchmarks.report"
    return "\n".join([head, *list(lines)[:DIFFERENCES]])


def _date(head: dict[str, Any]) -> str:
    return escape(str(head["date"])[:10]) if head.get("date") else "date not known"


def _device(head: dict[str, Any]) -> str:
    return escape(head.get("device") or "device not known")


def _link(path: Path, start: Path) -> str:
    return Path(os.path.relpath(path.resolve(), start)).as_posix()


def main(argv: list[str] | None = None) -> int:
    """0; 1 where ``--check`` finds a difference; 2 where no report can be made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="folder of the results files")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the report (RESULTS.md beside DIR)")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; 1 if the report is not what the records give"
    )
    options = parser.parse_args(argv)
    out = options.out if options.out is not None else options.results.resolve().parent / "RESULTS.md"
    try:
        found = read(options.results)
    except Refused as error:
        if options.check and not out.exists() and not list(options.results.glob("*.json")):
            print("no results and no report: nothing to check")
            return 0
        print(error, file=sys.stderr)
        return 2
    if options.check:
        wrong = check(found, options.results, out)
        print(wrong or f"{out} is what the records give", file=sys.stderr if wrong else sys.stdout)
        return 1 if wrong else 0
    reason = plots.unavailable()
    made = draw(found, options.results) if reason is None else []
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(markdown(found, options.results, out, pictures=reason is None).encode("utf-8"))
    print(
        f"{out}: {plural(len(found), 'results file')}, "
        + (f"{len(made)} pictures" if reason is None else f"no pictures: {reason}")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
