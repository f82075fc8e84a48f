"""Explicit Runge-Kutta bases: the update a hypersolver corrects.

A base is no table of coefficients but code, in the host's order of operations, so that a solve
without correction equals torchdiffeq's own method bitwise. To add one, write it here and register
a method for it in the package's ``__init__`` (or in a plugin); its row of coefficients goes into
``tests/fuzz/reference.py``, which solves with it independently.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, TypeAlias

from torch import Tensor

from torchdiffeq_hyper.errors import OptionError


class Edge(Enum):
    """Which end of the step a stage lies on (hosts may perturb time there)."""

    INSIDE = 0
    START = 1
    END = 2


class StageCall(Protocol):
    """Evaluate the vector field for one stage."""

    def __call__(self, t: Tensor, y: Tensor, edge: Edge = Edge.INSIDE, /) -> Tensor:
        """Return ``func(t, y)``."""
        ...


Stepped: TypeAlias = tuple[Tensor, tuple[Tensor, ...]]
"""``(dt * psi, stages)``: the base's increment of a step, and its stage derivatives."""

Increment: TypeAlias = Callable[[StageCall, Tensor, Tensor, Tensor, Tensor], Stepped]


@dataclass(frozen=True)
class Tableau:
    r"""An explicit Runge-Kutta method: its order, its cost and its increment.

    Attributes:
        name: the name accepted as ``base=`` ("euler", "heun", ...).
        order: order p of the method; its local error is O(dt^(p+1)).
        calls: calls of func in one step (the number of stages s).
        increment: ``(call, t0, dt, t1, y) -> (dt * psi, (k_1, ..., k_s))``.
        alpha: the parameter of the second-order family, None for other methods.

    Example:
        >>> import torch
        >>> from torchdiffeq_hyper.tableaus import HEUN
        >>> t, dt, y = torch.tensor(0.0), torch.tensor(0.1), torch.ones(2)
        >>> dy, stages = HEUN.increment(lambda t, y, *edge: -y, t, dt, t + dt, y)
        >>> dy
        tensor([-0.0950, -0.0950])
    """

    name: str
    order: int
    calls: int
    increment: Increment
    alpha: float | None = None


def _euler(call: StageCall, t0: Tensor, dt: Tensor, t1: Tensor, y: Tensor) -> Stepped:
    k1 = call(t0, y, Edge.START)
    return dt * k1, (k1,)


def _midpoint(call: StageCall, t0: Tensor, dt: Tensor, t1: Tensor, y: Tensor) -> Stepped:
    half = 0.5 * dt
    k1 = call(t0, y, Edge.START)
    k2 = call(t0 + half, y + k1 * half)
    return dt * k2, (k1, k2)


def _rk4(call: StageCall, t0: Tensor, dt: Tensor, t1: Tensor, y: Tensor) -> Stepped:
    third = 1 / 3
    k1 = call(t0, y, Edge.START)
    k2 = call(t0 + dt * third, y + dt * k1 * third)
    k3 = call(t0 + dt * (2 / 3), y + dt * (k2 - k1 * third))
    k4 = call(t1, y + dt * (k1 - k2 + k3), Edge.END)
    return (k1 + 3 * (k2 + k3) + k4) * dt * 0.125, (k1, k2, k3, k4)


def _second_order(alpha: float) -> Increment:
    b2 = 1 / (2 * alpha)
    b1 = 1 - b2
    # Only a stage at the step's very end may be moved off a discontinuity there.
    edge = Edge.END if alpha == 1.0 else Edge.INSIDE

    def increment(call: StageCall, t0: Tensor, dt: Tensor, t1: Tensor, y: Tensor) -> Stepped:
        k1 = call(t0, y, Edge.START)
        k2 = call(t0 + dt * alpha, y + dt * k1 * alpha, edge)
        return dt * (k1 * b1 + k2 * b2), (k1, k2)

    return increment


def second_order(alpha: float = 0.5) -> Tableau:
    r"""Return the second-order method with c = (0, a), b = (1 - 1/(2a), 1/(2a)).

    a = 0.5 is the midpoint method, a = 1 Heun's, a = 2/3 Ralston's. Order 2, two
    calls of func a step. The family of Poli et al., "Hypersolvers: Toward Fast
    Continuous-Depth Models", NeurIPS 2020, https://arxiv.org/abs/2007.09601.

    Args:
        alpha: position of the second stage within the step; finite, above 0.

    Raises:
        OptionError: ``alpha`` is not a finite number above 0.

    Example:
        >>> from torchdiffeq_hyper.tableaus import second_order
        >>> second_order(2 / 3).calls
        2
    """
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not is_number or not 0 < alpha < math.inf:
        raise OptionError(
            problem=f"alpha is {alpha!r}: the second stage would lie outside the step's future.",
            expected="a finite number above 0 (0.5 midpoint, 2/3 Ralston, 1 Heun).",
            fix="alpha=0.5",
        )
    return Tableau("alpha", 2, 2, _second_order(float(alpha)), float(alpha))


EULER = Tableau("euler", 1, 1, _euler)
MIDPOINT = Tableau("midpoint", 2, 2, _midpoint)
HEUN = Tableau("heun", 2, 2, _second_order(1.0))
RK4 = Tableau("rk4", 4, 4, _rk4)
"""The 3/8 rule, which is what torchdiffeq calls rk4."""
