"""What the losses allocate on a CPU is what was recorded: memory cannot grow, nor copies appear, unnoticed.

Similarly ``tests/kernels/test_kernels_budget.py`` guards the instructions of the kernels; neither needs a clock.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers import allocated

RECORD = json.loads((Path(__file__).parent / "allocations.json").read_text(encoding="utf-8"))
RELEASE = torch.__version__.split("+")[0].split(".")[:2]
MARGINS = {"peak": 1.02, "largest": 1.0, "total": 1.05, "count": 1.05}

pytestmark = pytest.mark.skipif(
    RECORD["torch"].split(".")[:2] != RELEASE,
    reason=f"recorded with torch {RECORD['torch']}; other releases allocate differently",
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_record_has_all_cases() -> None:
    assert set(allocated.pairs()) == set(RECORD["cases"])


@pytest.mark.parametrize("name", RECORD["cases"])
def test_no_more_than_recorded(name: str) -> None:
    found, recorded = dataclasses.asdict(allocated.measured(*allocated.pairs()[name])), RECORD["cases"][name]
    over = {key: (found[key], recorded[key]) for key, margin in MARGINS.items() if found[key] > margin * recorded[key]}
    assert not over, f"measured and recorded: {over}"
