"""What recorded processes tell the command that started them: a file of JSON lines for each, written at once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER, CACHED = (
    "TRITON_RECORDING",
    "TRITON_RECORDING_CACHED",
)  # of the environment: the folder; whether the JIT is real


def write(line: dict[str, Any]) -> None:
    with open(Path(os.environ[FOLDER], f"{os.getpid()}.jsonl"), "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.jsonl")):
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())
