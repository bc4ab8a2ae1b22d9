"""Run `grid/` on the Triton backend in the interpreter, each file in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import interpreted

pytest.importorskip("triton", reason="Triton is not installed: there is one backend only")

pytestmark = pytest.mark.long

FOLDER = Path(__file__).parent / "grid"
FILES = sorted(path.stem for path in FOLDER.glob("test_*.py"))


SLOW = {"test_grid_gradcheck": pytest.mark.slow}  # left to make test-full; PyTorch's backend is checked in any case


@pytest.mark.parametrize("file", [pytest.param(file, marks=SLOW.get(file, ())) for file in FILES])
def test_interpreted(file, tmp_path, request):
    arguments = ["--full-grid"] if request.config.getoption("--full-grid") else []
    interpreted.check(FOLDER / f"{file}.py", tmp_path, *arguments)
