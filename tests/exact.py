"""Exact leading error terms, for measuring orders of corrected methods."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stubs import spiral, spiral_solution
from torchdiffeq_hyper import StepInput
from torchdiffeq_hyper.tableaus import Tableau


def spiral_residual(tableau: Tableau, t: Tensor, y: Tensor, dt: float) -> Tensor:
    """Return R = (y(t + dt) - y - dt psi) / dt^(p+1) on `spiral`, from its exact solution."""
    exact = spiral_solution(t[None] + dt, y, float(t))[0]
    step = torch.tensor(dt, dtype=t.dtype)
    dy, _ = tableau.increment(lambda t, y, *edge: spiral(t, y), t, step, t + step, y)
    return (exact - y - dy) / dt ** (tableau.order + 1)


def leading_term(tableau: Tableau) -> Callable[[StepInput], Tensor]:
    """Return the hypernet that is the limit of the residual as dt goes to 0."""

    def at(step: StepInput, size: float) -> Tensor:
        assert isinstance(step.y, Tensor)
        both = [spiral_residual(tableau, step.t, step.y, sign * size) for sign in (1, -1)]
        return (both[0] + both[1]) / 2

    # Richardson's extrapolation of an even function of the step size.
    return lambda step: (4 * at(step, 0.02) - at(step, 0.04)) / 3


def zero(step: StepInput) -> Tensor | tuple[Tensor, ...]:
    """Correct nothing."""
    if isinstance(step.y, Tensor):
        return torch.zeros_like(step.y)
    return tuple(torch.zeros_like(part) for part in step.y)
