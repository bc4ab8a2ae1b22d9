"""Triton caches as files that can be sent: what a launch needs, without the compiler's intermediate results."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import tarfile
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tools.triton_cache.compiling import identity
from tools.triton_cache.keys import SETTLED

MANIFEST = "pack.json"
GROUP = "__grp__"
NEEDED = (".cubin", ".json", ".so")
MEMBER = re.compile(r"[A-Z2-7]{52}/[\w.\-]+", re.ASCII)  # Triton's key in base 32, and a file


def pack(cache: Path, out: Path) -> dict[str, Any]:
    """Write the kernels and launchers of ``cache`` to a ``.tar.xz``; returns the manifest."""
    contents = dict(members(cache))
    manifest = {
        **identity(),
        "variants": sum(name.endswith(".cubin") for name in contents),
        "launchers": sum(name.endswith(".so") for name in contents),
        "bytes": sum(map(len, contents.values())),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
    }
    with tarfile.open(out, "w:xz") as tar:
        for name, content in {MANIFEST: json.dumps(manifest, indent=1).encode(), **contents}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return manifest


def members(cache: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents. A group file lists the files of its folder; here without that folder's path."""
    for path in sorted(cache.glob("*/*")):
        name = f"{path.parent.name}/{path.name}"
        if not path.is_file() or path.suffix not in NEEDED or not MEMBER.fullmatch(name):
            continue
        content = path.read_bytes()
        if path.name.startswith(GROUP):
            files = json.loads(content)["child_paths"]
            content = json.dumps({"child_paths": {f: f for f in files if Path(f).suffix in NEEDED}}).encode()
        yield name, content


def unpack(packed: Path, cache: Path) -> dict[str, Any]:
    """Add what ``pack`` wrote to a cache, whose group files then hold its own path; returns the manifest.

    Raises:
        ValueError: a member is not a regular file with a name that ``pack`` gives.
    """
    cache = cache.absolute()
    with tarfile.open(packed, "r:xz") as tar:
        found = tar.getmembers()
        for member in found:
            if not member.isreg() or not (member.name == MANIFEST or MEMBER.fullmatch(member.name)):
                raise ValueError(f"{packed} holds {member.name!r}, which is no file of a Triton cache")
        cache.mkdir(parents=True, exist_ok=True)
        tar.extractall(cache, found, filter="data")
    for member in found:
        path = cache / member.name
        if path.name.startswith(GROUP):
            files = json.loads(path.read_text(encoding="utf-8"))["child_paths"]
            path.write_text(json.dumps({"child_paths": {f: str(path.parent / f) for f in files}}), encoding="utf-8")
    return json.loads((cache / MANIFEST).read_text(encoding="utf-8"))


def environment(cache: Path) -> dict[str, str]:
    """What processes need in their environment to find what ``cache`` holds (see ``keys``)."""
    here = Path(__file__).parent
    paths = [str(here / "startup"), str(here.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"TRITON_CACHE_DIR": str(cache.absolute()), SETTLED: "1", "PYTHONPATH": os.pathsep.join(paths)}


def foreign(manifest: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """In what the pack and this Python's Triton differ: by name, theirs and ours."""
    return {name: (str(manifest[name]), ours) for name, ours in identity().items() if manifest[name] != ours}


def commit() -> str | None:
    """Of the checkout, with a + if it was changed."""
    try:
        head, changed = (
            subprocess.run(["git", *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + "+" * bool(changed)
