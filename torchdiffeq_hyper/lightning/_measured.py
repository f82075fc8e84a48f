"""What a module measures: its batches' reference solutions, and the history of its fit."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_hyper._state import parts_of
from torchdiffeq_hyper.fitting._batches import n_samples, select
from torchdiffeq_hyper.fitting._context import Starts
from torchdiffeq_hyper.fitting._data import Batch, measure_batch
from torchdiffeq_hyper.fitting._field import Field
from torchdiffeq_hyper.fitting._noise import measure_noise
from torchdiffeq_hyper.fitting._planning import PROBES
from torchdiffeq_hyper.fitting._prepare import ENDLESS, MOST_BYTES, FieldCheck
from torchdiffeq_hyper.fitting._problem import Problem
from torchdiffeq_hyper.solvers._report import FitReport, LossPoint


class References:
    """Measures batches of starts, each once as long as it comes unchanged under its key.

    Args:
        problem: what is fitted.
        check: of its field.

    Attributes:
        calls: calls of func for the batches with a key.
        seconds: wall time spent on these.
    """

    def __init__(self, problem: Problem, check: FieldCheck) -> None:
        self._problem = problem
        self._check = check
        self._batches: dict[Hashable, Batch] = {}
        self.calls = 0
        self.seconds = 0.0

    def noise(self, starts: Starts) -> float:
        """Return the noise floor, measured on a few of the samples.

        Raises:
            NoiseFloorError: the residuals do not stand above it.
        """
        problem, check = self._problem, self._check
        probes = select(starts, torch.arange(min(PROBES, n_samples(starts))))
        field = Field(problem.func, probes, ENDLESS, check.units)
        return measure_noise(field, probes.y0, problem.tableau, problem.plan, check.tolerances)

    def measure(self, starts: Starts) -> tuple[Batch, int]:
        """Return a batch with its reference solution and residuals, and the calls of func.

        Raises:
            NonFiniteError: a start or the solution is not finite.
        """
        problem, check = self._problem, self._check
        field = Field(problem.func, starts, ENDLESS, check.units)
        batch = measure_batch(field, starts, problem.tableau, problem.plan, check.tolerances)
        return batch, field.calls

    def batch(self, key: Hashable, starts: Starts) -> Batch:
        """Return the batch kept under a key if it has these samples, else measure and keep it.

        Raises:
            NonFiniteError: a start or the solution is not finite.
        """
        known = self._batches.pop(key, None)
        if known is None or not _same(known.starts, starts):
            began = time.perf_counter()
            known, calls = self.measure(starts)
            self.calls += calls
            self.seconds += time.perf_counter() - began
        if sum(batch.nbytes for batch in self._batches.values()) + known.nbytes <= MOST_BYTES:
            self._batches[key] = known
        return known


def _same(first: Starts, second: Starts) -> bool:
    pairs = zip(_tensors(first), _tensors(second), strict=True)
    return all(a.device == b.device and torch.equal(a, b) for a, b in pairs)


def _tensors(starts: Starts) -> tuple[Tensor, ...]:
    return (*parts_of(starts.y0), *starts.context)


@dataclass
class History:
    """The fields of a `FitReport` that grow during a fit; they are kept in checkpoints."""

    losses: list[LossPoint] = field(default_factory=list)
    delta: dict[str, float] = field(default_factory=dict)
    base_delta: dict[str, float] = field(default_factory=dict)
    validation: float = 0.0
    base_validation: float = 0.0
    iterations: int = 0
    seconds: float = 0.0

    def report(self, **others: Any) -> FitReport | None:
        """Return the report with the other fields, None before the first validation."""
        if not self.delta:
            return None
        return FitReport(**{**vars(self), "losses": tuple(self.losses), **others})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> History:
        """Rebuild from the values of `dataclasses.asdict`."""
        return cls(**{**data, "losses": [LossPoint(**point) for point in data["losses"]]})
