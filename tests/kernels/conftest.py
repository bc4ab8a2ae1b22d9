"""``device/`` holds tests that run the kernels: collected where there is a GPU, or in Triton's interpreter."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    runs = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET", "0") == "1"
    return None if runs or collection_path != Path(__file__).parent / "device" else True
