"""What one call of the host is: whose func, which way, which state, which role, which options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_hyper._state import StateLayout
from torchdiffeq_hyper.errors import OptionError, closest
from torchdiffeq_hyper.hosts.torchdiffeq._upstream import (
    PerturbFunc,
    ReverseFunc,
    TupleFunc,
    forward_func_of,
)
from torchdiffeq_hyper.solvers._grid import points_between
from torchdiffeq_hyper.tableaus import Tableau

_PLAN = "_torchdiffeq_hyper_plan"


@dataclass(frozen=True)
class ForwardPlan:
    """How the forward solve of an `odeint_adjoint` call stepped, for its backward solves.

    Attributes:
        tableau: the forward's base.
        grid: the forward's time grid (host time), None in event mode.
        step_size: the step size in event mode, else None.
    """

    tableau: Tableau
    grid: Tensor | None = None
    step_size: float | None = None

    def grid_between(self, t: Tensor) -> Tensor:
        """Return the forward's grid on one backward interval, whose time runs negated."""
        if self.grid is not None:
            return points_between(-self.grid, t)
        assert self.step_size is not None
        n = max(1, round(float(t[-1] - t[0]) / self.step_size))
        return torch.lerp(t[0], t[-1], torch.arange(n + 1, dtype=t.dtype, device=t.device) / n)


@dataclass(frozen=True)
class HostCall:
    """One call of the host, seen through its wrappers.

    Attributes:
        func: the user's vector field.
        negated: whether time and derivative are given negated (reverse time).
        layout: the state's parts, where the host flattened a tuple.
        is_adjoint_forward: whether this is the forward solve of `odeint_adjoint`.
        is_adjoint_backward: whether this is one of its backward solves.
        carrier: an object that lives exactly as long as the `odeint_adjoint` call and
            is seen by its forward and its backward: it holds the plan, so that backward
            needs no scope, no global and no particular thread.
    """

    func: Any
    negated: bool
    layout: StateLayout
    is_adjoint_forward: bool
    is_adjoint_backward: bool
    carrier: Any

    @classmethod
    def of(cls, func: Any) -> HostCall:
        """Look through the wrappers around ``func``."""
        negated, shapes, perturbs, carrier = False, None, 0, func
        while isinstance(func, PerturbFunc | ReverseFunc | TupleFunc):
            if isinstance(func, PerturbFunc):  # the outermost one of an `odeint` call
                perturbs, carrier = perturbs + 1, func
            elif isinstance(func, ReverseFunc):
                negated ^= func.mul < 0
            else:
                shapes = tuple(map(tuple, func.shapes))
            func = func.base_func
        forward = forward_func_of(func)
        return cls(
            func=func,
            negated=negated,
            layout=StateLayout(shapes),
            # odeint_adjoint wraps once, and its forward odeint wraps again.
            is_adjoint_forward=perturbs > 1,
            is_adjoint_backward=forward is not None,
            carrier=carrier if forward is None else forward,
        )

    @property
    def sign(self) -> int:
        """-1 where the host's time is the negated true time."""
        return -1 if self.negated else 1

    def leave_plan(self, plan: ForwardPlan) -> None:
        """Leave the forward's plan for the backward solves."""
        self.carrier.__dict__[_PLAN] = plan

    def plan(self) -> ForwardPlan | None:
        """Return the plan that the forward left, if it was one of ours."""
        plan: ForwardPlan | None = self.carrier.__dict__.get(_PLAN)
        return plan


def known_options(
    options: dict[str, Any], known: Sequence[str], method: str, also_accepted: frozenset[str]
) -> dict[str, Any]:
    """Return those options of a call that its method has; leave out others that are accepted.

    Raises:
        OptionError: one is neither.
    """
    for name in options:
        if name not in known and name not in also_accepted:
            where = ' ("alpha" goes with method "hyper2")' if name == "alpha" else ""
            raise OptionError(
                problem=f'method "{method}" has no option "{name}"{where}.',
                expected="one of " + ", ".join(f'"{option}"' for option in known) + ".",
                fix=f'options={{"{closest(name, known)}": ...}}',
            )
    return {name: value for name, value in options.items() if name in known}
