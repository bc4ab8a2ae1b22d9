"""Run `grid/` on the Triton backend in the interpreter, each part of a file in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import interpreted

pytest.importorskip("triton", reason="Triton is not installed: there is one backend only")

FOLDER = Path(__file__).parent / "grid"
PARTS = {"test_grid_linear_narrow": 2}  # processes for files that take long; one for the others
FILES = sorted(path.stem for path in FOLDER.glob("test_*.py"))


@pytest.mark.spread
@pytest.mark.parametrize(("file", "part"), interpreted.parts(FILES, PARTS))
def test_interpreted(file, part, tmp_path, request):
    arguments = ["--full-grid"] if request.config.getoption("--full-grid") else []
    interpreted.check(FOLDER / f"{file}.py", tmp_path, "--part", part, *arguments)
