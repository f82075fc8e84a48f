"""What a module measures: its batches' reference solutions, and the history of its fit."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_hyper._state import parts_of
from torchdiffeq_hyper.fitting._batches import n_samples, select
from torchdiffeq_hyper.fitting._budget import PROBES
from torchdiffeq_hyper.fitting._context import Starts
from torchdiffeq_hyper.fitting._data import Batch, References
from torchdiffeq_hyper.fitting._field import Field
from torchdiffeq_hyper.fitting._hypersolver import measure_noise
from torchdiffeq_hyper.fitting._prepare import ENDLESS, MOST_BYTES, FieldCheck
from torchdiffeq_hyper.fitting._problem import HypersolverProblem
from torchdiffeq_hyper.solvers._report import FitReport, LossPoint


class KnownBatches:
    """Batches with their references, each solved once as long as it comes again unchanged."""

    def __init__(self, references: References) -> None:
        self.references = references
        self._batches: dict[Hashable, Batch] = {}

    def measure(self, key: Hashable, starts: Starts) -> Batch:
        """Return the batch known under a key if it has these samples, else solve it."""
        known = self._batches.pop(key, None)
        if known is None or not _same(known.starts, starts):
            known = self.references.solve(starts, ENDLESS)
        if sum(batch.nbytes for batch in self._batches.values()) + known.nbytes <= MOST_BYTES:
            self._batches[key] = known
        return known


def noise_floor(problem: HypersolverProblem, starts: Starts, check: FieldCheck) -> float:
    """Return the noise in the residuals of a few samples; refuse residuals that are all noise."""
    probes = select(starts, torch.arange(min(PROBES, n_samples(starts))))
    field = Field(problem.func, probes, ENDLESS, check.units)
    return measure_noise(field, probes.y0, problem.tableau, problem.plan, check.tolerances)


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
