r"""One step of Dormand and Prince's method for rows of samples, each with its own dt.

The error estimate and the interpolant are Shampine's (1986), the choice of the first step
that of Hairer, Norsett and Wanner (Solving ODEs I, II.4): all as in torchdiffeq's dopri5,
so that a sample takes the steps it would take alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

ORDER = 5

Field: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""``field(t, y)``: derivatives of the active samples, t (active,), y (active, width)."""

_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (
    35 / 384 - 1951 / 21600,
    0.0,
    500 / 1113 - 22642 / 50085,
    125 / 192 - 451 / 720,
    -2187 / 6784 + 12231 / 42400,
    11 / 84 - 649 / 6300,
    -1 / 60,
)
_MIDDLE = (
    6025192743 / 60171106304,
    0.0,
    51252292925 / 130801643196,
    -2691868925 / 90256659456,
    187940372067 / 3189068634112,
    -1776094331 / 39487288512,
    11237099 / 470086768,
)


class Attempt(NamedTuple):
    """A step that was tried, before it is known which samples accept it.

    Attributes:
        y1: states at its end.
        f1: derivatives there.
        error: estimated error of ``y1``.
        stages: the seven derivatives.
    """

    y1: Tensor
    f1: Tensor
    error: Tensor
    stages: tuple[Tensor, ...]


def attempt(field: Field, t: Tensor, dt: Tensor, y: Tensor, f: Tensor) -> Attempt:
    """Return a step of size ``dt`` (active,) from ``t``; six calls of the field."""
    real = y.dtype.to_real() if y.dtype.is_complex else y.dtype
    # Just before the end, which may be a discontinuity of func.
    end, start, size = _before((t + dt).to(real)), t.to(real), dt.to(real)
    h = size.unsqueeze(1)
    y1, stages = y, [f]
    for node, weights in zip(_NODES, _STAGES, strict=True):
        time = end if node == 1.0 else start + node * size
        y1 = y + _combine(stages, weights, h)
        stages.append(field(time, y1))
    return Attempt(y1, stages[-1], _combine(stages, _ERROR, h), tuple(stages))


def interpolate(step: Attempt, y: Tensor, dt: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    r"""Return the states of some rows inside their steps, of order 4.

    The quartic with the step's values and derivatives at both ends and its value in the
    middle.

    Args:
        step: the step.
        y: states at its start.
        dt: its sizes.
        x: for each of the rows, how far into the step, from 0 to 1.
        rows: which rows.
    """
    h, x = dt[rows].to(x.dtype).unsqueeze(1), x.unsqueeze(1)
    stages = [k[rows] for k in step.stages]
    y0, y1, f0, f1 = y[rows], step.y1[rows], h * stages[0], h * stages[-1]
    middle = y0 + _combine(stages, _MIDDLE, h)
    quartic = 2 * (f1 - f0) - 8 * (y1 + y0) + 16 * middle
    cubic = 5 * f0 - 3 * f1 + 18 * y0 + 14 * y1 - 32 * middle
    square = f1 - 4 * f0 - 11 * y0 - 5 * y1 + 16 * middle
    return y0 + x * (f0 + x * (square + x * (cubic + x * quartic)))


def _combine(stages: list[Tensor], weights: tuple[float, ...], h: Tensor) -> Tensor:
    total = stages[0] * (weights[0] * h)
    for k, weight in zip(stages[1:], weights[1:], strict=True):
        if weight:
            total = total + k * (weight * h)
    return total


def _before(t: Tensor) -> Tensor:
    """Return the number next below ``t``, with the gradient of ``t``."""
    with torch.no_grad():
        step = torch.nextafter(t, t - 1) - t
    return t + step
