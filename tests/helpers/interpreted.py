"""Runs test files in Triton's interpreter, in a process of their own: Triton decides at import time what it does."""

from __future__ import annotations

import functools
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from helpers import subprocesses

ROOT = subprocesses.ROOT


def environment() -> dict[str, str]:
    """The environment of a process whose Triton functions run on CPU tensors."""
    return subprocesses.environment(TRITON_INTERPRET="1", PYTHONWARNINGS="ignore")


@functools.cache
def reason_to_skip() -> str | None:
    """Why the interpreter cannot run here; None when it can."""
    code = "import caop_kernels; print(caop_kernels.available('cpu') or '')"
    run = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    return run.stdout.strip() or None


def run(file: Path, xml: Path, *arguments: str) -> dict[str, str]:
    """{test that ran: "" or what went wrong} of one test file; ``arguments`` go to pytest, the report to ``xml``."""
    command = [sys.executable, "-m", "pytest", str(file), "-p", "no:cacheprovider", f"--junitxml={xml}", *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, cwd=ROOT, check=False)
    if not xml.exists():  # a crash, such as a read out of bounds, leaves no report
        pytest.fail(
            f"the interpreted run died with code {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        )
    results = {}
    for case in ElementTree.parse(xml).iter("testcase"):
        if case.find("skipped") is None:
            trouble = [*case.iter("failure"), *case.iter("error")]
            results[case.get("name", "")] = "\n".join(f"{t.get('message')}\n{t.text}" for t in trouble)
    return results


def check(file: Path, folder: Path, *arguments: str) -> None:
    """Fail unless the tests of ``file`` pass in the interpreter; the report goes to ``folder``."""
    reason = reason_to_skip()
    if reason is not None:
        pytest.skip(reason)
    results = run(file, folder / "report.xml", *arguments)
    assert results, f"no test of {file.name} ran"
    failed = {name: text for name, text in results.items() if text}
    assert not failed, "\n\n".join(f"{name}\n{text[-3000:]}" for name, text in failed.items())
