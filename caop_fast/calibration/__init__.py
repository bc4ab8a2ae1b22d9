"""Calibration: parsing of stated confidences, metrics with intervals, and the audit. Needs numpy only, never torch."""

from caop_fast.calibration.intervals import (
    Difference,
    bootstrap_intervals,
    ece_floor,
    paired_bootstrap,
    wilson_interval,
)
from caop_fast.calibration.metrics import (
    ReliabilityBin,
    calibration_metrics,
    constant_baseline,
    reliability_bins,
    risk_coverage_curve,
)
from caop_fast.calibration.parse import ParsedConfidence, parse_confidence, replace_confidence

__all__ = [
    "Difference",
    "ParsedConfidence",
    "ReliabilityBin",
    "bootstrap_intervals",
    "calibration_metrics",
    "constant_baseline",
    "ece_floor",
    "paired_bootstrap",
    "parse_confidence",
    "reliability_bins",
    "replace_confidence",
    "risk_coverage_curve",
    "wilson_interval",
]
