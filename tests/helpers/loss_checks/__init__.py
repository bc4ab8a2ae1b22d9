"""Checks of every public loss against its definition in float64, for a GPU, the interpreter and a CPU alike.

``definitions`` says what is right, ``closeness`` how close a result must be, ``check`` what a check is and what varies;
the other files have the checks of one function each, and ``samples`` their inputs.
"""

from helpers.loss_checks import bins, confidence, linear, logits, sparse, tokens
from helpers.loss_checks.check import Check

CHECKS: tuple[Check, ...] = (
    *logits.checks(), *linear.checks(), *linear.rows_checks(), *sparse.checks(), *sparse.linear_checks(),
    *tokens.checks(), *tokens.linear_checks(), *confidence.checks(), *confidence.logprob_checks(),
    *confidence.linear_checks(), *logits.state_checks(), *bins.checks(),
)  # fmt: skip
