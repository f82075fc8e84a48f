"""Time grids: how many steps, and where."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from torchdiffeq_hyper._rules import Whole
from torchdiffeq_hyper.errors import OptionError, StateShapeError, StateTypeError

Steps: TypeAlias = int | tuple[int, int] | None
"""Equal steps between two time points, a (low, high) range of them, or None."""

STEPS = Whole(1, 1_000_000)
"""How many steps a file may ask for between two points."""


def check_steps(steps: Steps) -> Steps:
    """Return ``steps``: None, an int of at least 1, or a (low, high) range of such."""
    values = steps if isinstance(steps, tuple) else (steps, steps)
    are_counts = all(isinstance(n, int) and type(n) is not bool and n >= 1 for n in values)
    if steps is not None and not (len(values) == 2 and are_counts and values[0] <= values[1]):  # type: ignore[operator]
        problem, fix = f"steps is {steps!r}.", "steps=10   # or steps=(4, 16)"
        raise OptionError(problem, "an int of at least 1, or a range (low, high) of such.", fix)
    return steps


def equal_steps(t: Tensor, n_steps: int | None) -> Tensor:
    """Return the time grid: ``n_steps`` equal steps between two points, else ``t``.

    Exact at both ends, differentiable in ``t``, and free of branches on its values.
    """
    if len(t) != 2 or n_steps is None:
        return t
    start, end = t.unbind()
    return torch.lerp(start, end, torch.linspace(0, 1, n_steps + 1, dtype=t.dtype, device=t.device))


def step_sizes(grid: Tensor, *, are_equal: bool) -> Tensor:
    """Return the differences of a grid's times, (n - 1,)."""
    if are_equal and torch.compiler.is_compiling():
        # Equal to the last digit too, so that one fused kernel serves all steps.
        return ((grid[-1] - grid[0]) / (len(grid) - 1)).expand(len(grid) - 1)
    return grid[1:] - grid[:-1]


def points_between(grid: Tensor, t: Tensor) -> Tensor:
    """Return the ends of ``t`` and, between them, the points of a grid, as ``t`` goes."""
    grid, (low, high) = grid.to(t), t.aminmax()
    inside = grid[(grid > low) & (grid < high)].sort(descending=bool(t[-1] < t[0])).values
    return torch.cat([t[:1], inside, t[-1:]])


def check_times(t: Tensor, y: Tensor) -> Tensor:
    """Return ``t`` on the device of ``y``, after checking that it is a list of times.

    Half precision comes back as float32: steps between its points have other sizes there.
    """
    expected, fix = (
        "a 1-D floating-point tensor with a time or more.",
        "t = torch.tensor([0.0, 1.0])",
    )
    if not isinstance(t, Tensor) or not t.is_floating_point():
        problem = f"t is {t.dtype if isinstance(t, Tensor) else type(t).__name__}."
        raise StateTypeError(problem, expected, fix)
    if t.dim() != 1 or len(t) == 0:
        problem = f"t has shape {tuple(t.shape)}."
        raise StateShapeError(problem, expected, fix)
    return t.to(y.device, torch.promote_types(t.dtype, torch.float32))
