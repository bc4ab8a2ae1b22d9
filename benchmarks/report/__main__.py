"""Command line of the report: see ``benchmarks.report``."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import report
from benchmarks.records import RESULTS, Results, load
from benchmarks.report import plots
from benchmarks.report.page import NO_PICTURES, PLOTS, markdown
from benchmarks.report.tables import listed, plural

DIFFERENCES = 40  # lines that --check prints


class Refused(Exception):
    """No report can be made."""


def read(folder: Path) -> list[Results]:
    """All results files in ``folder``, newest first; ``Refused`` if one cannot be reported."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            results = load(path)
        except (OSError, ValueError) as error:
            raise Refused(str(error)) from error
        if results.header.get("interpreted"):
            raise Refused(f"{path} was measured in Triton's interpreter, where times mean nothing. Move it elsewhere.")
        found.append(results)
    if not found:
        raise Refused(f"no results file in {folder}: measure with python -m benchmarks.gpu or benchmarks.cpu")
    return sorted(found, key=lambda r: (str(r.header.get("date")), r.path.name), reverse=True)


def draw(found: Sequence[Results], folder: Path) -> list[Path]:
    """Draw the plots of all results files below ``folder``."""
    made = []
    for results in found:
        for picture in plots.plan(results):
            made.append(folder / PLOTS / picture.name)
            plots.draw(picture, made[-1])
    return made


def check(found: Sequence[Results], folder: Path, out: Path) -> str | None:
    """None if ``out`` is what the records give, with or without plots, and these exist; else the difference."""
    try:
        there = out.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return f"{out} cannot be read: {error}"
    with_pictures = markdown(found, folder, out, pictures=True)
    if there == with_pictures:
        missing = [p.name for r in found for p in plots.plan(r) if not (folder / PLOTS / p.name).is_file()]
        return f"plots are missing in {folder / PLOTS}: {listed(missing)}" if missing else None
    without = markdown(found, folder, out, pictures=False)
    if there == without:
        return None
    expected = without if NO_PICTURES in there else with_pictures
    lines = difflib.unified_diff(
        there.splitlines(), expected.splitlines(), str(out), "from the records", lineterm="", n=0
    )
    head = f"{out} is not what the records give; write it with python -m benchmarks.report"
    return "\n".join([head, *list(lines)[:DIFFERENCES]])


def main(argv: list[str] | None = None) -> int:
    """0; 1 if ``--check`` finds a difference; 2 if no report can be made."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.report", description=report.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="folder of the results files")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the report (default: RESULTS.md beside DIR)")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 if the report differs from the records"
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
        + (f"{len(made)} plots" if reason is None else f"no plots: {reason}")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
