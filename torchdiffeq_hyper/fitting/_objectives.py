"""What a fit minimises, and the errors by which its result is measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._state import Hypernet, State, StepInput, VectorField, sample_norms
from torchdiffeq_hyper.errors import NonFiniteError
from torchdiffeq_hyper.fitting._data import Batch
from torchdiffeq_hyper.fitting._errors import quantiles
from torchdiffeq_hyper.solvers._hypersolver import HyperSolver
from torchdiffeq_hyper.solvers._stepping import Correction


def no_correction(step: StepInput) -> State:
    """Return zero: the hypernet of the base alone."""
    if isinstance(step.y, Tensor):
        return torch.zeros_like(step.y)
    return tuple(torch.zeros_like(part) for part in step.y)


def step_inputs(batch: Batch, route: int) -> Iterator[StepInput]:
    """Yield what a hypernet is given at each step along a reference solution."""
    samples, layout = batch.routes[route], batch.layout
    start = layout.split(samples.y[0])
    for n, dt in enumerate(samples.dt.unbind()):
        stages = tuple(layout.split(stage[n]) for stage in samples.stages)
        y = layout.split(samples.y[n])
        yield StepInput(dt, samples.times[n], y, stages[0], stages, start, batch.context)


def residual_errors(
    hypernet: Hypernet, order: int, batch: Batch, route: int, steps: Sequence[int]
) -> Tensor:
    r"""Return :math:`|R_n - g|_2` for some steps of a route, (len(steps), batch) ([H] eq. 5).

    In units of `Units.residual`. Costs one call of g a step and none of func.
    """
    samples, layout, units = batch.routes[route], batch.layout, batch.units
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


def trajectory_errors(solver: HyperSolver, func: VectorField, batch: Batch, route: int) -> Tensor:
    r"""Return :math:`|y(t_n) - y_n|_2` for n = 1, 2, ... of a route, (n, batch).

    The y_n are the solver's own roll-out; costs what a solve costs. In units of the
    states' size.

    Raises:
        NonFiniteError: the roll-out ended in inf or nan.
    """
    samples = batch.routes[route]
    solution = solver.solve(batch.field(func), batch.start(route), samples.times)
    difference = _difference(solution, batch.layout.split(samples.y))
    return sample_norms(difference, batch.units.state)


def _difference(first: State, second: State) -> State:
    """Return the difference of two solutions without their common start."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first[1:] - second[1:]
    return tuple(a[1:] - b[1:] for a, b in zip(first, second, strict=True))


@torch.no_grad()
def mean_residual_error(
    hypernet: Hypernet, order: int, batch: Batch, route: int | None = None
) -> float:
    """Return the mean of |R - g|_2 over samples, steps and routes (or on one)."""
    errors = [
        residual_errors(hypernet, order, batch, r, range(len(batch.routes[r].dt))).flatten()
        for r in _routes(batch, route)
    ]
    return float(torch.cat(errors).mean())


@torch.no_grad()
def mean_trajectory_error(
    solver: HyperSolver, func: VectorField, batch: Batch, route: int | None = None
) -> float:
    """Return the mean of |y(t_n) - y_n|_2 / |y(t_n)|_2 over samples, steps and routes.

    It is inf if a roll-out blew up.
    """
    try:
        errors = [
            (trajectory_errors(solver, func, batch, r) / batch.sizes(r)[1:]).mean()
            for r in _routes(batch, route)
        ]
    except NonFiniteError:
        return float("inf")
    return float(torch.stack(errors).mean())


def _routes(batch: Batch, route: int | None) -> Sequence[int]:
    return range(len(batch.routes)) if route is None else (route,)


@torch.no_grad()
def delta_quantiles(hypernet: Hypernet, order: int, batch: Batch) -> dict[str, float]:
    """Return quantiles of |R - g|_2 over samples, steps and routes ([H] theorem 1).

    In true units: the state's over time^(p+1).
    """
    errors = [
        residual_errors(hypernet, order, batch, r, range(len(batch.routes[r].dt))).flatten()
        for r in _routes(batch, None)
    ]
    return quantiles(torch.cat(errors), batch.units.residual(order))


MOST_STEPS = 8
"""Steps of a route that one iteration on residuals looks at."""


class Objective(Protocol):
    """What is minimised, and an error to compare states of a net by."""

    name: str

    def loss(self, batch: Batch, route: int) -> Tensor:
        """Return the 0-d training loss."""
        ...

    def error(self, batch: Batch) -> float:
        """Return the mean error over all routes, without gradient."""
        ...

    def base_error(self, batch: Batch, route: int | None = None) -> float:
        """Return the same for the base alone, over all routes or on one."""
        ...

    def base_loss(self, batch: Batch, route: int) -> float:
        """Return the training loss of the base alone, to which losses are relative."""
        ...


class ResidualObjective:
    r"""Minimise mean_n :math:`|R_n - g|_2` ([H] eq. 5): calls of g only."""

    name = "residual"

    def __init__(self, net: nn.Module, order: int) -> None:
        self._net = net
        self._order = order

    def loss(self, batch: Batch, route: int) -> Tensor:
        """Return the mean over a few random steps, so that fine grids cost no more."""
        n_steps = len(batch.routes[route].dt)
        steps = torch.randperm(n_steps)[:MOST_STEPS].tolist()
        return residual_errors(self._net, self._order, batch, route, steps).mean()

    def error(self, batch: Batch) -> float:
        """Return the mean of |R - g|_2 as a share of that of |R|_2."""
        size = mean_residual_error(no_correction, self._order, batch)
        return mean_residual_error(self._net, self._order, batch) / (size or 1.0)

    def base_error(self, batch: Batch, route: int | None = None) -> float:
        """Return 1: all of |R|_2."""
        return 1.0

    def base_loss(self, batch: Batch, route: int) -> float:
        """Return the mean of |R|_2."""
        return mean_residual_error(no_correction, self._order, batch, route)


class TrajectoryObjective:
    r"""Minimise :math:`\sum_n |y(t_n) - y_n|_2` of the solver's own roll-out."""

    name = "trajectory"

    def __init__(self, solver: HyperSolver, func: VectorField) -> None:
        self._solver = solver
        self._base = HyperSolver(solver.base, no_correction, alpha=solver.alpha)
        self._func = func

    def loss(self, batch: Batch, route: int) -> Tensor:
        """Return the mean over samples."""
        return trajectory_errors(self._solver, self._func, batch, route).sum(0).mean()

    def error(self, batch: Batch) -> float:
        """Return the mean relative error over samples and steps; inf if a roll-out blew up."""
        return mean_trajectory_error(self._solver, self._func, batch)

    def base_error(self, batch: Batch, route: int | None = None) -> float:
        """Return the same with no correction."""
        return mean_trajectory_error(self._base, self._func, batch, route)

    @torch.no_grad()
    def base_loss(self, batch: Batch, route: int) -> float:
        """Return the loss with no correction; inf if its roll-out blew up."""
        try:
            errors = trajectory_errors(self._base, self._func, batch, route)
        except NonFiniteError:
            return float("inf")
        return float(errors.sum(0).mean())


def objectives_of(
    name: str, solver: HyperSolver, func: VectorField
) -> tuple[tuple[Objective, ...], Objective]:
    """Return what each phase of a fit minimises, and what selects its best state."""
    assert isinstance(solver.hypernet, nn.Module)
    residual = ResidualObjective(solver.hypernet, solver.tableau.order)
    trajectory = TrajectoryObjective(solver, func)
    if name == "residual":
        return (residual,), residual
    if name == "trajectory":
        return (trajectory,), trajectory
    return (residual, trajectory), trajectory


def usable_scale(scale: float) -> float:
    """Return a scale to divide by: 1 where the base is exact or blew up."""
    return scale if math.isfinite(scale) and scale > 0 else 1.0
