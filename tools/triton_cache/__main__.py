"""``python -m tools.triton_cache {record,compile,pack,unpack,check}``; see the package's documentation."""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tools.triton_cache
from tools.triton_cache import compiling, journal
from tools.triton_cache.pack import environment, foreign, pack, unpack

ROOT = Path(__file__).parents[2]
SHOWN = 10  # tests or errors that are printed


def main() -> int:
    options = arguments()
    return VERBS[options.verb](options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.triton_cache", description=tools.triton_cache.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, told in (
        ("record", "run Python without a GPU and record which variants it would JIT on one"),
        ("check", "run Python without a GPU and tell which variants a cache lacks, compiling them into it"),
    ):
        made = verbs.add_parser(verb, help=told)
        made.add_argument("--out" if verb == "record" else "--cache", type=Path, required=True)
        made.add_argument("arguments", nargs="+", help="of Python, after --: -m MODULE ... or SCRIPT ...")
    made = verbs.add_parser("compile", help="compile recorded variants for sm_90")
    made.add_argument("recordings", type=Path, nargs="+")
    made.add_argument("--cache", type=Path, required=True)
    made.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    for verb, told in (("pack", "write a cache to a .tar.xz"), ("unpack", "add such a file to a cache")):
        made = verbs.add_parser(verb, help=told)
        made.add_argument("file", type=Path)
        made.add_argument("--cache", type=Path, required=True)
    return parser.parse_args()


def run(options: argparse.Namespace, **changes: str) -> list[dict[str, Any]]:
    """What the processes of a command wrote."""
    options_of_pytest = f"{os.environ.get('PYTEST_ADDOPTS', '')} --assert=plain -p tools.triton_cache.recording"
    paths = [str(Path(__file__).parent / "startup"), str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]
    with tempfile.TemporaryDirectory() as folder:
        changes |= {
            journal.FOLDER: folder, "PYTHONOPTIMIZE": "1",
            "PYTEST_ADDOPTS": options_of_pytest, "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }  # fmt: skip
        inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        code = subprocess.run([sys.executable, *options.arguments], env=inherited | changes).returncode
        found = list(journal.read(Path(folder)))
    ended = [line for line in found if "ended" in line]
    print(f"exit code {code}; {len(ended)} tests ended early, so what they launch later is not known")
    for line in ended[:SHOWN]:
        print(f"  {line['ended']}: {line['error']}")
    return found


def record(options: argparse.Namespace) -> int:
    lines = run(options)
    variants = list({line["data"]: line for line in lines if "data" in line}.values())
    found = {"variants": variants, "ended": [line for line in lines if "ended" in line]}
    options.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(f"{len(variants)} variants of {len({line['kernel'] for line in variants})} kernels in {options.out}")
    return 0 if variants else 1


def check(options: argparse.Namespace) -> int:
    lines = run(options, **{journal.CACHED: "1", "TRITON_CACHE_DIR": str(options.cache.absolute())})
    asked = {line["hash"] for line in lines if "hash" in line}
    lacked = {line["hash"]: line["kernel"] for line in lines if line.get("hit") is False}  # others may find it later
    kernels = dict(collections.Counter(lacked.values()))
    print(f"{len(asked) - len(lacked)} variants found in {options.cache}, {len(lacked)} not: {kernels}")
    return 0 if asked and not lacked else 1


def compile_(options: argparse.Namespace) -> int:
    recorded = [line for path in options.recordings for line in json.loads(path.read_text())["variants"]]
    variants = list({line["data"]: line for line in recorded}.values())
    outcomes, failures, seconds = collections.Counter[str](), [], 0.0
    for done, (variant, outcome, spent) in enumerate(
        compiling.compile_variants(variants, options.cache.absolute(), options.processes), 1
    ):
        seconds += spent
        outcomes[outcome if outcome in ("found", "compiled") else "failed"] += 1
        failures += [f"{variant['kernel']}: {outcome}"] if outcome not in ("found", "compiled") else []
        if done % 100 == 0 or done == len(variants):
            print(f"{done} of {len(variants)}: {dict(outcomes)}, {seconds:.0f} s of CPU time", flush=True)
    print("\n".join(failures[:SHOWN]), end="\n" if failures else "")
    return 1 if failures else 0


def pack_(options: argparse.Namespace) -> int:
    manifest = pack(options.cache, options.file)
    print(json.dumps(manifest, indent=1), f"{options.file}: {options.file.stat().st_size} bytes", sep="\n")
    return 0


def unpack_(options: argparse.Namespace) -> int:
    manifest = unpack(options.file, options.cache)
    print(f"{manifest['variants']} variants of commit {manifest['commit']}, {manifest['date']}, in {options.cache}")
    print("export " + " ".join(f"{name}={value}" for name, value in environment(options.cache).items()))
    for name, (theirs, ours) in foreign(manifest).items():
        print(f"no use here, all will be compiled: {name} is {ours}, it was compiled with {theirs}")
    return 0


VERBS = {"record": record, "check": check, "compile": compile_, "pack": pack_, "unpack": unpack_}

if __name__ == "__main__":
    sys.exit(main())
