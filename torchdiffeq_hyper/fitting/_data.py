"""Batches together with their reference solutions and residuals."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from torchdiffeq_hyper._state import (
    State,
    StateLayout,
    VectorField,
    sample_sizes,
    stepped_dtype,
    take,
)
from torchdiffeq_hyper.fitting._batches import Batches, Starts, bind, n_samples, select
from torchdiffeq_hyper.fitting._distributed import ProcessGroup
from torchdiffeq_hyper.fitting._field import Field, Timer, Units
from torchdiffeq_hyper.fitting._reference import Plan, TimeGrid, Tolerances, solve_reference
from torchdiffeq_hyper.tableaus import Tableau

MOST_BYTES = 2**30  # memory that the reference solutions kept may take


@dataclass(frozen=True)
class Samples:
    """The steps of one grid along a reference solution: flat states in a solver's dtype.

    All but the residuals are in true units: they are what a hypernet is given.
    """

    times: Tensor  # (n + 1,)
    dt: Tensor  # (n,) signed step sizes
    y: Tensor  # (n + 1, ...) the solution
    stages: tuple[Tensor, ...]  # derivatives at each stage of the base, (n, ...); or empty
    residual: Tensor  # (n, ...) the R_n, in units of `Units.residual`; (0, ...) without a base

    def history(self, n: int) -> tuple[tuple[Tensor, Tensor], ...]:
        """Return the derivatives at the starts of the steps before n with their sizes."""
        return tuple((self.stages[0][k], self.dt[k]) for k in reversed(range(n)))


@torch.no_grad()
def measure_residuals(
    field: Field, tableau: Tableau | None, grid: TimeGrid, solution: Tensor
) -> Samples:
    r"""Return a reference solution (m, ...) on a grid, with residuals where there is a base.

    .. math:: R_n = (y(t_{n+1}) - y(t_n) - dt\,\psi(t_n, y(t_n))) / dt^{p+1}

    These cost s calls of func a step.
    """
    narrow, units = stepped_dtype(field.dtype), field.units
    y = solution[grid.points.to(solution.device)]
    states = (y * units.state).to(narrow)
    # The step sizes must be those that a solve in the state's dtype takes.
    times = grid.times.to(y.device, narrow)
    samples = Samples(times, times.diff(), states, stages=(), residual=states[:0])
    if tableau is None:
        return samples
    # In the solution's own dtype: these are differences of nearly equal numbers.
    times = units.times(grid.times).to(y)
    residuals, stages = [], []
    for n, dt in enumerate(times.diff().unbind()):
        dy, k = tableau.increment(field, times[n], dt, times[n + 1], y[n])
        residuals.append(((y[n + 1] - y[n] - dy) / dt ** (tableau.order + 1)).to(narrow))
        stages.append(tuple((stage * (units.state / units.time)).to(narrow) for stage in k))
    return replace(
        samples,
        stages=tuple(torch.stack(stage) for stage in zip(*stages, strict=True)),
        residual=torch.stack(residuals),
    )


@dataclass(frozen=True)
class Batch:
    """A batch of starts with the reference solution along every grid."""

    starts: Starts
    dtype: torch.dtype
    grids: tuple[Samples, ...]
    units: Units  # of norms and residuals
    weight: float = 1.0  # share of the samples of the whole batch, of which this may be a part

    @property
    def y0(self) -> State:
        """The state that the samples start at."""
        return self.starts.y0

    @property
    def context(self) -> tuple[Tensor, ...]:
        """The samples' context."""
        return self.starts.context

    @cached_property
    def layout(self) -> StateLayout:
        """How a state of these samples lies in one tensor."""
        return StateLayout.of(self.y0)

    def field(self, func: VectorField) -> VectorField:
        """Return the field of these samples."""
        return bind(func, self.starts)

    @property
    def nbytes(self) -> int:
        """Memory that the batch takes."""
        along = [p for s in self.grids for p in (s.y, s.residual, *s.stages)]
        return sum(part.nbytes for part in (*self.context, *along))

    def sizes(self, grid: int) -> Tensor:
        """Return what errors along a grid are divided by to be relative, (n + 1, batch)."""
        return sample_sizes(self.layout.split(self.grids[grid].y), self.units.state)

    def end_sizes(self, grid: int = 0) -> Tensor:
        """Return what errors at the end of a grid are divided by to be relative, (batch,)."""
        return sample_sizes(self.layout.split(self.grids[grid].y[-1:]), self.units.state)[0]

    def start(self, grid: int) -> State:
        """Return the state where a grid starts, as func takes it."""
        return self.layout.split(self.grids[grid].y[0].to(self.dtype))

    def share_of(self, group: ProcessGroup) -> Batch:
        """Return the samples that are this process's share."""
        if group.size == 1:
            return self
        rows, weight = group.share(n_samples(self.y0))
        return self.some(torch.arange(n_samples(self.y0))[rows], weight)

    def some(self, index: Tensor, weight: float = 1.0) -> Batch:
        """Return the samples at the positions ``index`` of the batch."""

        def rows(flat: Tensor) -> Tensor:
            state = take(self.layout.split(flat), index, dim=1)
            if isinstance(state, Tensor):
                return state
            return torch.cat([part.flatten(1) for part in state], dim=1)

        grids = tuple(
            Samples(s.times, s.dt, rows(s.y), tuple(map(rows, s.stages)), rows(s.residual))
            for s in self.grids
        )
        return replace(self, starts=select(self.starts, index), grids=grids, weight=weight)


@dataclass
class References:
    """Solves batches of starts; with a tableau, measures its residuals along the solutions."""

    func: VectorField
    plan: Plan
    tolerances: Tolerances
    units: Units
    tableau: Tableau | None = None
    calls: int = 0  # of func, for all batches
    seconds: float = 0.0  # wall time

    def solve(self, starts: Starts, budget: Timer) -> Batch:
        """Return a batch with its reference solution; `OutOfTimeError` where the time ends."""
        began = time.perf_counter()
        field = Field(self.func, starts, budget, self.units)
        y = solve_reference(field, field.flat, self.plan.times, self.tolerances)
        grids = [measure_residuals(field, self.tableau, grid, y) for grid in self.plan.grids]
        self.calls += field.calls
        self.seconds += time.perf_counter() - began
        return Batch(starts, field.dtype, tuple(grids), self.units)


class Data:
    """The training batches by number and the held-out batch, each measured once.

    ``references`` counts the calls of func in all processes; ``budget`` is the time that
    solutions may take from now on.
    """

    held_out: Batch
    held_out_seconds: float
    first: Batch  # the whole first training batch, however many processes share it

    def __init__(
        self, references: References, batches: Batches, budget: Timer, group: ProcessGroup
    ) -> None:
        self.references = references
        self._batches = batches
        self.budget = budget
        self._group = group
        self._measured: dict[int, Batch] = {}
        group.gather_in_time(self._measure_held_out)
        self._measure_from(0)

    def _measure_held_out(self) -> float:
        self.held_out = self.references.solve(self._batches.held_out, self.budget)
        self.held_out_seconds = self.references.seconds
        return self.held_out_seconds

    def __getitem__(self, number: int) -> Batch:
        """Return this process's share of a training batch."""
        position = self._batches.position(number)
        if position not in self._measured:
            self._measure_from(position)
        return self._measured[position]

    @property
    def seconds_per_batch(self) -> float:
        """Wall time that a training batch has taken."""
        return (self.references.seconds - self.held_out_seconds) / len(self._measured)

    @property
    def n_starts(self) -> int:
        """Number of samples measured to fit on, of all processes."""
        batches = [batch for batch in self._measured.values() if batch.weight]
        return sum(round(n_samples(batch.y0) / batch.weight) for batch in batches)

    def _measure_from(self, position: int) -> None:
        """Measure a training batch; more processes measure the ones after it, a whole one each."""
        following = [self._batches.position(position + n) for n in range(self._group.size)]
        new = [p for p in dict.fromkeys(following) if p not in self._measured]
        mine, references = new[self._group.rank :][:1], self.references
        before = references.calls

        def measure() -> tuple[list[Batch], int]:
            batches = [references.solve(self._batches[place], self.budget) for place in mine]
            return batches, references.calls - before

        device = self.held_out.grids[0].y.device
        gathered = self._group.gather_in_time(measure, device)
        references.calls = before + sum(calls for _, calls in gathered)
        found = [batch for batches, _ in gathered for batch in batches]
        for place, whole in zip(new, found, strict=True):
            if place == 0:
                self.first = whole
            self._measured[place] = whole.share_of(self._group)
