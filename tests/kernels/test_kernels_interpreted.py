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


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict[str, list[tuple[str, str]]]:
    """{file: [(test, "" or what went wrong)]} from one run of the folder."""
    xml = tmp_path_factory.mktemp("interpreted") / "report.xml"
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-p", "no:cacheprovider", f"--junitxml={xml}", "--tb=short"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FOLDER.parents[2], check=False)
    if not xml.exists():  # a crash, such as a read out of bounds, leaves no report
        pytest.fail(f"the interpreted run died with code {run.returncode}\n{run.stdout[-4000:]}\n{run.stderr[-4000:]}")
    results: dict[str, list[tuple[str, str]]] = {}
    for case in ElementTree.parse(xml).iter("testcase"):
        trouble = [*case.iter("failure"), *case.iter("error")]
        text = "\n".join(f"{t.get('message')}\n{t.text}" for t in trouble)
        if case.find("skipped") is None:
            results.setdefault(case.get("classname", "").rsplit(".", 1)[-1], []).append((case.get("name", ""), text))
    return results


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_interpreted(report, file):
    assert report.get(file), f"no test of {file} ran"
    failed = {name: text for name, text in report[file] if text}
    assert not failed, "\n\n".join(f"{name}\n{text[-1500:]}" for name, text in failed.items())
