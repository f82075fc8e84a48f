r"""What a fit minimises, and what it is judged by."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchdiffeq_hyper._state import Hypernet, State, StepInput, VectorField, parts_of, sample_norms
from torchdiffeq_hyper.errors import NonFiniteError
from torchdiffeq_hyper.fitting._batches import n_samples
from torchdiffeq_hyper.fitting._data import Batch
from torchdiffeq_hyper.solvers._hypersolver import HyperSolver
from torchdiffeq_hyper.solvers._stepping import Correction

QUANTILES = ("0.5", "0.9", "0.99", "max")


def step_inputs(batch: Batch, grid: int) -> Iterator[StepInput]:
    """Yield what a hypernet is given at each step along a reference solution."""
    samples, layout = batch.grids[grid], batch.layout
    start = layout.split(samples.y[0])
    for n, dt in enumerate(samples.dt.unbind()):
        stages = tuple(layout.split(stage[n]) for stage in samples.stages)
        y = layout.split(samples.y[n])
        yield StepInput(dt, samples.times[n], y, stages[0], stages, start, batch.context)


def residual_errors(
    hypernet: Hypernet, order: int, batch: Batch, grid: int, steps: Sequence[int]
) -> Tensor:
    r"""Return :math:`|R_n - g|_2` for some steps of a grid, (len(steps), batch) ([H] eq. 5).

    In units of `Units.residual`. Costs one call of g a step and none of func.
    """
    samples, layout, units = batch.grids[grid], batch.layout, batch.units
    correction = Correction(hypernet, order, layout, samples.y[0], context=batch.context)
    # g answers in units of its own time; those of the residuals are spans and states.
    factor = 1.0
    for _ in range(order + 1):
        factor *= units.time / correction.time_unit
    factor /= units.state
    differences = []
    for n in steps:
        stages = tuple(stage[n] for stage in samples.stages)
        out = correction.evaluate(samples.times[n], samples.dt[n], samples.y[n], stages)
        differences.append(samples.residual[n] - factor * layout.join(out))
    return sample_norms(layout.split(torch.stack(differences)))


def trajectory_errors(solver: HyperSolver, func: VectorField, batch: Batch, grid: int) -> Tensor:
    r"""Return :math:`|y(t_n) - y_n|_2` for n = 1, 2, ... of a grid, (n, batch).

    The y_n are the solver's own roll-out; costs what a solve costs. In units of the
    states' size.

    Raises:
        NonFiniteError: the roll-out ended in inf or nan.
    """
    samples = batch.grids[grid]
    solution = solver.solve(batch.field(func), batch.start(grid), samples.times)
    difference = _difference(solution, batch.layout.split(samples.y))
    return sample_norms(difference, batch.units.state)


def _difference(first: State, second: State) -> State:
    """Return the difference of two solutions without their common start."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first[1:] - second[1:]
    return tuple(a[1:] - b[1:] for a, b in zip(first, second, strict=True))


@torch.no_grad()
def mean_residual_error(
    hypernet: Hypernet, order: int, batch: Batch, grid: int | None = None
) -> float:
    """Return the mean of |R - g|_2 over samples, steps and grids (or on one)."""
    errors = [
        residual_errors(hypernet, order, batch, r, range(len(batch.grids[r].dt))).flatten()
        for r in _grids(batch, grid)
    ]
    return float(torch.cat(errors).mean())


@torch.no_grad()
def mean_trajectory_error(
    solver: HyperSolver, func: VectorField, batch: Batch, grid: int | None = None
) -> float:
    """Return the mean of |y(t_n) - y_n|_2 / |y(t_n)|_2 over samples, steps and grids.

    It is inf if a roll-out blew up.
    """
    try:
        errors = [
            (trajectory_errors(solver, func, batch, r) / batch.sizes(r)[1:]).mean()
            for r in _grids(batch, grid)
        ]
    except NonFiniteError:
        return float("inf")
    return float(torch.stack(errors).mean())


def _grids(batch: Batch, grid: int | None) -> Sequence[int]:
    return range(len(batch.grids)) if grid is None else (grid,)


@torch.no_grad()
def delta_quantiles(hypernet: Hypernet, order: int, batch: Batch) -> dict[str, float]:
    """Return quantiles of |R - g|_2 over samples, steps and grids ([H] theorem 1).

    In true units: the state's over time^(p+1).
    """
    errors = [
        residual_errors(hypernet, order, batch, r, range(len(batch.grids[r].dt))).flatten()
        for r in _grids(batch, None)
    ]
    unit = batch.units.residual(order)
    return {name: unit * value for name, value in quantiles(torch.cat(errors)).items()}


def quantiles(values: Tensor) -> dict[str, float]:
    """Return the quantiles that a report has of some values, (n,)."""
    errors = values.sort().values
    # By rank, not interpolated: torch.quantile refuses more than 2^24 values.
    ranks = [min(int(float(q) * len(errors)), len(errors) - 1) for q in QUANTILES[:-1]]
    chosen = [errors[rank] for rank in ranks] + [errors[-1]]
    return {name: float(value) for name, value in zip(QUANTILES, chosen, strict=True)}


def no_correction(step: StepInput) -> State:
    """Return zero: the hypernet of the base alone."""
    if isinstance(step.y, Tensor):
        return torch.zeros_like(step.y)
    return tuple(torch.zeros_like(part) for part in step.y)


Run = Callable[[VectorField, State, Tensor], State]
"""``(func, y0, t) -> solution``, like ``y0`` with ``len(t)`` in front."""


class Fitted(NamedTuple):
    """A fitted solver and the one it started as.

    Attributes:
        run: the fitted solver's ``(func, y0, t) -> solution``.
        base: the same of the classical method that it started as.
        name: that method's name, for people.
        calls: calls of func in a solve between two points.
        fewest: iterations below which a fit is a trial that nobody has to earn back.
    """

    run: Run
    base: Run
    name: str
    calls: int
    fewest: int


BROKEN = (ArithmeticError, AssertionError)
"""What our solvers and the host raise where a solve blows up."""


@torch.no_grad()
def end_errors(run: Run, func: VectorField, batch: Batch, grid: int = 0) -> Tensor:
    """Return |y(T) - y_n|_2 / |y(T)|_2 of each sample at the end of a grid, (batch,).

    A sample that blows up has an infinite error; the others have their own.
    """
    off = _off(run, func, batch, grid, is_whole=False)[-1]
    return _finite_or_inf(off / batch.end_sizes(grid))


@torch.no_grad()
def errors_along(run: Run, func: VectorField, batch: Batch, grid: int = 0) -> Tensor:
    """Return the relative errors at all times of a grid but the first, (n, batch)."""
    off = _off(run, func, batch, grid, is_whole=True)
    return _finite_or_inf(off / batch.sizes(grid)[1:])


def _off(run: Run, func: VectorField, batch: Batch, grid: int, *, is_whole: bool) -> Tensor:
    """Return |y(t_n) - y_n|_2 at all times but the first, or at the end alone."""
    samples, count = batch.grids[grid], n_samples(batch.y0)
    times = samples.times if is_whole else samples.times[[0, -1]]
    try:
        found = run(batch.field(func), batch.start(grid), times)
    except BROKEN:
        if count == 1:
            return torch.full((len(times) - 1, 1), math.inf, device=samples.y.device)
        halves = torch.arange(count).tensor_split(2)
        parts = [_off(run, func, batch.some(half), grid, is_whole=is_whole) for half in halves]
        return torch.cat(parts, dim=1)
    exact = batch.layout.split(samples.y if is_whole else samples.y[[0, -1]])
    pairs = zip(parts_of(found), parts_of(exact), strict=True)
    difference = tuple(a[1:].to(b.dtype) - b[1:] for a, b in pairs)
    return sample_norms(difference, batch.units.state)


def _finite_or_inf(errors: Tensor) -> Tensor:
    return torch.where(torch.isfinite(errors), errors, torch.inf)
