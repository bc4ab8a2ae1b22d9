"""Constants that the kernels and their callers share. Imports without Triton."""

from __future__ import annotations

import math

LOG2E = math.log2(math.e)
"""log2(e), by which the kernels take logits to base 2."""

IGNORE_INDEX = -100
"""The label of a row without a label, as in ``torch.nn.functional.cross_entropy``."""

STATISTICS = (
    "forward_kl",
    "reverse_kl",
    "student_lse",
    "teacher_lse",
    "student_logprob",
    "teacher_logprob",
    "student_entropy",
    "teacher_entropy",
)
"""Statistics of a row of student and teacher logits."""
STUDENT_STATISTICS = ("student_lse", "student_logprob", "student_entropy")
"""Those that need no teacher."""

TAILS = ("bucket", "renormalize", "ignore")
"""What becomes of the ids that a sparse teacher does not list."""
MAX_LISTED = 256
"""The most ids that a sparse teacher may list per row."""

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
