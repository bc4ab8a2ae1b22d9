"""The recorded table of a CPU: ``python -m benchmarks.cpu``, on an otherwise idle machine. See ``gpu.py``."""

from __future__ import annotations

import sys

from benchmarks.command import main

if __name__ == "__main__":
    sys.exit(main(None, device="cpu", selection="cpu", minutes=60.0))
