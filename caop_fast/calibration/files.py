"""Atomic replacement of files: written to a temporary file in the same folder, then renamed."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write inside the block, which replaces `path` on exit. Missing folders are created.

    A reader, or the next start after a crash, sees the old file or the new one, never a part; when writing fails the
    old file stays and no temporary file is left. The mode is what `open` gives (0o666 less the umask), not the private
    one of a temporary file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)  # the only way to read it is to set it
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_atomic(path: str | os.PathLike[str], data: str | bytes) -> Path:
    """Write `data` (text as UTF-8) to `path` through `replacing`, and return the path."""
    with replacing(path) as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)
    return Path(path)
