"""What a loss computes and how it runs, as the operators and the backends take it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class DivergenceOptions(NamedTuple):
    """What turns two models' logits into distributions, and which divergence between them is meant."""

    beta: float | Tensor = 0.0
    """0 forward KL, 1 reverse KL, between: through the mixture; or [N] zeros and ones that choose per row."""
    temperature: float = 1.0
    student_softcap: float | None = None
    teacher_softcap: float | None = None

    @property
    def interior(self) -> bool:
        """Whether the divergence goes through the mixture m."""
        return not isinstance(self.beta, Tensor) and 0 < self.beta < 1

    @property
    def mixture_beta(self) -> float:
        """``beta`` where it is one number for all rows."""
        assert not isinstance(self.beta, Tensor), "beta per row goes without a mixture"
        return self.beta

    def rows(self, rows: slice | Tensor) -> DivergenceOptions:
        """The options of some rows."""
        return self._replace(beta=self.beta[rows]) if isinstance(self.beta, Tensor) else self


class TokenOptions(NamedTuple):
    """What turns one model's logits into distributions."""

    temperature: float = 1.0
    softcap: float | None = None


class ExecutionConfig(NamedTuple):
    """How a call runs."""

    backend: str
    """"torch" or "triton"."""
    validate: bool = False
    """Whether the values of tensors are checked, which makes the host wait for a GPU."""
    inplace: bool = False
    """Whether the backward writes its gradient over the logits."""


class TopKOptions(NamedTuple):
    """What turns the student's logits and the teacher's list into outcomes, and which divergence is meant."""

    tail: str
    """One of ``caop_kernels.constants.TAILS``."""
    beta: float | Tensor = 0.0
    temperature: float = 1.0
    softcap: float | None = None

    @property
    def normalized(self) -> bool:
        """Whether the outcomes form a distribution."""
        return self.tail != "ignore"

    def rows(self, rows: slice | Tensor) -> TopKOptions:
        """The options of some rows, with ``beta`` as a column [R, 1]."""
        return self._replace(beta=self.beta[rows].view(-1, 1)) if isinstance(self.beta, Tensor) else self


class ConfidenceOptions(NamedTuple):
    """What scores the confidence candidates of a row, and how logits become probabilities."""

    kind: str
    """One of ``caop_kernels.constants.CONFIDENCE_KINDS``."""
    outside_weight: float
    eps: float
    temperature: float = 1.0
    softcap: float | None = None
