"""Run `device/` in Triton's interpreter, each file in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import interpreted

pytest.importorskip("triton", reason="Triton is not installed: the kernels cannot be tested")

pytestmark = pytest.mark.long

FOLDER = Path(__file__).parent / "device"
FILES = sorted(path.stem for path in FOLDER.glob("test_*.py"))


SLOW = {"test_kernel_tuning": pytest.mark.slow}  # left to make test-full


@pytest.mark.parametrize("file", [pytest.param(file, marks=SLOW.get(file, ())) for file in FILES])
def test_interpreted(file, tmp_path):
    interpreted.check(FOLDER / f"{file}.py", tmp_path)
