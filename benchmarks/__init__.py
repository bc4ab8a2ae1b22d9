"""Speed, memory and accuracy of caop_fast beside the code people use instead: same work, same inputs, same run.

    make bench-quick                       every suite on this CPU, within two minutes
    python -m pytest benchmarks            the suites by pytest-benchmark, for a GPU where there is one
    python -m benchmarks.gpu --out DIR     correctness, then everything, within a budget of time, on a GPU box
    python -m benchmarks.cpu               the table of a CPU
    python -m benchmarks.report            RESULTS.md and its plots from the records in results/

``cases`` says what is measured, ``peers/`` by what, ``truth`` what is right, ``floors`` what is possible, ``measure``
how, ``run`` does one contender on one case, ``campaign`` a list of them, ``step`` a whole training step,
``supervise`` goes on behind a process that died, and ``records`` says what is kept.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("caop_kernels") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
