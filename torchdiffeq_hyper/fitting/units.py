"""The units in which a fit computes: time in spans, states in their own size.

In these, tolerances, noise and losses are numbers of order one whatever units func is
written in, and no power of a step size leaves the range of float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from torchdiffeq_hyper.fitting.fingerprint import size_of

DRIVEN = 1e-2
"""Share of the way that the first derivative would go over the span, below which starts count as
zero: the size of their solutions comes from func."""


@dataclass(frozen=True)
class Units:
    """What dimensionless time and states are multiplied by.

    Attributes:
        start: the time at dimensionless time 0.
        time: length of the span, above 0; dimensionless time has the sign of true time.
        state: size of the states, above 0.
    """

    start: float = 0.0
    time: float = 1.0
    state: float = 1.0

    @classmethod
    def of(cls, span: tuple[float, float], y0: Tensor, f0: Tensor) -> Units:
        """Return the units of a problem.

        Args:
            span: start and end.
            y0: flat starts.
            f0: func at the start, like ``y0``.
        """
        width = abs(span[1] - span[0])
        size = max(size_of(y0), DRIVEN * width * size_of(f0))
        return cls(span[0], width, size if 0 < size < math.inf else 1.0)

    def times(self, t: Tensor) -> Tensor:
        """Return true times as dimensionless ones."""
        return (t - self.start) / self.time

    def time_of(self, t: float) -> float:
        """Return one true time as a dimensionless one."""
        return (t - self.start) / self.time

    def residual(self, order: int) -> float:
        """Return the unit of the residuals of a base of some order: state / time^(p+1)."""
        # One factor at a time: the power itself may leave the range of numbers.
        unit = self.state
        for _ in range(order + 1):
            unit /= self.time
        return unit
