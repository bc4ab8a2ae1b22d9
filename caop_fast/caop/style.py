"""How a confidence is written: one grid of values, one way to spell them.

Prompting, token splicing, candidate scoring and the demo all take a `ConfidenceStyle`, so that the text a model is
trained to write is the text its audit reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from numbers import Real

from caop_fast.calibration.parse import parse_confidence


@dataclass(frozen=True)
class ConfidenceStyle:
    """The written form of a confidence statement, e.g. ``Confidence: 0.85``.

    Args:
        label: the words before the number; `parse_confidence` must recognise them.
        step: distance between two neighbouring grid values; 1/step must be a whole number.
        decimals: digits after the decimal point; enough to write every grid value exactly.
        separator: the white space between an answer and a statement that is appended to it.
    """

    label: str = "Confidence:"
    step: float = 0.05
    decimals: int = 2
    separator: str = "\n"

    def __post_init__(self) -> None:
        if not 0 < self.step <= 1 or abs(round(1 / self.step) - 1 / self.step) > 1e-9:
            raise ValueError(f"step must divide 1 into whole parts and lie in (0, 1], got {self.step!r}")
        if self.decimals < 1 or abs(round(self.step, self.decimals) - self.step) > 1e-12:
            raise ValueError(f"decimals must be enough to write multiples of step={self.step}, got {self.decimals!r}")
        if not self.separator or self.separator.strip():
            raise ValueError(f"separator must be white space, got {self.separator!r}")
        if self.label != self.label.strip() or parse_confidence(self.statement(1)).value != 1:
            raise ValueError(
                f"label must be words that parse_confidence reads, without white space around, e.g. 'Confidence:'; "
                f"got {self.label!r}"
            )

    @cached_property
    def values(self) -> tuple[float, ...]:
        """The grid, ascending from 0 to 1."""
        n = round(1 / self.step)
        return tuple(round(i * self.step, self.decimals) for i in range(n + 1))

    def nearest(self, value: float) -> float:
        """The grid value nearest to `value` in [0, 1]; exact ties go to the even grid point, so they do not bias."""
        if isinstance(value, bool) or not (isinstance(value, Real) and math.isfinite(value) and 0 <= value <= 1):
            raise ValueError(f"value must be a finite number in [0, 1], got {value!r}")
        return self.values[round(round(value / self.step, 9))]

    def number(self, value: float) -> str:
        """`value`, rounded to the grid, as it is written: ``0.85``."""
        return f"{self.nearest(value):.{self.decimals}f}"

    def statement(self, value: float) -> str:
        """The whole statement: ``Confidence: 0.85``."""
        return f"{self.label} {self.number(value)}"
