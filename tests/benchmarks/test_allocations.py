"""What the losses allocate on a CPU is what was recorded: memory cannot grow, nor copies creep in, unseen.

Beside it stand the instruction budgets of the kernels, ``tests/kernels/test_kernels_budget.py``; neither needs a clock.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
RECORD = json.loads((HERE / "allocations.json").read_text(encoding="utf-8"))
RELEASE = torch.__version__.split("+")[0].split(".")[:2]
MARGINS = {"peak": 1.02, "largest": 1.0, "total": 1.05, "count": 1.05}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        RECORD["torch"].split(".")[:2] != RELEASE,
        reason=f"recorded with torch {RECORD['torch']}; other releases allocate otherwise",
    ),
]


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, int]]:
    """In a process of its own, so that no other test's profiler or caches are seen."""
    command = [sys.executable, str(HERE / "allocated.py")]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout[done.stdout.index("{\n") :])["cases"]


def test_the_record_is_of_what_is_measured(measured):
    assert set(measured) == set(RECORD["cases"])


@pytest.mark.parametrize("name", RECORD["cases"])
def test_no_more_than_recorded(measured, name):
    got, recorded = measured[name], RECORD["cases"][name]
    over = {key: (got[key], recorded[key]) for key, margin in MARGINS.items() if got[key] > margin * recorded[key]}
    assert not over, f"measured and recorded: {over}"
