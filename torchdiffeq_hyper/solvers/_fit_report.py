"""`FitReport`, what a fit measured, and its parts.

`fitting._report.reported` and `lightning.HyperSolverModule.report` fill it in. A new field needs a
default, for files written before, and a rule in `REPORT` where it may be negative.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from torchdiffeq_hyper._files import from_plain
from torchdiffeq_hyper._rules import Maybe, Real, Row, Table, Whole, record_of


@dataclass(frozen=True)
class LossPoint:
    """One entry of a fit's history: the losses after so many iterations."""

    iteration: int
    phase: str  # "residual" or "trajectory"
    train: float
    validation: float  # the held-out error, as `FitReport.validation`


@dataclass(frozen=True)
class ErrorSummary:
    """Relative errors of some samples: |y - y_ref|_2 / |y_ref|_2 of each."""

    mean: float
    median: float
    p95: float  # 95th percentile
    worst: float
    samples: int

    @classmethod
    def of(cls, errors: Tensor) -> ErrorSummary:
        """Return the summary of errors (n,); infinite ones count."""
        ordered = errors.detach().double().cpu().sort().values
        values, n = ordered.tolist(), len(ordered)
        p95 = values[math.ceil(0.95 * n) - 1]
        return cls(float(ordered.mean()), values[(n - 1) // 2], p95, values[-1], n)

    def __str__(self) -> str:
        """Return the numbers for people."""
        return (
            f"{self.mean:.3g} (median {self.median:.3g}, 95th percentile {self.p95:.3g}, "
            f"worst {self.worst:.3g})"
        )


@dataclass(frozen=True)
class ClassicalAlternative:
    """The best classical solver in the fitted one's time, or with as many calls of func."""

    solver: str  # the method and its steps
    errors: ErrorSummary  # at the end of the span, on held-out samples
    own_errors: ErrorSummary  # the fitted solver's on the same samples
    best_p95: float  # the smallest 95th percentile that any of the classical solvers has
    seconds: float  # wall time of one prediction of these samples
    own_seconds: float  # the same with the fitted solver


@dataclass(frozen=True)
class BreakEven:
    """What a prediction costs, fitted and classical, and when the fit has paid for itself.

    A prediction is one solve over the fitted span of a batch of held-out samples, without
    gradients. The alternative is the fastest of torchdiffeq's euler, midpoint, heun2, heun3,
    rk4 and dopri5 and of Adams-Bashforth 2 and 3, at the fewest steps or loosest tolerance
    found with no larger an error. Wall times are medians of interleaved runs.
    """

    predictions: float | None  # seconds of the fit over seconds saved a prediction, if any are
    seconds: float  # wall time of a prediction with the fitted solver
    alternative: str  # the classical solver and its setting
    alternative_seconds: float
    samples: int  # in the batch
    error: float  # the fitted solver's mean relative error at the end

    def __str__(self) -> str:
        """Return a sentence for people."""
        cost = (
            f"a prediction of {self.samples} samples takes {1e3 * self.seconds:.3g} ms, "
            f"{self.alternative} (no less accurate) {1e3 * self.alternative_seconds:.3g} ms"
        )
        if self.predictions is None:
            return f"the fit does not pay: nothing is saved, {cost}"
        return f"the fit pays after {math.ceil(self.predictions):,} predictions: {cost}"


@dataclass(frozen=True)
class FitReport:
    """What a fit did and measured; held-out figures come from samples not fitted on.

    Errors are relative: those of each sample are divided by the size of its solution (or by
    a tenth of the root mean square of all sizes, where that is larger). R is the residual
    and g its fit, as in equation 5 of Poli et al., "Hypersolvers: Toward Fast
    Continuous-Depth Models", NeurIPS 2020, https://arxiv.org/abs/2007.09601.
    ``print(report)`` shows the figures in a few lines.

    Attributes:
        losses: the history, one `LossPoint` a validation.
        delta: quantiles of |R - g|_2 on held-out data, keys "0.5", "0.9", "0.99",
            "max": the local error is delta * dt^(p+1) (theorem 1 there).
        base_delta: the same of |R|_2, that is without correction.
        validation: the held-out error that the best state was selected by: the mean of
            |y(t_n) - y_n|_2 / |y(t_n)|_2 over samples and steps; for "bns" at the end; for
            the residual objective the mean |R - g|_2 as a share of that of |R|_2.
        base_validation: the same for the base method alone; for "bns" the best classical
            method with as many calls.
        noise_floor: mean noise in |R|_2, measured with two tolerances.
        iterations: iterations of all phases; ``seed`` is the seed used.
        seconds: wall time of the fit, ``reference_seconds`` of them and ``reference_nfe``
            calls of func for the reference solutions.
        stopped: why its last phase ended: "iterations", "max_seconds", "patience", or
            "trainer" where a Lightning Trainer decided.
        notes: what a user should know: no gain, no time, the net that was chosen.
        break_even: when the fit has paid for itself; None where ``no_break_even`` says why.
        errors: held-out errors at the end of the span; ``base_errors`` of the base alone.
        along: held-out errors along the span, the mean over its times for each sample.
        worst_time: the time at which the mean held-out error is largest, and that error.
        rival: the best classical solver at equal time, None if that was not measured.
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
    no_break_even: str = ""
    errors: ErrorSummary | None = None
    base_errors: ErrorSummary | None = None
    along: ErrorSummary | None = None
    worst_time: tuple[float, float] | None = None
    rival: ClassicalAlternative | None = None

    def __str__(self) -> str:
        """Return a few lines for people."""
        if math.isnan(self.validation):  # there was no time for more
            return "\n".join([*self.notes, f"{self.seconds:.1f} s", self._pays()])
        gain = _ratio(self.base_validation, self.validation)
        lines = [f"held-out error {self.validation:.4g} (base {self.base_validation:.4g}, {gain})"]
        if self.errors is not None and self.base_errors is not None:
            lines = [
                f"held-out error at the end {self.errors}",
                f"base {self.base_errors}: {_ratio(self.base_errors.mean, self.errors.mean)}",
            ]
        if self.along is not None and self.worst_time is not None:
            time, error = self.worst_time
            along = f"along the span {self.along.mean:.3g}, at most {error:.3g} at t = {time:.4g}"
            lines.append(along)
        if self.rival is not None:
            own, best = self.rival.own_errors, self.rival.errors
            lines.append(
                f"the best classical solver at equal time, {self.rival.solver}, has {best}: "
                f"{_ratio(best.mean, own.mean)}"
            )
        delta, base = self.delta, self.base_delta["0.5"]
        lines.append(f"delta: median {delta['0.5']:.4g} of |R| {base:.4g}, max {delta['max']:.4g}")
        lines.append(
            f"{self.iterations} iterations in {self.seconds:.1f} s "
            f"({self.reference_seconds:.1f} s for references, {self.reference_nfe} calls of "
            f"func); stopped by {self.stopped}"
        )
        return "\n".join([*lines, self._pays(), *self.notes]).replace("\n\n", "\n")

    def _pays(self) -> str:
        if self.break_even is not None:
            return str(self.break_even)
        return f"no break-even: {self.no_break_even}" if self.no_break_even else ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> FitReport:
        """Rebuild from `to_dict`'s values; what an older version did not write stays unset."""
        report: FitReport = from_plain(cls, data)
        return report


def _ratio(base: float, own: float) -> str:
    """Return a comparison of two errors in words, from the own one's side."""
    if math.isnan(base) or math.isnan(own):
        return "no comparison"
    if math.isinf(own):
        return "the fitted solver blows up" + " as well" * math.isinf(base)
    if math.isinf(base):
        return "it blows up"
    if own <= base:
        return f"{base / own if own else math.inf:.3g}x smaller"
    return f"{own / base if base else math.inf:.3g}x LARGER"


_SECONDS = Real(low=0.0)
_MEASURED = Real(low=0.0, is_finite=False)
_BREAK_EVEN = record_of(
    BreakEven, predictions=Maybe(_SECONDS), seconds=_SECONDS, alternative_seconds=_SECONDS
)
REPORT = record_of(
    FitReport,
    delta=Table(_MEASURED, required=("0.5", "max")),
    base_delta=Table(_MEASURED, required=("0.5",)),
    seconds=_SECONDS,
    reference_seconds=_SECONDS,
    worst_time=Maybe(Row(Real(), _MEASURED)),
    seed=Whole(-(2**63), 2**64),
    break_even=Maybe(_BREAK_EVEN),
)
"""What files may say of a report."""
