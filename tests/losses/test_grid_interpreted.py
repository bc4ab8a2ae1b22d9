"""Run `grid/` on the Triton backend in the interpreter, in one process of its own, and report it file by file."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import interpreted

pytest.importorskip("triton", reason="Triton is not installed: there is one backend only")

FOLDER = Path(__file__).parent / "grid"
FILES = sorted(path.stem for path in FOLDER.glob("test_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_interpreted(file, tmp_path, request):
    arguments = ["--full-grid"] if request.config.getoption("--full-grid") else []
    interpreted.check(FOLDER / f"{file}.py", tmp_path, *arguments)
