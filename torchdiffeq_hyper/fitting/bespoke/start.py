"""Where a bespoke solver's weights start, and whether there is anything to gain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from torchdiffeq_hyper._layout import StateLayout
from torchdiffeq_hyper._types import State
from torchdiffeq_hyper.bespoke import compositions
from torchdiffeq_hyper.errors import FitDivergedError, NoiseFloorError, explain
from torchdiffeq_hyper.fitting.bespoke.loop import mean_error
from torchdiffeq_hyper.fitting.bespoke.pieces import Piece
from torchdiffeq_hyper.fitting.field import Field, state_dtype
from torchdiffeq_hyper.fitting.norms import sample_norms
from torchdiffeq_hyper.fitting.reference import Tolerances, solve_reference

LOOSE = 1e3
"""Noise, in units of the dtype's rounding, that is more than rounding."""


def best_starts(held_out: Sequence[Piece], like: Tensor) -> list[str]:
    """Return the classical methods that stay finite, the smallest held-out error first.

    Args:
        held_out: what is judged by.
        like: weights (n, n) of the right size, on the right device.

    Raises:
        FitDivergedError: all of them leave the finite range.
    """
    n = len(like)
    errors = {
        name: mean_error(held_out, weights.to(like)) for name, weights in compositions(n).items()
    }
    finite = sorted(
        (name for name in errors if math.isfinite(errors[name])), key=errors.__getitem__
    )
    if not finite:
        total = sum(len(piece.scale) for piece in held_out)
        least = min(_blown_up(held_out, w.to(like)) for w in compositions(n).values())
        raise FitDivergedError(
            explain(
                f"no classical method stays finite with {n} calls of func on the held-out "
                f"samples: at best {least} of {total} blow up. There is nothing to start from.",
                "a method that stays finite on all of them.",
                f"a shorter span, starts without those, or more calls: steps={2 * n}",
            )
        )
    return finite


def _blown_up(held_out: Sequence[Piece], weights: Tensor) -> int:
    """Return the number of samples whose end is not finite."""
    return sum(
        int((~torch.isfinite(piece.errors(piece.roll_out.end(weights)[0]))).sum())
        for piece in held_out
    )


def default_start(n: int) -> str:
    """Return the classical method of the highest order in n calls of func."""
    return {1: "euler", 2: "midpoint", 3: "heun3"}.get(n, "rk4")


def noise_at_end(field: Field, y0: State, times: Tensor, tolerances: Tolerances) -> float:
    """Return the relative noise in the solution's end: of the reference, and of rounding.

    Args:
        field: the vector field, for states like ``y0``.
        y0: a few samples.
        times: start and end.
        tolerances: those of the reference solutions.
    """
    layout = StateLayout.of(y0)
    flat = layout.join(y0)
    tight = tolerances.tightened(10.0 if tolerances.rtol >= 1e-12 else 0.1)
    first, second = (solve_reference(field, flat, times, each)[-1:] for each in (tolerances, tight))
    size, noise = (
        float(sample_norms(layout.split(state)).mean()) for state in (first, first - second)
    )
    # Half a unit in the last place of the state, and half of one of the state in true units.
    return noise / (size or 1.0) + torch.finfo(state_dtype(flat.dtype)).eps


def refuse_exact(name: str, n: int, error: float, noise: float, dtype: torch.dtype) -> NoReturn:
    """Refuse to fit where a classical method is exact to rounding, or the reference too loose.

    Raises:
        NoiseFloorError: always.
    """
    if noise > LOOSE * torch.finfo(dtype).eps:
        raise NoiseFloorError(
            explain(
                f"the reference solution is too loose to fit to: the mean relative error of {name} "
                f"with {n} calls of func is {error:.3g}, the reference's own {noise:.3g}.",
                "noise below half of the error. The default atol is absolute: it suits states of "
                "size 1 and above.",
                "config=tdh.FitConfig(atol=1e-3 * 1e-6)   # for states of size 1e-3",
            )
        )
    raise NoiseFloorError(
        explain(
            f"{name} with {n} calls of func is already exact to this dtype, as far as can be "
            f"told: its mean relative error is {error:.3g}, the noise in it {noise:.3g} ({dtype}).",
            "noise below half of the error: nothing else could be learned.",
            f"{name} as it is\n"
            f"or fewer calls: steps={max(1, n // 2)}\n"
            "or, if the digits matter: func.double() and y0.double()\n"
            "or, if the reference is the loose part: FitConfig(rtol=..., atol=...), "
            "100 times smaller",
        )
    )
