"""Batches together with their reference solutions and residuals."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from torchdiffeq_hyper._layout import StateLayout
from torchdiffeq_hyper._types import State, VectorField
from torchdiffeq_hyper.fitting.batches import Batches
from torchdiffeq_hyper.fitting.budget import Budget
from torchdiffeq_hyper.fitting.field import Field
from torchdiffeq_hyper.fitting.reference import (
    Samples,
    Tolerances,
    measure_residuals,
    solve_reference,
)
from torchdiffeq_hyper.fitting.routes import Plan
from torchdiffeq_hyper.tableaus import Tableau


@dataclass(frozen=True)
class Batch:
    """A batch of starts with the reference solution along every route.

    Attributes:
        layout: how a state of this batch lies flat.
        dtype: the data's dtype.
        routes: what was measured, one entry a route.
    """

    layout: StateLayout
    dtype: torch.dtype
    routes: tuple[Samples, ...]

    @property
    def nbytes(self) -> int:
        """Memory that the batch takes."""
        return sum(
            part.nbytes
            for samples in self.routes
            for part in (samples.y, samples.residual, *samples.stages)
        )

    def start(self, route: int) -> State:
        """Return the state where a route starts, as func takes it."""
        return self.layout.split(self.routes[route].y[0].to(self.dtype))


class Data:
    """The training batches by number and the held-out batch, each measured once.

    Args:
        func: the vector field.
        batches: the starts.
        tableau: the base.
        plan: times and routes.
        tolerances: of the reference solutions.
        budget: the time there is.

    Attributes:
        held_out: the batch that is not fitted on.
        calls: calls of func so far.
        seconds: wall time spent so far.
    """

    def __init__(
        self,
        func: VectorField,
        batches: Batches,
        *,
        tableau: Tableau,
        plan: Plan,
        tolerances: Tolerances,
        budget: Budget,
    ) -> None:
        self._func = func
        self._batches = batches
        self._tableau = tableau
        self._plan = plan
        self._tolerances = tolerances
        self._budget = budget
        self._measured: dict[int, Batch] = {}
        self.calls = 0
        self.seconds = 0.0
        self.held_out = self._measure(batches.held_out)

    def __getitem__(self, number: int) -> Batch:
        """Return a training batch."""
        position = self._batches.position(number)
        if position not in self._measured:
            self._measured[position] = self._measure(self._batches[position])
        return self._measured[position]

    @property
    def n_routes(self) -> int:
        """Number of routes."""
        return len(self._plan.routes)

    def limit(self, most: int) -> None:
        """Start over after ``most`` distinct training batches."""
        self._batches.limit(most)

    def _measure(self, y0: State) -> Batch:
        began = time.perf_counter()
        field = Field(self._func, y0, self._budget)
        layout = StateLayout.of(y0)
        solution = solve_reference(field, layout.join(y0), self._plan.times, self._tolerances)
        routes = tuple(
            measure_residuals(field, self._tableau, route, solution) for route in self._plan.routes
        )
        self.calls += field.calls
        self.seconds += time.perf_counter() - began
        return Batch(layout, field.dtype, routes)
