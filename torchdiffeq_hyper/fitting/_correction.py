"""The correction of a bespoke solver at the end of its span: its objective and its scales."""

from __future__ import annotations

import torch
from torch import Tensor

from torchdiffeq_hyper._state import State, StateLayout, StepInput, VectorField, sample_norms
from torchdiffeq_hyper.errors import NonFiniteError
from torchdiffeq_hyper.fitting._data import Batch
from torchdiffeq_hyper.fitting._objectives import no_correction
from torchdiffeq_hyper.hypernets import ReadyHypernet, join_channels
from torchdiffeq_hyper.solvers.bespoke import BespokeSolver


class EndObjective:
    """The mean error at the end of a bespoke solver, relative to the state there."""

    name = "trajectory"

    def __init__(self, solver: BespokeSolver, func: VectorField) -> None:
        self._solver = solver
        self._func = func

    def norms(self, batch: Batch) -> Tensor:
        """Return |y(T) - y_n|_2 of each sample, (batch,), in units of the states' size."""
        return sample_norms(left_over(self._solver, self._func, batch), batch.units.state)[0]

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
        return EndObjective(BespokeSolver(self._solver.weights), self._func).error(batch)

    def base_loss(self, batch: Batch, route: int) -> float:
        """Return the same: errors are relative already."""
        return self.base_error(batch)


def left_over(solver: BespokeSolver, func: VectorField, batch: Batch) -> State:
    """Return y(T) - y_n, a state (1, batch, ...)."""
    samples = batch.routes[0]
    found = solver.solve(batch.field(func), batch.start(0), samples.times[[0, -1]])
    exact = batch.layout.split(samples.y[-1:])
    if isinstance(found, Tensor) and isinstance(exact, Tensor):
        return exact - found[1:]
    return tuple(b - a[1:] for a, b in zip(found, exact, strict=True))


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

    left = left_over(BespokeSolver(solver.weights, hypernet=watch), func, batch)
    layout = StateLayout.of(left)
    residual = layout.split(layout.join(left) / (seen[0].dt / net.time_unit) ** 2)
    one = residual[0] if isinstance(residual, Tensor) else tuple(part[0] for part in residual)
    net.calibrate(net.concat(seen[0]), join_channels(one))


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
