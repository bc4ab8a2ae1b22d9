"""tools.triton_cache: variants recorded without a GPU, compiled and packed, are those that the JIT asks for."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from triton.runtime import jit

from tools.triton_cache import keys, pack

ROOT = Path(__file__).parents[1]
ASKS = """
import os
import pytest
import torch
import triton
import triton.language as tl
import caop_kernels

def test_a_kernel_of_the_product():
    confidence = torch.rand(300, device="cuda")
    assert confidence.device.type == "cuda" and confidence.is_cuda and torch.cuda.is_available()
    edges = torch.linspace(0, 1, 11, dtype=torch.float64, device=confidence.device)
    count, *_ = caop_kernels.bin_sums(confidence, confidence > 0.5, edges)
    assert count.sum() == 300, "stripped, like what pytest.raises expects of an assertion"
    with pytest.raises(AssertionError):
        assert False
    torch.testing.assert_close(count, count + 1)
    caop_kernels.bin_sums(confidence.bfloat16()[1:], confidence[1:] > 0.5, edges)
    moved = torch.rand(3, 300)[1:, 1:290].to("cuda")
    if moved.data_ptr() % 16 or moved.stride() != (289, 1) or confidence.cuda() is not confidence:
        raise ValueError("not laid out as a copy from the CPU is on a GPU")

@triton.jit
def scale(x_ptr, n, FACTOR: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr):
    at = tl.arange(0, 128)
    x = tl.load(x_ptr + at, mask=at < n).to(DTYPE)
    if KIND == "scaled":
        x *= FACTOR
    tl.store(x_ptr + at, x, mask=at < n)

def test_a_kernel_of_the_test():
    x = torch.ones(128, device="cuda")
    for factor in os.environ["FACTORS"].split():
        scale[1,](x, 128, float(factor), "scaled", tl.float64, num_warps=2, enable_fp_fusion=False)
    x.add_(torch.mm(x.bfloat16()[None], x.bfloat16()[:, None], out_dtype=torch.float32)[0])
    assert x[0] == 129
    if x[0] != 129:
        raise ValueError("not emulated")

class Inaccurate(AssertionError):
    pass

def compare(x):
    if x[0] != 2:
        raise Inaccurate("a comparison of the project's own")

def test_a_comparison():
    compare(torch.ones(1))
    scale[1,](torch.ones(128, device="cuda").half(), 128, 1.0, "scaled", tl.float32)

def test_that_ends_early():
    raise AssertionError("not in a function that compares")
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a verb on the tests ASKS, in a process of its own."""
    Path(tmp_path, "test_asks.py").write_text(ASKS, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")]))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)

    def run(*arguments: str, factors: str = "2.5") -> tuple[int, str]:
        command = [sys.executable, "-m", "tools.triton_cache", *map(str, arguments)]
        environment = os.environ | {"FACTORS": factors}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout + done.stderr

    return run


def test_what_was_recorded_and_packed_is_found_by_the_jit(run, tmp_path):
    tests = ("--", "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path / "test_asks.py")
    recording, packed = tmp_path / "recording.json", tmp_path / "pack.tar.xz"
    code, said = run("record", "--out", recording, *tests, "-n", "1")
    assert code == 0, said
    recorded = json.loads(recording.read_text(encoding="utf-8"))
    assert [line["ended"].rpartition("::")[2] for line in recorded["ended"]] == ["test_that_ends_early"], said
    variants = recorded["variants"]
    own, half = sorted(
        (json.loads(v["data"]) for v in variants if v["kernel"] == "scale"),
        key=lambda v: v["signature"]["x_ptr"],
        reverse=True,
    )
    assert half["signature"]["x_ptr"] == "*fp16"
    assert (own["options"]["num_warps"], own["options"]["enable_fp_fusion"]) == (2, False)
    assert own["constant_vals"] == [2.5, "scaled", "fp64"]
    assert {"bin_kernel", "scale"} <= {v["kernel"] for v in variants}

    code, said = run("compile", recording, "--cache", tmp_path / "compiled", "--processes", "1")
    assert code == 0, said
    pack.pack(tmp_path / "compiled", packed)
    (tmp_path / "compiled").rename(tmp_path / "gone")
    manifest = pack.unpack(packed, tmp_path / "elsewhere")
    assert manifest["variants"] == len(variants)
    assert not pack.foreign(manifest)
    assert pack.foreign({**manifest, "compiler": "another"}).keys() == {"compiler"}
    left = {path.suffix for path in (tmp_path / "elsewhere").rglob("*.*")}
    assert left <= {".cubin", ".json", ".so"}

    code, said = run("check", "--cache", tmp_path / "elsewhere", *tests, factors="2.5 3.5")
    assert code == 1, said
    assert f"{len(variants)} variants found" in said
    assert "1 not: {'scale': 1}" in said


HELPED = """
import triton.language as tl
from triton.runtime.jit import JITFunction

LIMIT: tl.constexpr = tl.constexpr(3)

@JITFunction
def helper(x):
    return x + LIMIT

@JITFunction
def first(x_ptr):
    tl.store(x_ptr, helper(1))

@JITFunction
def second(x_ptr):
    tl.store(x_ptr, helper(2))
"""


def test_keys_do_not_depend_on_the_order_of_launches(tmp_path, monkeypatch):
    monkeypatch.setattr(jit.DependenciesFinder, "_update_hash", jit.DependenciesFinder._update_hash)
    monkeypatch.syspath_prepend(tmp_path)
    keys.settle()
    found = []
    for name, order in (("forwards", ("first", "second")), ("backwards", ("second", "first"))):
        Path(tmp_path, f"{name}.py").write_text(HELPED, encoding="utf-8")
        module = importlib.import_module(name)
        found.append({kernel: getattr(module, kernel).cache_key for kernel in order})
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["../outside.json", "/tmp/outside.json", "A" * 52 + "/../../x.json", "link"])
def test_files_outside_the_cache_are_refused(tmp_path, name):
    with tarfile.open(tmp_path / "pack.tar.xz", "w:xz") as tar:
        member = tarfile.TarInfo("A" * 52 + "/kernel.json" if name == "link" else name)
        member.size = 2
        if name == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member, io.BytesIO(b"{}"))
    with pytest.raises(ValueError, match=re.escape("no file of a Triton cache")):
        pack.unpack(tmp_path / "pack.tar.xz", tmp_path / "inside" / "cache")
    assert {path.name for path in tmp_path.rglob("*")} == {"pack.tar.xz"}
