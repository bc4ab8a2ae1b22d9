"""Print what the compiler makes of each kernel variant: `python -m tools.kernel_resources [--target sm_90 ...]`.

Needs Triton and no GPU. With --json the same figures, in the form of the budget that the tests hold the kernels to.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caop_kernels.backend import missing_triton

if TYPE_CHECKING:
    from tools.kernel_resources.listing import Resources
    from tools.kernel_resources.variant import Variant


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, read and print; returns a process exit code."""
    reason = missing_triton()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 1
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        print("TRITON_INTERPRET=1 is set: interpreted kernels cannot be compiled; unset it", file=sys.stderr)
        return 1
    from tools.kernel_resources.catalogue import variants
    from tools.kernel_resources.compile import TARGETS, survey

    parser = argparse.ArgumentParser(prog="python -m tools.kernel_resources", description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", choices=list(TARGETS), default=["sm_80", "sm_90"])
    parser.add_argument("--variant", default="", help="only variants whose name contains this")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="only variants of these names")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument(
        "--beside", type=Path, metavar="FILE", help="JSON of another Triton, printed with what this one takes more of"
    )
    parser.add_argument("--no-fp-fusion", action="store_true", help="as if floating-point fusion were off")
    options = parser.parse_args(arguments)

    chosen = {variant.name: variant for variant in variants() if options.variant in variant.name}
    if not chosen:
        parser.error(f"no variant's name contains {options.variant!r}")
    if options.variants is not None:
        if unknown := set(options.variants) - set(chosen):
            parser.error(f"no variant is called {', '.join(sorted(unknown))}")
        chosen = {name: chosen[name] for name in options.variants}
    table = survey(list(chosen), options.target, fp_fusion=not options.no_fp_fusion)
    if options.json or options.beside:
        import triton

        figures = {t: {name: _record(chosen[name], r) for name, r in found.items()} for t, found in table.items()}
        record = {"triton": triton.__version__, "targets": figures, "beside": {}}
        if options.beside:
            record = json.loads(options.beside.read_text())
            record["beside"][triton.__version__] = {t: exceeding(f, record["targets"][t]) for t, f in figures.items()}
        print(_layout(record))
        return 0
    print(f"{'target':8} {'variant':42} {'registers':>9} {'spills':>6} {'instr/pair':>14} {'loop sync':>9}  loads")
    for target, found in table.items():
        for name, r in found.items():
            loads = ", ".join(f"{n} x {bits} bit" for bits, n in Counter(r.load_bits).items()) or "-"
            count = f"{r.per_pair:.1f}" if r.pairs else f"({r.instructions} in all)"
            print(f"{target:8} {name:42} {r.registers:9d} {r.spills:6d} {count:>14} {r.synchronisations:9d}  {loads}")
    return 0


def exceeding(figures: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Those of one target's figures that take over 5 % more registers or instructions than recorded."""
    return {
        name: row
        for name, row in figures.items()
        if any(row[key] > 1.05 * recorded[name][key] for key in ("registers", "instructions"))
    }


def _layout(record: Mapping[str, Any]) -> str:
    """JSON with one variant per line, so that a change reads well in a diff."""

    def targets(found: Mapping[str, Any]) -> str:
        parts = []
        for target, rows in found.items():
            lines = ",\n".join(f"   {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
            parts.append(f"  {json.dumps(target)}: {{\n{lines}\n  }}")
        return ",\n".join(parts)

    beside = ",\n".join(f"  {json.dumps(v)}: {{\n{targets(found)}\n  }}" for v, found in record["beside"].items())
    return (
        f'{{\n "triton": {json.dumps(record["triton"])},\n "targets": {{\n{targets(record["targets"])}\n }},\n'
        f' "beside": {{\n{beside}\n }}\n}}'
    )


def _record(variant: Variant, found: Resources) -> dict[str, object]:
    """One row as JSON. `instructions` is per pair where there is a main loop, else of the whole kernel; `per_id` of one
    listed id, already in it."""
    return {
        "registers": found.registers,
        "instructions": found.per_pair or found.instructions,
        **({"per_id": found.per_id} if found.per_id else {}),
        "spills": found.spills,
        "pairs": found.pairs,
        "load_bits": list(found.load_bits),
        "synchronisations": found.synchronisations,
        "aligned": variant.aligned,
        "float64": variant.double,
    }


if __name__ == "__main__":
    sys.exit(main())
