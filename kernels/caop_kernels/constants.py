"""Constants that the kernels and their callers share. Imports without Triton."""

from __future__ import annotations

IGNORE_INDEX = -100
"""The label of a row without a label, as in ``torch.nn.functional.cross_entropy``."""

TAILS = ("bucket", "renormalize", "ignore")
"""What becomes of the ids that a sparse teacher does not list."""

CONFIDENCE_KINDS = ("cross_entropy", "brier", "expected_brier", "bernoulli_nll")
"""Scores of a distribution over confidence values."""

SAVED_FIELDS = 6
"""Rows of the saved statistics of ``row_statistics``."""
TOPK_SAVED_FIELDS = 4
"""Rows of the saved statistics of ``topk_statistics``."""
CONFIDENCE_SAVED_FIELDS = 3
"""Rows of the saved statistics of ``confidence_scores``."""
STATE_FIELDS = 12
"""Rows of the mergeable state of ``row_state``."""
