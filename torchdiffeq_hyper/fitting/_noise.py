"""Whether what is fitted to stands above the noise in it: rounding, and that of references."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from torchdiffeq_hyper._state import State, StateLayout, sample_norms, stepped_dtype
from torchdiffeq_hyper.errors import NoiseFloorError
from torchdiffeq_hyper.fitting._data import measure_residuals
from torchdiffeq_hyper.fitting._field import Field
from torchdiffeq_hyper.fitting._reference import Plan, TimeGrid, Tolerances, solve_reference
from torchdiffeq_hyper.tableaus import Tableau

HIGHEST = 0.5
"""Share of the residual's size that may be noise."""
TIGHTEST = 1e-13
"""Tolerance below which float64 itself ends the search for a better solution."""


def measure_noise(
    field: Field, y0: State, tableau: Tableau, plan: Plan, tolerances: Tolerances
) -> float:
    """Return the mean noise in |R|_2, after checking that it is at most half of |R|_2.

    The residuals are compared with those of a solution that is ten times tighter and steps
    on twice as many points, so that even a fixed-step method takes other steps. To the
    difference comes what a solver cannot help: half a unit in the last place of the state
    that it keeps, over dt^(p+1).
    """
    layout, units = StateLayout.of(y0), field.units
    flat = layout.join(y0)
    tight = 10.0 if tolerances.rtol / 10 >= TIGHTEST else 0.1
    solution = solve_reference(field, flat, plan.times, tolerances)
    finer = solve_reference(field, flat, _refined(plan.times), tolerances.tightened(tight))[::2]
    half_unit = torch.finfo(stepped_dtype(flat.dtype)).eps / 2
    noises, unit = [], units.residual(tableau.order)
    for grid in plan.grids:
        first = measure_residuals(field, tableau, grid, solution)
        second = measure_residuals(field, tableau, grid, finer)
        dt = float(units.times(grid.times[:2]).diff())
        rounding = half_unit / dt ** (tableau.order + 1) * (first.y[1:] / units.state)
        size, noise, rounding_noise = (
            float(sample_norms(layout.split(values)).mean())
            for values in (first.residual, first.residual - second.residual, rounding)
        )
        noise += rounding_noise
        if noise > HIGHEST * size or size == 0:
            used = f"{flat.dtype}, reference by {tolerances}"
            _refuse(tableau, grid, unit * size, unit * noise, used)
        noises.append(unit * noise)
    return sum(noises) / len(noises)


def _refuse(
    tableau: Tableau, grid: TimeGrid, size: float, noise: float, reference: str
) -> NoReturn:
    fewer = max(1, grid.n_steps // 2)
    raise NoiseFloorError(
        problem=f"{tableau.name} at {grid.n_steps} steps is already exact to this dtype, as far as "
        f"can be told: its mean residual |R| is {size:.3g}, the noise in it {noise:.3g} "
        f"({reference}).",
        expected=f"noise below {HIGHEST:g} of |R|: nothing else could be learned.",
        fix="the base as it is, without a correction\n"
        f"or fewer steps: steps={fewer}\n"
        "or, if the digits matter: func.double() and y0.double()\n"
        "or, if the reference is the loose part: "
        "FitConfig(rtol=..., atol=...), 100 times smaller",
    )


def _refined(times: Tensor) -> Tensor:
    """Return the times with their midpoints."""
    middles = (times[:-1] + times[1:]) / 2
    return torch.cat([torch.stack([times[:-1], middles], dim=1).flatten(), times[-1:]])


LOOSE = 1e3
"""Noise, in units of the dtype's rounding, that is more than rounding."""


def noise_at_end(field: Field, y0: State, times: Tensor, tolerances: Tolerances) -> float:
    """Return the relative noise in the solution's end: of the reference, and of rounding."""
    layout = StateLayout.of(y0)
    flat = layout.join(y0)
    tight = tolerances.tightened(10.0 if tolerances.rtol >= 1e-12 else 0.1)
    first, second = (solve_reference(field, flat, times, each)[-1:] for each in (tolerances, tight))
    size, noise = (
        float(sample_norms(layout.split(state)).mean()) for state in (first, first - second)
    )
    # Half a unit in the last place of the state, and half of one of the state in true units.
    return noise / (size or 1.0) + torch.finfo(stepped_dtype(flat.dtype)).eps


def refuse_exact(name: str, n: int, error: float, noise: float, dtype: torch.dtype) -> NoReturn:
    """Refuse to fit where a classical method is exact to rounding, or the reference too loose."""
    if noise > LOOSE * torch.finfo(dtype).eps:
        raise NoiseFloorError(
            problem="the reference solution is too loose to fit to: the mean relative error of "
            f"{name} with {n} calls of func is {error:.3g}, the reference's own {noise:.3g}.",
            expected="noise below half of the error. The default atol is absolute: it suits states "
            "of size 1 and above.",
            fix="config=tdh.FitConfig(atol=1e-3 * 1e-6)   # for states of size 1e-3",
        )
    raise NoiseFloorError(
        problem=f"{name} with {n} calls of func is already exact to this dtype, as far as can be "
        f"told: its mean relative error is {error:.3g}, the noise in it {noise:.3g} ({dtype}).",
        expected="noise below half of the error: nothing else could be learned.",
        fix=f"{name} as it is\n"
        f"or fewer calls: steps={max(1, n // 2)}\n"
        "or, if the digits matter: func.double() and y0.double()\n"
        "or, if the reference is the loose part: FitConfig(rtol=..., atol=...), "
        "100 times smaller",
    )
