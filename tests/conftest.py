"""Options of the whole suite. Also puts this folder on the path, for ``interpreted``."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full-grid",
        action="store_true",
        help="every combination of the distillation losses' options instead of a pairwise cover (about 15 minutes)",
    )
