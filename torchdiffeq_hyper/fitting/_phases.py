"""The phases of a fit: what is minimised in each."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchdiffeq_hyper._state import VectorField
from torchdiffeq_hyper.errors import NonFiniteError
from torchdiffeq_hyper.fitting._checkpoint import FitState
from torchdiffeq_hyper.fitting._data import Batch
from torchdiffeq_hyper.fitting._objectives import (
    mean_residual_error,
    mean_trajectory_error,
    no_correction,
    residual_errors,
    trajectory_errors,
)
from torchdiffeq_hyper.solvers._hypersolver import HyperSolver

OBJECTIVES = ("combined", "residual", "trajectory")
MOST_STEPS = 8
"""Steps of a grid that one iteration of the residual phase looks at."""


class Phase(Protocol):
    """One objective, to minimise and to judge by."""

    name: str

    def loss(self, batch: Batch, grid: int) -> Tensor:
        """Return the 0-d training loss."""
        ...

    def error(self, batch: Batch) -> float:
        """Return the mean error over all grids, without gradient."""
        ...

    def base_error(self, batch: Batch, grid: int | None = None) -> float:
        """Return the same for the base alone, over all grids or on one."""
        ...

    def base_loss(self, batch: Batch, grid: int) -> float:
        """Return the training loss of the base alone, to which losses are relative."""
        ...


class ResidualPhase:
    r"""Minimise mean_n :math:`|R_n - g|_2` ([H] eq. 5): calls of g only."""

    name = "residual"

    def __init__(self, net: nn.Module, order: int) -> None:
        self._net = net
        self._order = order

    def loss(self, batch: Batch, grid: int) -> Tensor:
        """Return the mean over a few random steps, so that fine grids cost no more."""
        n_steps = len(batch.grids[grid].dt)
        steps = torch.randperm(n_steps)[:MOST_STEPS].tolist()
        return residual_errors(self._net, self._order, batch, grid, steps).mean()

    def error(self, batch: Batch) -> float:
        """Return the mean of |R - g|_2 as a share of that of |R|_2."""
        size = mean_residual_error(no_correction, self._order, batch)
        return mean_residual_error(self._net, self._order, batch) / (size or 1.0)

    def base_error(self, batch: Batch, grid: int | None = None) -> float:
        """Return 1: all of |R|_2."""
        return 1.0

    def base_loss(self, batch: Batch, grid: int) -> float:
        """Return the mean of |R|_2."""
        return mean_residual_error(no_correction, self._order, batch, grid)


class TrajectoryPhase:
    r"""Minimise :math:`\sum_n |y(t_n) - y_n|_2` of the solver's own roll-out."""

    name = "trajectory"

    def __init__(self, solver: HyperSolver, func: VectorField) -> None:
        self._solver = solver
        self._base = HyperSolver(solver.base, no_correction, alpha=solver.alpha)
        self._func = func

    def loss(self, batch: Batch, grid: int) -> Tensor:
        """Return the mean over samples."""
        return trajectory_errors(self._solver, self._func, batch, grid).sum(0).mean()

    def error(self, batch: Batch) -> float:
        """Return the mean relative error over samples and steps; inf if a roll-out blew up."""
        return mean_trajectory_error(self._solver, self._func, batch)

    def base_error(self, batch: Batch, grid: int | None = None) -> float:
        """Return the same with no correction."""
        return mean_trajectory_error(self._base, self._func, batch, grid)

    @torch.no_grad()
    def base_loss(self, batch: Batch, grid: int) -> float:
        """Return the loss with no correction; inf if its roll-out blew up."""
        try:
            errors = trajectory_errors(self._base, self._func, batch, grid)
        except NonFiniteError:
            return float("inf")
        return float(errors.sum(0).mean())


def phases_of(
    objective: str, solver: HyperSolver, func: VectorField
) -> tuple[tuple[Phase, ...], Phase]:
    """Return an objective's phases in order, and the one that judges."""
    assert isinstance(solver.hypernet, nn.Module)
    residual = ResidualPhase(solver.hypernet, solver.tableau.order)
    trajectory = TrajectoryPhase(solver, func)
    if objective == "residual":
        return (residual,), residual
    if objective == "trajectory":
        return (trajectory,), trajectory
    return (residual, trajectory), trajectory


LOWEST_RATE = 0.01
"""What the learning rate is annealed to, as a share of its start."""


def annealed(share: float) -> float:
    """Return the share of the learning rate that is left after a share of a phase."""
    return LOWEST_RATE + (1 - LOWEST_RATE) * (1 + math.cos(math.pi * share)) / 2


class Progress:
    """Shows how far a fit is, what it is doing and how well.

    Args:
        title: what is fitted.
        iterations: iterations of all phases.
        shown: whether to show anything.
    """

    def __init__(self, title: str, iterations: int, *, shown: bool) -> None:
        self._bar = tqdm(total=iterations, desc=title, disable=not shown)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()

    def say(self, activity: str) -> None:
        """Show what is going on before the first iteration."""
        self._bar.set_postfix_str(activity)

    def tell(self, line: str) -> None:
        """Show a line that stays."""
        if not self._bar.disable:
            self._bar.write(line, file=self._bar.fp)

    def show(self, phase: str, iteration: int, total: int, state: FitState) -> None:
        """Show the state after an iteration."""
        self._bar.total = total
        self._bar.set_postfix_str(
            f"{phase}, held-out error {state.best_error:.3g} (base {state.base_error:.3g})",
            refresh=False,
        )
        self._bar.update(iteration - self._bar.n)
