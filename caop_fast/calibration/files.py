"""Files that are either whole or not there: written beside their place, then moved onto it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write in the block; at its end it takes the place of `path` in one step. Missing folders are made.

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
