"""Classical solvers that a fitted one is compared with: torchdiffeq's, and Adams-Bashforth."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchdiffeq import odeint

from torchdiffeq_hyper._state import State, StateLayout, VectorField
from torchdiffeq_hyper.solvers._grid import equal_steps
from torchdiffeq_hyper.solvers._stepping import stage_call
from torchdiffeq_hyper.tableaus import MIDPOINT


class Solve(NamedTuple):
    """A solver at one setting.

    Attributes:
        label: for people.
        run: ``(func, y0, t) -> solution`` at the two points of t.
    """

    label: str
    run: Callable[[VectorField, State, Tensor], State]


class FixedStep(NamedTuple):
    """A method with equal steps.

    Attributes:
        each: calls of func in a step.
        start: calls of func that the first step takes beside.
        order: order of convergence.
        run: ``(func, y0, t, steps) -> solution`` at the two points of t.
    """

    each: int
    start: int
    order: int
    run: Callable[..., State]

    def with_steps(self, name: str, steps: int) -> Solve:
        """Return the method with so many steps."""
        label = f"{name} with {steps} step{'s' * (steps > 1)}"
        return Solve(label, partial(self.run, steps=steps))


def dopri5(tolerance: float, size: float) -> Solve:
    """Return torchdiffeq's dopri5 with one tolerance, the absolute one for states of a size."""
    label = f"dopri5 at rtol = {tolerance:.1e}"
    atol = tolerance * size
    return Solve(label, partial(_host, method="dopri5", rtol=tolerance, atol=atol))


def _host(func: VectorField, y0: State, t: Tensor, **given: Any) -> State:
    # Outside any scope that would answer to these names.
    solution: State = contextvars.Context().run(odeint, func, y0, t, **given)
    return solution


def _fixed(func: VectorField, y0: State, t: Tensor, steps: int, *, method: str) -> State:
    options = {"grid_constructor": lambda func, y0, t: equal_steps(t, steps)}
    return _host(func, y0, t, method=method, options=options)


# Weights of the derivatives at the last steps, newest first, times the step size.
_ADAMS_BASHFORTH = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12)}


def _adams_bashforth(func: VectorField, y0: State, t: Tensor, steps: int, *, order: int) -> State:
    """Solve by the method of Adams and Bashforth, started by one midpoint step.

    A later step has as high an order as there are derivatives, up to ``order``. Costs a call
    of func a step and one more.
    """
    layout = StateLayout.of(y0)
    y = layout.join(y0)
    call = stage_call(func, layout, y.dtype)
    start, history = y, list[Tensor]()
    for t0, t1 in pairwise(equal_steps(t.to(y.device), steps).unbind()):
        dt = t1 - t0
        if not history:
            dy, (f0, _) = MIDPOINT.increment(call, t0, dt, t1, y)
            history = [f0]
        else:
            history = [call(t0, y), *history][:order]
            weights = _ADAMS_BASHFORTH[len(history)]
            terms = (w * f for w, f in zip(weights, history, strict=True))
            dy = dt * torch.stack(list(terms)).sum(0)
        y = y + dy.to(y.dtype)
    return layout.split(torch.stack([start, y]))


FIXED = {
    "euler": FixedStep(1, 0, 1, partial(_fixed, method="euler")),
    "midpoint": FixedStep(2, 0, 2, partial(_fixed, method="midpoint")),
    "heun2": FixedStep(2, 0, 2, partial(_fixed, method="heun2")),
    "heun3": FixedStep(3, 0, 3, partial(_fixed, method="heun3")),
    "rk4": FixedStep(4, 0, 4, partial(_fixed, method="rk4")),
    "Adams-Bashforth 2": FixedStep(1, 1, 2, partial(_adams_bashforth, order=2)),
    "Adams-Bashforth 3": FixedStep(1, 1, 3, partial(_adams_bashforth, order=3)),
}
"""The methods with equal steps, by name."""
