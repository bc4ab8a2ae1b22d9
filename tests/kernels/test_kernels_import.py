"""The package imports without Triton, says why it cannot run, and depends on nothing above it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "kernels" / "caop_kernels"


def python(code: str, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], env={**env, **environment}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_works_where_triton_is_absent():
    out = python(
        "import sys; sys.modules['triton'] = None\n"
        "import caop_kernels\n"
        "print(caop_kernels.available('cuda'))\n"
        "print(caop_kernels.available('cpu'))\n"
        "try: caop_kernels.row_statistics\n"
        "except ImportError as error: print('refused:', error)\n"
        "try: caop_kernels.no_such_name\n"
        "except AttributeError as error: print('unknown:', error)\n"
    ).splitlines()
    assert "pip install" in out[0]
    assert "pip install" in out[1]
    assert out[2].startswith("refused: caop_kernels.row_statistics needs Triton")
    assert out[3].startswith("unknown:")


def test_importing_does_not_import_triton_or_caop_fast():
    out = python(
        "import sys, caop_kernels\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('triton', 'caop_fast')])"
    )  # fmt: skip
    assert out.strip() == "[]"


def test_cpu_tensors_without_the_interpreter_are_a_clear_error():
    pytest.importorskip("triton")
    out = python(
        "import torch, caop_kernels\n"
        "for device in ('cpu', 'cuda', 'mps'): print(caop_kernels.available(device))\n"
        "try: caop_kernels.row_statistics(torch.zeros(1, 8), torch.zeros(1, 8))\n"
        "except RuntimeError as error: print(error)\n"
    ).splitlines()
    assert "TRITON_INTERPRET=1" in out[0]
    assert out[1] == "None"
    assert "mps" in out[2]
    assert out[3] == out[0]


def test_the_interpreter_makes_cpu_available():
    pytest.importorskip("triton")
    out = python("import caop_kernels; print(caop_kernels.available('cpu'))", TRITON_INTERPRET="1").strip()
    if "does not work with NumPy" in out:
        pytest.skip(out)
    assert out == "None"


def test_nothing_of_caop_fast_is_imported_anywhere():
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] == "caop_fast"], path


def test_the_folder_kernels_is_no_package():
    """A regular package called `kernels` would shadow the one that transformers probes for."""
    assert not (PACKAGE.parent / "__init__.py").exists()


def test_every_launcher_is_exported():
    pytest.importorskip("triton")
    out = python(
        "import caop_kernels\n"
        "for name in caop_kernels.__all__: print(name, getattr(getattr(caop_kernels, name), '__name__', name))"
    )
    names = [line.split() for line in out.splitlines()]
    assert len(names) >= 20
    assert [pair for pair in names if pair[0] != pair[1]] == []
