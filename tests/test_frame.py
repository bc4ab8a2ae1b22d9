"""The project's own frame: what is packaged, what the Makefile needs, what the README promises."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from helpers.public_api import public_api

ROOT = Path(__file__).resolve().parent.parent


def test_the_wheel_holds_both_packages_and_nothing_else(tmp_path):
    pytest.importorskip("hatchling", reason="building the wheel needs hatchling (the extra dev)")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
    packages = {n.split("/")[0] for n in names if ".dist-info" not in n}
    assert packages == {"caop_fast", "caop_kernels"}
    assert {"caop_fast/py.typed", "caop_kernels/py.typed", "caop_fast/cli.py"} <= set(names)
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_the_kernels_folder_does_not_shadow_the_hubs_kernels_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import kernels, sys; sys.exit(getattr(kernels, '__file__', None) is not None)"  # a namespace has no file
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == 0


def dry_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """``make -n``, as if typed in a shell: the variables of a `make` that runs these tests are not passed on."""
    outer = ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "PYTHON", "PIP_ARGS", "ARGS")
    env = {name: value for name, value in os.environ.items() if name not in outer}
    return subprocess.run(["make", "-n", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=True)


@pytest.mark.parametrize(
    ("target", "extra"), [("demo", "demo"), ("test", "dev"), ("lint", "dev"), ("bench-quick", "bench")]
)
def test_make_needs_python_pip_and_make_only(target, extra):
    """From nothing: the environment without ensurepip, a pip put into it by any old pip, then the packages, visibly."""
    done = dry_run(target, "VENV=does-not-exist", "PIP_ARGS=--extra-index-url=https://example.org")
    lines = [line for line in done.stdout.replace("\\\n", "").splitlines() if not line.startswith("echo")]
    assert lines[0] == "python3 -m venv --without-pip does-not-exist"
    assert lines[1].startswith("target=$(does-not-exist/bin/python -c ")
    bootstrap = lines[1].partition("&& ")[2]
    assert bootstrap.startswith("python3 -m pip install ")
    assert bootstrap.endswith("""--target "$target" --extra-index-url=https://example.org 'pip>=23'""")
    assert "--python" not in done.stdout, "unknown before pip 22.3"
    assert lines[2] == "touch does-not-exist/.pip-ready"
    assert lines[3].startswith("does-not-exist/bin/python -m pip install --progress-bar on -c constraints.txt")
    assert lines[3].endswith(f'--extra-index-url=https://example.org -e ".[{extra}]"')
    assert "quiet" not in lines[3]


def test_an_interrupted_setup_is_repaired(tmp_path):
    """An environment without its stamp is set up again; one with it is left alone."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    for stamped in (False, True):
        if stamped:
            (tmp_path / ".pip-ready").touch()
        done = dry_run("test", f"VENV={tmp_path}")
        assert ("-m venv" in done.stdout) is not stamped
        assert ".[dev]" in done.stdout


def test_the_heavy_packages_are_extras():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    core = re.search(r"\ndependencies = \[(.*?)\n\]", text, re.DOTALL).group(1)
    assert re.findall(r'"([a-z-]+)', core) == ["torch", "triton", "transformers", "numpy"]
    for extra in ("demo", "train", "audit", "test", "bench", "flash", "dev"):
        assert re.search(rf"^{extra} = \[", text, re.MULTILINE), extra


PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md"))]


def test_public_names_and_signatures_are_those_of_the_record():
    assert public_api() == json.loads((ROOT / "tests" / "public_api.json").read_text(encoding="utf-8"))


def layout_paths(tree: str) -> list[str]:
    """The files and folders that a layout names; a line's folder holds the files its description names."""
    found, parents = [], {}  # parents: {indentation: folder}
    folder = ""
    for line in tree.splitlines():
        names = re.findall(r"[\w/]+(?:\.py|/)(?=[\s,)]|$)", line)
        indentation = len(line) - len(line.lstrip())
        if indentation < 20:  # further in: the description above goes on
            above = "".join(parents[i] for i in sorted(parents) if i < indentation)
            folder = above
            if names and names[0].endswith("/"):
                parents = {i: name for i, name in parents.items() if i < indentation} | {indentation: names[0]}
                folder = above + names[0]
                found.append(folder)
                names = names[1:]
        found += [folder + name for name in names]
    return found


class TestReadme:
    text = (ROOT / "README.md").read_text(encoding="utf-8")

    @pytest.mark.parametrize("page", PAGES)
    def test_its_code_runs(self, page, tmp_path):
        """Every Python block by itself, but for those marked `untested`, which the page says."""
        text = (ROOT / page).read_text(encoding="utf-8")
        assert text.count("```python untested") == text.count("**not tested here**")
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            done = subprocess.run(
                [sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{block}\n{done.stderr}"

    def test_every_path_of_its_layout_exists(self):
        tree = re.search(r"## Repository layout.*?```\w*\n(.*?)```", self.text, re.DOTALL).group(1)
        named = layout_paths(tree)
        assert len(named) > 20
        assert [path for path in named if not (ROOT / path).exists()] == []

    def test_every_file_it_names_exists(self):
        for target in re.findall(r"\]\(([^)#]+)\)", self.text):
            if not target.startswith("http"):
                assert (ROOT / target).exists(), target

    def test_its_table_is_that_of_the_record(self):
        record = json.loads((ROOT / "docs" / "demo_pronounce.json").read_text(encoding="utf-8"))["readings"]
        rows = dict(re.findall(r"^\| `?(base|opd|caop|direct|masked)`? \|(.*)\|$", self.text, re.MULTILINE))
        assert set(rows) == {"base", "opd", "caop", "direct", "masked"}
        columns = [("sampled", m) for m in ("accuracy_all", "mean_confidence", "ece_upper", "spr")]
        columns += [("expected", "ece_upper"), ("greedy", "accuracy_all"), ("greedy", "ece_upper")]
        for name, row in rows.items():
            shown = [float(cell) for cell in re.findall(r"\d+\.\d+", row)]
            values = [record[reading][name][metric] for reading, metric in columns]
            assert shown == [pytest.approx(sum(v) / len(v), abs=5.1e-4) for v in values], name

    def test_its_commands_are_real(self):
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for target in set(re.findall(r"(?:^|`)make ([a-z-]+)", self.text, re.MULTILINE)):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
        for command in set(re.findall(r"(?:^|`)caop-fast ([a-z]+)", self.text, re.MULTILINE)):
            done = subprocess.run(
                [sys.executable, "-m", "caop_fast.cli", command, "--help"], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, command
