"""Run `device/` in Triton's interpreter, each part of a file in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import interpreted

pytest.importorskip("triton", reason="Triton is not installed: the kernels cannot be tested")

FOLDER = Path(__file__).parent / "device"
PARTS = {"test_kernel_topk": 3}  # processes for files that take long; one for the others
FILES = sorted(path.stem for path in FOLDER.glob("test_*.py"))


@pytest.mark.spread
@pytest.mark.parametrize(("file", "part"), interpreted.parts(FILES, PARTS))
def test_interpreted(file, part, tmp_path):
    interpreted.check(FOLDER / f"{file}.py", tmp_path, "--part", part)
