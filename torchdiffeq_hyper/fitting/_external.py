"""What a fit that somebody else runs has to know before its first iteration."""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._state import parts_of
from torchdiffeq_hyper.fitting._auto import calibrate, measuring_time_in
from torchdiffeq_hyper.fitting._batches import n_samples, select
from torchdiffeq_hyper.fitting._budget import Budget
from torchdiffeq_hyper.fitting._context import Starts
from torchdiffeq_hyper.fitting._data import Batch, measure_batch
from torchdiffeq_hyper.fitting._field import Field
from torchdiffeq_hyper.fitting._noise import measure_noise
from torchdiffeq_hyper.fitting._objectives import Objective, usable_scale
from torchdiffeq_hyper.fitting._planning import PROBES
from torchdiffeq_hyper.fitting._prepare import ENDLESS, MOST_BYTES, FieldCheck
from torchdiffeq_hyper.fitting._problem import HypersolverProblem
from torchdiffeq_hyper.fitting._reference import Tolerances
from torchdiffeq_hyper.fitting._units import Units
from torchdiffeq_hyper.hypernets import ready
from torchdiffeq_hyper.solvers._report import FitReport, LossPoint


@dataclass(frozen=True)
class Start:
    """A net ready to be fitted and what was measured for it.

    Attributes:
        net: the hypernet, calibrated.
        batch: the starts with their reference solution.
        noise: noise floor.
        tolerances: of the reference solutions.
        units: those of the reference solutions.
        signs: what tells the starts and the field from others.
    """

    net: nn.Module
    batch: Batch
    noise: float
    tolerances: Tolerances
    units: Units
    signs: dict[str, Any]

    @classmethod
    def of(cls, problem: HypersolverProblem, starts: Starts, net: nn.Module | None) -> Start:
        """Check the field, measure, and calibrate a net.

        Args:
            problem: what is fitted.
            starts: the samples.
            net: the net, None for a ready one.

        Raises:
            HyperError: func, ``y0`` or the base cannot be fitted.
        """
        y0 = starts.y0
        field_check = FieldCheck.of(problem, starts, n_samples(starts))
        units, tolerances = field_check.units, field_check.tolerances
        field = Field(problem.func, starts, ENDLESS, units)
        probes = select(starts, torch.arange(min(PROBES, n_samples(starts))))
        noise = measure_noise(
            Field(problem.func, probes, ENDLESS, units),
            probes.y0,
            problem.tableau,
            problem.plan,
            tolerances,
        )
        batch = measure_batch(field, starts, problem.tableau, problem.plan, tolerances)
        if net is None:
            net = ready(y0, problem.tableau, time_unit=problem.width)
        with measuring_time_in(net, problem.width, problem.tableau.order):
            calibrate(net, batch)
        return cls(net, batch, noise, tolerances, units, field_check.signs)

    def scale(self, phase: Objective, route: int) -> float:
        """Return the base's loss in a phase on a route, to which losses are relative."""
        return usable_scale(phase.base_loss(self.batch, route))


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


class KeptBatches:
    """Measures batches of starts, each once as long as it comes unchanged under its key.

    Args:
        problem: what is fitted.
        tolerances: of the reference solutions.
        units: those of the reference solutions.

    Attributes:
        calls: calls of func so far.
        seconds: wall time spent so far.
    """

    def __init__(self, problem: HypersolverProblem, tolerances: Tolerances, units: Units) -> None:
        self._problem = problem
        self._tolerances = tolerances
        self._units = units
        self._batches: dict[Hashable, Batch] = {}
        self.calls = 0
        self.seconds = 0.0

    def measure(self, key: Hashable, starts: Starts) -> Batch:
        """Return a batch with its reference solution: the kept one if it has these samples.

        Raises:
            NonFiniteError: a start or the solution is not finite.
        """
        known = self._batches.pop(key, None)
        if known is None or not _same(known.starts, starts):
            known = self._solve(starts)
        if sum(batch.nbytes for batch in self._batches.values()) + known.nbytes <= MOST_BYTES:
            self._batches[key] = known
        return known

    def _solve(self, starts: Starts) -> Batch:
        began, problem = time.perf_counter(), self._problem
        field = Field(problem.func, starts, Budget(math.inf), self._units)
        batch = measure_batch(field, starts, problem.tableau, problem.plan, self._tolerances)
        self.calls += field.calls
        self.seconds += time.perf_counter() - began
        return batch


def _same(first: Starts, second: Starts) -> bool:
    pairs = zip(_tensors(first), _tensors(second), strict=True)
    return all(a.device == b.device and torch.equal(a, b) for a, b in pairs)


def _tensors(starts: Starts) -> tuple[Tensor, ...]:
    return (*parts_of(starts.y0), *starts.context)
