"""What a fit measured."""

from __future__ import annotations

import math
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
class BreakEven:
    """What a prediction costs, fitted and classical, and when the fit has paid for itself.

    A prediction is one solve over the fitted span of a batch of held-out samples, without
    gradients. The alternative is the fastest of torchdiffeq's euler, midpoint, rk4 and
    dopri5, at the fewest steps or loosest tolerance found with no larger an error.

    Attributes:
        predictions: seconds of the fit over seconds saved a prediction; None if nothing is.
        seconds: median wall time of a prediction with the fitted solver.
        alternative: the classical solver and its setting.
        alternative_seconds: median wall time of a prediction with it, in interleaved runs.
        samples: samples in the batch.
        error: the fitted solver's error, the mean over samples of |y - y_ref|_2 at the end.
    """

    predictions: float | None
    seconds: float
    alternative: str
    alternative_seconds: float
    samples: int
    error: float

    def __str__(self) -> str:
        """Return a sentence for people."""
        cost = (
            f"a prediction of {self.samples} samples takes {1e3 * self.seconds:.3g} ms, "
            f"{self.alternative} (no less accurate) {1e3 * self.alternative_seconds:.3g} ms"
        )
        if self.predictions is None:
            return f"nothing is saved: {cost}"
        return f"the fit pays after {math.ceil(self.predictions):,} predictions: {cost}"


@dataclass(frozen=True)
class FitReport:
    """What a fit did and measured; held-out figures come from samples not fitted on.

    Attributes:
        losses: the history, one `LossPoint` a validation.
        delta: quantiles of |R - g|_2 on held-out data, keys "0.5", "0.9", "0.99",
            "max" ([H] theorem 1: the local error is delta * dt^(p+1)).
        base_delta: the same of |R|_2, that is without correction.
        validation: held-out error with the best state: mean |R - g|_2 for the residual
            objective, else the mean over samples of sum_n |y(t_n) - y_n|_2; for "bns" of
            |y(T) - y_n|_2 / |y(T)|_2 at the end.
        base_validation: the same for the base method alone; for "bns" the best classical
            method with as many calls.
        noise_floor: mean noise in |R|_2, measured with two tolerances.
        iterations: iterations done, all phases.
        seconds: wall time of the fit, reference solutions included.
        reference_seconds: wall time of the reference solutions alone.
        reference_nfe: calls of func for the reference solutions.
        stopped: why it ended: "iterations", "max_seconds", "patience", or "trainer" where
            a Lightning Trainer decided.
        seed: the seed used.
        notes: what a user should know: no gain, no time, the net that was chosen.
        break_even: when the fit has paid for itself; None after fewer than 200
            iterations (20 for "bns"), if there was no time to measure it, or if no classical
            solver was found that is as accurate.
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
    break_even: BreakEven | None = None

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
        costs = [] if self.break_even is None else [str(self.break_even)]
        return "\n".join([lines, *costs, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> FitReport:
        """Rebuild from `to_dict`'s values; what an older version did not write stays unset."""
        losses = tuple(LossPoint(**point) for point in data["losses"])
        measured = data.get("break_even")
        rebuilt = {
            "losses": losses,
            "notes": tuple(data.get("notes", ())),
            "break_even": None if measured is None else BreakEven(**measured),
        }
        return cls(**{**data, **rebuilt})
