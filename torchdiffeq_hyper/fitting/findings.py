"""What a fit that somebody else runs has measured so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torchdiffeq_hyper._report import FitReport, LossPoint


@dataclass
class Findings:
    """The fields of a `FitReport` that grow during a fit.

    Attributes:
        losses: the history.
        delta: quantiles of |R - g|_2, empty before the first validation.
        base_delta: the same of |R|_2.
        validation: held-out error.
        base_validation: the same for the base alone.
        iterations: iterations done.
        seconds: wall time used.
    """

    losses: list[LossPoint] = field(default_factory=list)
    delta: dict[str, float] = field(default_factory=dict)
    base_delta: dict[str, float] = field(default_factory=dict)
    validation: float = 0.0
    base_validation: float = 0.0
    iterations: int = 0
    seconds: float = 0.0

    def report(self, **others: Any) -> FitReport | None:
        """Return the report, None before the first validation.

        Args:
            others: the fields that are not here.
        """
        if not self.delta:
            return None
        return FitReport(**{**vars(self), "losses": tuple(self.losses), **others})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Findings:
        """Rebuild from the values of `dataclasses.asdict`."""
        return cls(**{**data, "losses": [LossPoint(**point) for point in data["losses"]]})
