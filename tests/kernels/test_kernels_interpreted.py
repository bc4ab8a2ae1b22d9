"""Run `device/` in Triton's interpreter, in one process of its own, and report it file by file."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import interpreted

pytest.importorskip("triton", reason="Triton is not installed: the kernels cannot be tested")

FOLDER = Path(__file__).parent / "device"
FILES = sorted(path.stem for path in FOLDER.glob("test_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_interpreted(file, tmp_path):
    interpreted.check(FOLDER / f"{file}.py", tmp_path)
