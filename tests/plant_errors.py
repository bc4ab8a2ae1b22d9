"""Plant errors in a copy of the project, one at a time, and demand that the named test fails for each.

    python tests/plant_errors.py              every planted error (a few minutes)
    python tests/plant_errors.py --per-item 1 one for each part of the project
    python tests/plant_errors.py --only splice

A test suite that passes says little until it has been seen to fail. The errors are in `planted_errors.json`: the part
they belong to, the file, the text to replace (it must occur exactly once), its replacement, and the test.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = (
    "caop_fast",
    "kernels",
    "tests",
    "benchmarks",
    "docs",
    "pyproject.toml",
    "Makefile",
    "README.md",
    "constraints.txt",
)
TIMEOUT = 300  # seconds for one test


@dataclass(frozen=True)
class Plant:
    """One planted error; `test` is a pytest node id that must fail with it."""

    item: str
    file: str
    old: str
    new: str
    test: str

    def __str__(self) -> str:
        return f"{self.item}: {self.file}: {self.old.strip()[:60]!r} -> {self.new.strip()[:60]!r}"


def load() -> list[Plant]:
    """The recorded errors."""
    return [
        Plant(**entry) for entry in json.loads((ROOT / "tests" / "planted_errors.json").read_text(encoding="utf-8"))
    ]


def verdict(plant: Plant, tree: Path) -> str | None:
    """Plant the error in `tree`, run its test, take it out again; None when the test failed, else a complaint."""
    path = tree / plant.file
    original = path.read_text(encoding="utf-8")
    if original.count(plant.old) != 1:
        return f"the text to replace occurs {original.count(plant.old)} times, not once"
    path.write_text(original.replace(plant.old, plant.new), encoding="utf-8")
    try:
        # The kernels' own tests run in this process, so it is the one that must interpret them.
        interpret = {"TRITON_INTERPRET": "1"} if "kernels/device/" in plant.test else {}
        paths = os.pathsep.join([str(tree), str(tree / "kernels")])
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", plant.test],
            cwd=tree,
            env={
                **os.environ,
                "PYTHONPATH": paths,
                "PYTHONDONTWRITEBYTECODE": "1",
                "OMP_NUM_THREADS": "1",
                **interpret,
            },
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    finally:
        path.write_text(original, encoding="utf-8")
    if done.returncode == 0:
        return f"{plant.test} still passes"
    if done.returncode != 1:  # 1 is "tests failed"; anything else means that none ran
        return f"{plant.test} did not run (pytest exit {done.returncode}): {done.stdout[-400:]}{done.stderr[-400:]}"
    return None


def main() -> int:
    """Run the chosen plants; 0 when every one was caught."""
    # A background job inherits an ignored Ctrl-C, and so would the tests of what Ctrl-C does.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per-item", type=int, metavar="N", help="only the first N (that match) of each part")
    parser.add_argument("--only", default="", metavar="TEXT", help="only errors whose part or file contains TEXT")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="tests at a time (all cores)")
    options = parser.parse_args()
    plants, taken = [], {}
    for plant in load():
        if options.only not in plant.item + plant.file:
            continue
        taken[plant.item] = taken.get(plant.item, 0) + 1
        if options.per_item is None or taken[plant.item] <= options.per_item:
            plants.append(plant)
    if not plants:
        print(f"no planted error matches --only {options.only!r}", file=sys.stderr)
        return 2
    escaped = 0
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        local = threading.local()

        def run(plant: Plant) -> str | None:
            if not hasattr(local, "tree"):  # one copy of the project for each worker
                local.tree = Path(tempfile.mkdtemp(dir=folder))
                for name in COPIED:
                    source = ROOT / name
                    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
                    if source.is_dir():
                        shutil.copytree(source, local.tree / name, ignore=ignored)
                    else:
                        shutil.copy2(source, local.tree / name)
            return verdict(plant, local.tree)

        with ThreadPoolExecutor(options.jobs) as pool:
            for plant, complaint in zip(plants, pool.map(run, plants), strict=True):
                escaped += complaint is not None
                print(f"{'caught ' if complaint is None else 'ESCAPED'}  {plant}", flush=True)
                if complaint:
                    print(f"         {complaint}", flush=True)
    print(f"{len(plants) - escaped} passed, {escaped} failed")
    return 1 if escaped else 0


if __name__ == "__main__":
    sys.exit(main())
