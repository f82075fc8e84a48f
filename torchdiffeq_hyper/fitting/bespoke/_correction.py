"""The phase that fits a correction on top of a bespoke solver's weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchdiffeq_hyper._state import State, StateLayout, StepInput, VectorField, sample_norms
from torchdiffeq_hyper.errors import NonFiniteError
from torchdiffeq_hyper.fitting._data import Batch
from torchdiffeq_hyper.fitting._objectives import no_correction
from torchdiffeq_hyper.hypernets import ReadyHypernet, join_channels
from torchdiffeq_hyper.solvers.bespoke import BespokeSolver


class EndPhase:
    """Minimise the mean error at the end, relative to the state there."""

    name = "trajectory"

    def __init__(self, solver: BespokeSolver, func: VectorField) -> None:
        self._solver = solver
        self._func = func

    def norms(self, batch: Batch) -> Tensor:
        """Return |y(T) - y_n|_2 of each sample, (batch,), in units of the states' size."""
        samples = batch.grids[0]
        func, y0 = batch.field(self._func), batch.start(0)
        found = self._solver.solve(func, y0, samples.times[[0, -1]])
        difference = _difference(found, batch.layout.split(samples.y[-1:]))
        return sample_norms(difference, batch.units.state)[0]

    def loss(self, batch: Batch, grid: int) -> Tensor:
        """Return the mean over samples."""
        return (self.norms(batch) / batch.end_sizes()).mean()

    @torch.no_grad()
    def error(self, batch: Batch) -> float:
        """Return the same without gradient; inf if the solve blew up."""
        try:
            return float(self.loss(batch, 0))
        except NonFiniteError:
            return float("inf")

    def base_error(self, batch: Batch, grid: int | None = None) -> float:
        """Return the same without the correction."""
        return EndPhase(BespokeSolver(self._solver.weights), self._func).error(batch)

    def base_loss(self, batch: Batch, grid: int) -> float:
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

    samples = batch.grids[0]
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
    samples = batch.grids[0]
    ends = []
    for used in (solver, BespokeSolver(solver.weights)):
        state = used.solve(batch.field(func), batch.start(0), samples.times[[0, -1]])
        last = state[-1] if isinstance(state, Tensor) else tuple(part[-1] for part in state)
        ends.append(StateLayout.of(last).join(last))
    return (ends[0] - ends[1]).to(samples.y.dtype)


RIDGE = 1e-8
"""Pull towards small weights, relative to the derivatives' mean square."""


@dataclass(frozen=True)
class KnotData:
    """Derivatives of some roll-outs and the solution beside them, weighted alike.

    Attributes:
        stages: (n, N) the derivatives.
        values: (n - 1, N) the solution's way from the start to the inner knots, divided by
            the span.
        slopes: (n + 1, N) the solution's derivative at all knots.
    """

    stages: Tensor
    values: Tensor
    slopes: Tensor


def fit_knots(data: Iterable[KnotData]) -> tuple[Tensor, Tensor]:
    """Return the weights of the derivatives in the knots' values and slopes.

    Least squares over all data, with sums that keep constant derivatives exact: i/n for
    the i-th value, 1 for slopes.

    Returns:
        Values (n - 1, n) and slopes (n + 1, n), float64.
    """
    gram, value_products, slope_products = (
        sum(parts) for parts in zip(*map(_products, data), strict=True)
    )
    n = len(gram)
    gram = gram + RIDGE * gram.diagonal().mean() * torch.eye(n, dtype=gram.dtype)
    inner = torch.linspace(0, 1, n + 1, dtype=gram.dtype)[1:-1]
    return (
        _solve(gram, value_products, inner),
        _solve(gram, slope_products, torch.ones(n + 1, dtype=gram.dtype)),
    )


def _products(data: KnotData) -> tuple[Tensor, Tensor, Tensor]:
    stages = data.stages.double()
    gram, values, slopes = (
        (other.double() @ stages.t()).cpu() for other in (stages, data.values, data.slopes)
    )
    return gram, values, slopes


def _solve(gram: Tensor, products: Tensor, sums: Tensor) -> Tensor:
    """Return the rows w with ``w gram = products`` as near as their given sums allow."""
    n = len(gram)
    system = torch.zeros(n + 1, n + 1, dtype=gram.dtype)
    scale = gram.diagonal().mean()
    system[:n, :n] = gram / scale
    system[:n, n] = system[n, :n] = 1
    wanted = torch.cat([products.t() / scale, sums[None]])
    solution: Tensor = torch.linalg.solve(system, wanted)
    return solution[:n].t().contiguous()
