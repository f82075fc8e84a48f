"""The phase that fits a correction on top of a bespoke solver's weights."""

from __future__ import annotations

import torch
from torch import Tensor

from torchdiffeq_hyper._layout import StateLayout
from torchdiffeq_hyper._types import State, StepInput, VectorField
from torchdiffeq_hyper.bespoke import BespokeSolver
from torchdiffeq_hyper.errors import NonFiniteError
from torchdiffeq_hyper.fitting.data import Batch
from torchdiffeq_hyper.fitting.norms import sample_norms
from torchdiffeq_hyper.fitting.objectives import no_correction
from torchdiffeq_hyper.hypernets import ReadyHypernet, join_channels


class EndPhase:
    """Minimise the mean error at the end, relative to the state there."""

    name = "trajectory"

    def __init__(self, solver: BespokeSolver, func: VectorField) -> None:
        self._solver = solver
        self._func = func

    def norms(self, batch: Batch) -> Tensor:
        """Return |y(T) - y_n|_2 of each sample, (batch,), in units of the states' size."""
        samples = batch.routes[0]
        func, y0 = batch.field(self._func), batch.start(0)
        found = self._solver.solve(func, y0, samples.times[[0, -1]])
        difference = _difference(found, batch.layout.split(samples.y[-1:]))
        return sample_norms(difference, batch.units.state)[0]

    def loss(self, batch: Batch, route: int) -> Tensor:
        """Return the mean over samples."""
        return (self.norms(batch) / batch.end_sizes()).mean()

    @torch.no_grad()
    def error(self, batch: Batch) -> float:
        """Return the same without gradient; inf if the solve blew up."""
        try:
            return float(self.loss(batch, 0))
        except NonFiniteError:
            return float("inf")

    def base_error(self, batch: Batch, route: int | None = None) -> float:
        """Return the same without the correction."""
        return EndPhase(BespokeSolver(self._solver.weights), self._func).error(batch)

    def base_loss(self, batch: Batch, route: int) -> float:
        """Return the same: errors are relative already."""
        return self.base_error(batch)


def _difference(found: State, exact: State) -> State:
    if isinstance(found, Tensor) and isinstance(exact, Tensor):
        return found[1:] - exact
    return tuple(a[1:] - b for a, b in zip(found, exact, strict=True))


@torch.no_grad()
def calibrate_end(solver: BespokeSolver, func: VectorField, batch: Batch) -> None:
    """Calibrate a ready net that is still zero on what the weights alone leave over."""
    net = solver.hypernet
    if not isinstance(net, ReadyHypernet) or not net.is_zero:
        return  # it was fitted before, with these scales
    seen: list[StepInput] = []

    def watch(step: StepInput) -> State:
        seen.append(step)
        return no_correction(step)

    samples = batch.routes[0]
    watched = BespokeSolver(solver.weights, hypernet=watch)
    found = watched.solve(batch.field(func), batch.start(0), samples.times[[0, -1]])
    left = _difference(_negated(found), _negated(batch.layout.split(samples.y[-1:])))
    residual = StateLayout.of(left).join(left) / (seen[0].dt / net.time_unit) ** 2
    state = StateLayout.of(left).split(residual)
    one = state[0] if isinstance(state, Tensor) else tuple(part[0] for part in state)
    net.calibrate(net.concat(seen[0]), join_channels(one))


def _negated(state: State) -> State:
    return -state if isinstance(state, Tensor) else tuple(-part for part in state)


@torch.no_grad()
def added_at_end(solver: BespokeSolver, func: VectorField, batch: Batch) -> Tensor | None:
    """Return what the correction adds at the end of a batch's solves, flat; None without one."""
    if solver.hypernet is None:
        return None
    samples = batch.routes[0]
    ends = []
    for used in (solver, BespokeSolver(solver.weights)):
        state = used.solve(batch.field(func), batch.start(0), samples.times[[0, -1]])
        last = state[-1] if isinstance(state, Tensor) else tuple(part[-1] for part in state)
        ends.append(StateLayout.of(last).join(last))
    return (ends[0] - ends[1]).to(samples.y.dtype)
