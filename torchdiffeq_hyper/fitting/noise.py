"""Whether residuals stand above the noise in them."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from torchdiffeq_hyper._errors import NoiseFloorError, explain
from torchdiffeq_hyper._layout import StateLayout
from torchdiffeq_hyper._types import State
from torchdiffeq_hyper.fitting.field import Field, state_dtype
from torchdiffeq_hyper.fitting.norms import sample_norms
from torchdiffeq_hyper.fitting.reference import Tolerances, measure_residuals, solve_reference
from torchdiffeq_hyper.fitting.routes import Plan, Route
from torchdiffeq_hyper.tableaus import Tableau

HIGHEST = 0.5
"""Share of the residual's size that may be noise."""
TIGHTEST = 1e-13
"""Tolerance below which float64 itself ends the search for a better solution."""


def measure_noise(
    field: Field, y0: State, tableau: Tableau, plan: Plan, tolerances: Tolerances
) -> float:
    """Return the mean noise in |R|_2, after checking that |R|_2 stands above it.

    The residuals are compared with those of a solution that is ten times tighter, lands
    on twice as many points (so that even a fixed-step method takes other steps) and is
    rounded to the dtype in which a solver keeps its state.

    Args:
        field: the vector field, for states like ``y0``.
        y0: a few samples.
        tableau: the base.
        plan: times and routes.
        tolerances: those of the reference solutions.

    Raises:
        NoiseFloorError: the noise exceeds half of the residuals.
    """
    layout = StateLayout.of(y0)
    flat = layout.join(y0)
    tight = 10.0 if tolerances.rtol / 10 >= TIGHTEST else 0.1
    solution = solve_reference(field, flat, plan.times, tolerances)
    finer = solve_reference(field, flat, _refined(plan.times), tolerances.tightened(tight))[::2]
    rounded = finer.to(state_dtype(flat.dtype)).to(finer.dtype)
    noises = []
    for route in plan.routes:
        first, second = (
            measure_residuals(field, tableau, route, states).residual
            for states in (solution, rounded)
        )
        noise = float(sample_norms(layout.split(first - second)).mean())
        size = float(sample_norms(layout.split(first)).mean())
        if noise > HIGHEST * size or size == 0:
            _refuse(tableau, route, size, noise, f"{flat.dtype}, reference by {tolerances}")
        noises.append(noise)
    return sum(noises) / len(noises)


def _refuse(tableau: Tableau, route: Route, size: float, noise: float, reference: str) -> NoReturn:
    fewer = max(1, route.n_steps // 2)
    raise NoiseFloorError(
        explain(
            f"{tableau.name} at {route.n_steps} steps is exact as far as can be told: its "
            f"mean residual |R| is {size:.3g}, of which {noise:.3g} is noise ({reference}).",
            f"noise below {HIGHEST:g} of the residual: nothing else could be learned.",
            f'the base as it is: odeint(func, y0, t, method="{tableau.name}")\n'
            f"or fewer steps: steps={fewer}\n"
            "or, if the digits matter: func.double() and y0.double()\n"
            "or, if the reference is the loose part: "
            "FitConfig(rtol=..., atol=...), 100 times smaller",
        )
    )


def _refined(times: Tensor) -> Tensor:
    """Return the times with their midpoints."""
    middles = (times[:-1] + times[1:]) / 2
    return torch.cat([torch.stack([times[:-1], middles], dim=1).flatten(), times[-1:]])
