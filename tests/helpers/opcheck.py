"""``torch.library.opcheck`` of the typed operators."""

from __future__ import annotations

from typing import Any

import torch

from caop_fast.losses.operator import GradientOperator, Operator


def opcheck(operator: Operator[Any, Any] | GradientOperator[Any], inputs: Any) -> None:
    """Schema, fake, autograd registration and AOT dispatch; of a gradient both operators."""
    for one in (operator.new, operator.inplace) if isinstance(operator, GradientOperator) else (operator,):
        torch.library.opcheck(one.op, tuple(one.flatten(inputs)))
