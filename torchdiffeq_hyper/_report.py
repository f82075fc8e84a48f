"""What a fit measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LossPoint:
    """One entry of a fit's history.

    Attributes:
        iteration: number of iterations done.
        phase: "residual" or "trajectory".
        train: training loss of that phase at this iteration.
        validation: held-out error (see `FitReport.validation`).
    """

    iteration: int
    phase: str
    train: float
    validation: float


@dataclass(frozen=True)
class FitReport:
    """What a fit did and measured; held-out figures come from samples not fitted on.

    Attributes:
        losses: the history, one `LossPoint` a validation.
        delta: quantiles of |R - g|_2 on held-out data, keys "0.5", "0.9", "0.99",
            "max" ([H] theorem 1: the local error is delta * dt^(p+1)).
        base_delta: the same of |R|_2, that is without correction.
        validation: held-out error with the best state: mean |R - g|_2 for the residual
            objective, else the mean over samples of sum_n |y(t_n) - y_n|_2.
        base_validation: the same for the base method alone.
        noise_floor: mean noise in |R|_2, measured with two tolerances.
        iterations: iterations done, all phases.
        seconds: wall time of the fit, reference solutions included.
        reference_seconds: wall time of the reference solutions alone.
        reference_nfe: calls of func for the reference solutions.
        stopped: why it ended: "iterations", "max_seconds" or "patience".
        seed: the seed used.
    """

    losses: tuple[LossPoint, ...]
    delta: dict[str, float]
    base_delta: dict[str, float]
    validation: float
    base_validation: float
    noise_floor: float
    iterations: int
    seconds: float
    reference_seconds: float
    reference_nfe: int
    stopped: str
    seed: int
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        """Return a few lines for people."""
        gain = self.base_validation / self.validation if self.validation else float("inf")
        lines = (
            f"held-out error {self.validation:.4g} (base {self.base_validation:.4g}, "
            f"{gain:.1f}x smaller)\n"
            f"delta: median {self.delta['0.5']:.4g} of |R| {self.base_delta['0.5']:.4g}, "
            f"max {self.delta['max']:.4g}\n"
            f"{self.iterations} iterations in {self.seconds:.1f} s "
            f"({self.reference_seconds:.1f} s for references, {self.reference_nfe} calls of "
            f"func); stopped by {self.stopped}"
        )
        return "\n".join([lines, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> FitReport:
        """Rebuild from `to_dict`'s values."""
        losses = tuple(LossPoint(**point) for point in data["losses"])
        return cls(**{**data, "losses": losses, "notes": tuple(data["notes"])})
