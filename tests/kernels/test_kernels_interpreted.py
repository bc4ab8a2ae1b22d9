"""Run `device/` in Triton's interpreter, in one process of its own, and report it file by file."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: the kernels cannot be tested")

FOLDER = Path(__file__).parent / "device"
FILES = sorted(path.stem for path in FOLDER.glob("test_*.py"))


def reason_to_skip() -> str | None:
    code = "import caop_kernels; print(caop_kernels.available('cpu') or '')"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return run.stdout.strip() or None


def run_interpreted(file: str, xml: Path) -> dict[str, str]:
    """{test that ran: "" or what went wrong} of one file."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(FOLDER / f"{file}.py"),
        "-p",
        "no:cacheprovider",
        f"--junitxml={xml}",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FOLDER.parents[2], check=False)
    if not xml.exists():  # a crash, such as a read out of bounds, leaves no report
        pytest.fail(f"the interpreted run died with code {run.returncode}\n{run.stdout[-4000:]}\n{run.stderr[-4000:]}")
    results = {}
    for case in ElementTree.parse(xml).iter("testcase"):
        if case.find("skipped") is None:
            trouble = [*case.iter("failure"), *case.iter("error")]
            results[case.get("name", "")] = "\n".join(f"{t.get('message')}\n{t.text}" for t in trouble)
    return results


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_interpreted(file, tmp_path):
    reason = reason_to_skip()
    if reason is not None:
        pytest.skip(reason)
    results = run_interpreted(file, tmp_path / "report.xml")
    assert results, f"no test of {file} ran"
    failed = {name: text for name, text in results.items() if text}
    assert not failed, "\n\n".join(f"{name}\n{text[-1500:]}" for name, text in failed.items())
