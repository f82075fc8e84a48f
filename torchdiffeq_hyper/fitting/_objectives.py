"""What a fit minimises: residuals, roll-outs, or the end of a span."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._state import (
    Hypernet,
    State,
    StateLayout,
    StepInput,
    VectorField,
    history_of,
    map_parts,
    sample_norms,
)
from torchdiffeq_hyper.errors import NonFiniteError
from torchdiffeq_hyper.fitting._data import Batch
from torchdiffeq_hyper.fitting._errors import quantiles
from torchdiffeq_hyper.hypernets import ReadyHypernet, join_channels
from torchdiffeq_hyper.solvers._hypersolver import HyperSolver
from torchdiffeq_hyper.solvers._stepping import Correction
from torchdiffeq_hyper.solvers.bespoke import BespokeSolver

ALONG = 0.3  # weight of the mean error along a roll-out beside that at its end
MOST_STEPS = 8  # steps of a grid that one iteration on residuals looks at


def no_correction(step: StepInput) -> State:
    """Return zero: the hypernet of the base alone."""
    return map_parts(torch.zeros_like, step.y)


class Objective(ABC):
    """A training loss, and an error to compare states of a net by.

    Attributes:
        name: "residual" or "trajectory", for the history.
    """

    name: str

    @abstractmethod
    def loss(self, batch: Batch, grid: int) -> Tensor:
        """Return the 0-d training loss."""

    @abstractmethod
    def error(self, batch: Batch) -> float:
        """Return the mean error over all grids, without gradient; inf if a solve blew up."""

    @abstractmethod
    def base_error(self, batch: Batch) -> float:
        """Return the same for the base alone."""

    @abstractmethod
    def base_loss(self, batch: Batch, grid: int) -> float:
        """Return the training loss of what is known without a fit, to which losses are relative."""

    def calibrate(self, batch: Batch) -> bool:
        """Scale the net before its first iteration, and return whether its error may change."""
        return False


@torch.no_grad()
def _number(measure: Callable[[], Tensor]) -> float:
    """Return what is measured; inf where a roll-out blows up."""
    try:
        return float(measure())
    except NonFiniteError:
        return math.inf


def usable_scale(scale: float) -> float:
    """Return a scale to divide by: 1 where the base is exact or blew up."""
    return scale if math.isfinite(scale) and scale > 0 else 1.0


def objectives_of(name: str, solver: HyperSolver, func: VectorField) -> tuple[Objective, ...]:
    """Return what each phase of a fit minimises; the last one selects the best state.

    Residuals say nothing of how errors travel through the history of a multistep method, whose
    roll-outs may be unstable: a net with a history is fitted on roll-outs alone.
    """
    assert isinstance(solver.hypernet, nn.Module)
    residual = ResidualObjective(solver.hypernet, solver.tableau.order)
    trajectory = TrajectoryObjective(solver, func)
    if name == "combined" and not history_of(solver.hypernet):
        return residual, trajectory
    return (residual if name == "residual" else trajectory,)


def step_inputs(batch: Batch, grid: int) -> Iterator[StepInput]:
    """Yield what a hypernet is given at each step along a reference solution."""
    samples, layout = batch.grids[grid], batch.layout
    start = layout.split(samples.y[0])
    for n, dt in enumerate(samples.dt.unbind()):
        stages = tuple(layout.split(stage[n]) for stage in samples.stages)
        y = layout.split(samples.y[n])
        history = tuple((layout.split(f), size) for f, size in samples.history(n))
        yield StepInput(dt, samples.times[n], y, stages[0], stages, start, batch.context, history)


@contextmanager
def measuring_time_in(net: object, span: tuple[float, float], order: int) -> Iterator[None]:
    """Let a ready net that is still zero measure time in this span; as before on any error.

    One that was fitted before keeps its unit, for a base of this order from now on. Every
    other net is left as it is.
    """
    with ExitStack() as on_error:
        if isinstance(net, ReadyHypernet):
            on_error.callback(net.measure_time_in, net.time_unit, net.order, net.span)
            own = (abs(span[1] - span[0]), span) if net.is_zero else (net.time_unit, net.span)
            net.measure_time_in(own[0], order, own[1])
        yield
        on_error.pop_all()


@torch.no_grad()
def calibrate(net: nn.Module, batch: Batch) -> bool:
    """Calibrate a ready net that is still zero, return whether; leave every other net as it is.

    Scales must not be changed under a net that was fitted before and is fitted on.
    """
    if not isinstance(net, ReadyHypernet) or not net.is_zero:
        return False
    inputs, residuals = [], []
    for grid, samples in enumerate(batch.grids):
        for n, step in enumerate(step_inputs(batch, grid)):
            inputs.append(net.concat(step))
            residuals.append(join_channels(batch.layout.split(samples.residual[n])))
    net.calibrate(torch.cat(inputs), torch.cat(residuals), batch.units.state)
    return True


def take_classical_start(net: nn.Module, objective: Objective, batch: Batch) -> float:
    """Let a ready net be the best of its classical methods, itself included; return its error."""
    error = objective.error(batch)
    if isinstance(net, ReadyHypernet):
        starts = {error: copy.deepcopy(net.state_dict())}
        for method in net.classical_methods():
            net.load_state_dict(method.state_dict())
            starts[objective.error(batch)] = method.state_dict()
        error = min(starts)
        net.load_state_dict(starts[error])
    return error


def residual_errors(
    hypernet: Hypernet, order: int, batch: Batch, grid: int, steps: Sequence[int]
) -> Tensor:
    r"""Return :math:`|R_n - g|_2` for some steps of a grid, (len(steps), batch).

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
        history = samples.history(n)[: correction.history]
        out = correction.evaluate(samples.times[n], samples.dt[n], samples.y[n], stages, history)
        differences.append(samples.residual[n] - factor * layout.join(out))
    return sample_norms(layout.split(torch.stack(differences)))


@torch.no_grad()
def all_residual_errors(hypernet: Hypernet, order: int, batch: Batch) -> Tensor:
    """Return |R - g|_2 of all samples, steps and grids, (n,)."""
    errors = [
        residual_errors(hypernet, order, batch, grid, range(len(samples.dt))).flatten()
        for grid, samples in enumerate(batch.grids)
    ]
    return torch.cat(errors)


def delta_quantiles(hypernet: Hypernet, order: int, batch: Batch) -> dict[str, float]:
    """Return quantiles of |R - g|_2 in true units: the state's over time^(p+1)."""
    return quantiles(all_residual_errors(hypernet, order, batch), batch.units.residual(order))


class ResidualObjective(Objective):
    r"""The mean over n of :math:`|R_n - g|_2`: calls of g only."""

    name = "residual"

    def __init__(self, net: Hypernet, order: int) -> None:
        self._net, self._order = net, order

    def loss(self, batch: Batch, grid: int) -> Tensor:
        """Return the mean over a few random steps, so that fine grids cost no more."""
        n_steps = len(batch.grids[grid].dt)
        steps = torch.randperm(n_steps)[:MOST_STEPS].tolist()
        return residual_errors(self._net, self._order, batch, grid, steps).mean()

    def error(self, batch: Batch) -> float:
        """Return the mean of |R - g|_2 as a share of that of |R|_2."""
        own, size = (
            float(all_residual_errors(net, self._order, batch).mean())
            for net in (self._net, no_correction)
        )
        return own / (size or 1.0)

    def base_error(self, batch: Batch) -> float:
        """Return 1: all of |R|_2."""
        return 1.0

    @torch.no_grad()
    def base_loss(self, batch: Batch, grid: int) -> float:
        """Return the mean of |R|_2."""
        steps = range(len(batch.grids[grid].dt))
        return float(residual_errors(no_correction, self._order, batch, grid, steps).mean())


class TrajectoryObjective(Objective):
    r"""The sum over n of :math:`|y(t_n) - y_n|_2` of the solver's own roll-out.

    For a net with a history the errors are relative to the states, and that of the end counts
    once more: the sum over a roll-out of few steps leaves the end behind.
    """

    name = "trajectory"

    def __init__(self, solver: HyperSolver, func: VectorField) -> None:
        self._solver, self._func = solver, func
        self._base = HyperSolver(solver.base, no_correction, alpha=solver.alpha)
        self._is_relative = history_of(solver.hypernet) > 0
        self._classical = [self._base]
        if isinstance(solver.hypernet, ReadyHypernet):
            nets = solver.hypernet.classical_methods()
            self._classical += [HyperSolver(solver.base, net) for net in nets]

    def _norms(self, solver: HyperSolver, batch: Batch, grid: int) -> Tensor:
        """Return |y(t_n) - y_n|_2 in units of the states' size, (n, batch)."""
        samples = batch.grids[grid]
        found = solver.solve(batch.field(self._func), batch.start(grid), samples.times)
        exact = batch.layout.split(samples.y)
        off = map_parts(lambda y, y_ref: (y - y_ref)[1:], found, exact)
        return sample_norms(off, batch.units.state)

    def _relative(self, solver: HyperSolver, batch: Batch) -> Tensor:
        means = [
            (self._norms(solver, batch, grid) / batch.sizes(grid)[1:]).mean()
            for grid in range(len(batch.grids))
        ]
        return torch.stack(means).mean()

    def _loss(self, solver: HyperSolver, batch: Batch, grid: int) -> Tensor:
        norms = self._norms(solver, batch, grid)
        if not self._is_relative:
            return norms.sum(0).mean()
        errors = norms / batch.sizes(grid)[1:]
        return errors[-1].mean() + ALONG * errors.mean()

    def loss(self, batch: Batch, grid: int) -> Tensor:
        """Return the mean over samples."""
        return self._loss(self._solver, batch, grid)

    def error(self, batch: Batch) -> float:
        """Return the mean relative error over grids, steps and samples."""
        return _number(lambda: self._relative(self._solver, batch))

    def base_error(self, batch: Batch) -> float:
        """Return the same with no correction."""
        return _number(lambda: self._relative(self._base, batch))

    def base_loss(self, batch: Batch, grid: int) -> float:
        """Return the least loss of the classical methods that the solver can be."""
        return min(
            _number(lambda solver=solver: self._loss(solver, batch, grid))  # type: ignore[misc]
            for solver in self._classical
        )


class EndObjective(Objective):
    """The mean error at the end of a bespoke solver, relative to the state there."""

    name = "trajectory"

    def __init__(self, solver: BespokeSolver, func: VectorField) -> None:
        self._solver, self._func = solver, func

    def _ends(self, solver: BespokeSolver, batch: Batch) -> State:
        """Return a solver's ends, (1, batch, ...)."""
        times = batch.grids[0].times[[0, -1]]
        solution = solver.solve(batch.field(self._func), batch.start(0), times)
        return map_parts(lambda part: part[1:], solution)

    def norms(self, batch: Batch) -> Tensor:
        """Return |y(T) - y_n|_2 of each sample, (batch,), in units of the states' size."""
        exact = batch.layout.split(batch.grids[0].y[-1:])
        left = map_parts(torch.sub, exact, self._ends(self._solver, batch))
        return sample_norms(left, batch.units.state)[0]

    def loss(self, batch: Batch, grid: int) -> Tensor:
        """Return the mean over samples."""
        return (self.norms(batch) / batch.end_sizes()).mean()

    def error(self, batch: Batch) -> float:
        """Return the same without gradient; inf if the solve blew up."""
        return _number(lambda: self.loss(batch, 0))

    def base_error(self, batch: Batch) -> float:
        """Return the same without the correction."""
        return EndObjective(BespokeSolver(self._solver.weights), self._func).error(batch)

    def base_loss(self, batch: Batch, grid: int) -> float:
        """Return the same: errors are relative already."""
        return self.base_error(batch)

    @torch.no_grad()
    def calibrate(self, batch: Batch) -> bool:
        """Calibrate a ready net that is still zero on what the weights alone leave over."""
        net = self._solver.hypernet
        if not isinstance(net, ReadyHypernet) or not net.is_zero:
            return True  # it was fitted before, with these scales; but after other weights
        seen = list[StepInput]()

        def watch(step: StepInput) -> State:
            seen.append(step)
            return no_correction(step)

        exact = batch.layout.split(batch.grids[0].y[-1:])
        ends = self._ends(BespokeSolver(self._solver.weights, hypernet=watch), batch)
        step = seen[0].dt / net.time_unit
        residual = map_parts(lambda y, x: (y - x)[0] / step**2, exact, ends)
        net.calibrate(net.concat(seen[0]), join_channels(residual))
        return True

    @torch.no_grad()
    def added(self, batch: Batch) -> Tensor | None:
        """Return what the correction adds at the end, flat; None without one."""
        if self._solver.hypernet is None:
            return None
        pair = (self._solver, BespokeSolver(self._solver.weights))
        own, plain = (map_parts(lambda y: y[0], self._ends(solver, batch)) for solver in pair)
        added = map_parts(torch.sub, own, plain)
        return StateLayout.of(added).join(added).to(batch.grids[0].y.dtype)
