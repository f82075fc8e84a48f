"""Everything taken from torchdiffeq's internals (checked against 0.2.5), and one call of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor
from torchdiffeq._impl.dopri5 import Dopri5Solver
from torchdiffeq._impl.misc import Perturb, _mixed_norm, _rms_norm
from torchdiffeq._impl.misc import _PerturbFunc as PerturbFunc
from torchdiffeq._impl.misc import _ReverseFunc as ReverseFunc
from torchdiffeq._impl.misc import _TupleFunc as TupleFunc
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver
from torchdiffeq._impl.solvers import FixedGridODESolver

from torchdiffeq_hyper._state import StateLayout
from torchdiffeq_hyper.errors import OptionError, closest
from torchdiffeq_hyper.methods._method import Method
from torchdiffeq_hyper.solvers._binding import Times, resolve
from torchdiffeq_hyper.tableaus import Tableau

__all__ = ["SOLVERS", "FixedGridODESolver", "Perturb", "PerturbFunc", "RKAdaptiveStepsizeODESolver"]


def is_default_norm(norm: Any) -> bool:
    """Return whether the host chose this norm because the user gave none."""
    # Around the norm of a tuple state the host puts a function of its own.
    if getattr(norm, "__qualname__", None) != "_check_inputs.<locals>._norm":
        return norm is None or norm is _rms_norm
    return inspect.getclosurevars(norm).nonlocals.get("norm") is _mixed_norm


def options_of(solver: Any) -> frozenset[str]:
    """Return the option names that a solver class of the host accepts."""
    names = {"norm"}
    for cls in getattr(solver, "__mro__", ()):
        if "__init__" in cls.__dict__:
            names |= set(inspect.signature(cls.__init__).parameters)
    return frozenset(names - {"self", "func", "y0", "rtol", "atol"})


def dopri5_solver(func: Any, y0: Any, rtol: Any, atol: Any, **options: Any) -> Any:
    """Return the host's own dopri5 for a solve, without options of other methods."""
    known = options_of(Dopri5Solver)
    own = {name: value for name, value in options.items() if name in known}
    return Dopri5Solver(func=func, y0=y0, rtol=rtol, atol=atol, **own)


Plan: TypeAlias = tuple[Tableau, Callable[[Tensor], Tensor]]
"""How the forward solve of an `odeint_adjoint` call stepped, for its backward solves: the base,
and the steps between the two ends of an interval (in the host's time)."""


@dataclass(frozen=True)
class HostCall:
    """One call of the host, seen through its wrappers."""

    func: Any  # the user's vector field
    negated: bool  # whether time and derivative are given negated (reverse time)
    layout: StateLayout  # the state's parts, where the host flattened a tuple
    is_adjoint_forward: bool  # whether this is the forward solve of `odeint_adjoint`
    is_adjoint_backward: bool
    # Lives as long as the `odeint_adjoint` call and is seen by its forward and its backward:
    # what it holds needs no scope, no global and no particular thread.
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
        names = (getattr(func, "__module__", None), getattr(func, "__name__", None))
        is_backward = names == ("torchdiffeq._impl.adjoint", "augmented_dynamics")
        if is_backward:  # its dynamics hold the forward's func
            carrier = inspect.getclosurevars(func).nonlocals["func"]
        return cls(
            func=func,
            negated=negated,
            layout=StateLayout(shapes),
            # odeint_adjoint wraps once, and its forward odeint wraps again.
            is_adjoint_forward=perturbs > 1,
            is_adjoint_backward=is_backward,
            carrier=carrier,
        )

    @property
    def sign(self) -> int:
        """-1 where the host's time is the negated true time."""
        return -1 if self.negated else 1

    def find_part(self, method: Method, t: Tensor, options: dict[str, Any]) -> Any:
        """Return the fitted part for the host's times ``t`` (0-d: an event's start)."""
        return resolve(method, self.func, Times(t, is_negated=self.negated), options)

    def leave_plan(self, plan: Plan) -> None:
        """Leave the forward's plan for the backward solves."""
        vars(self.carrier)["_torchdiffeq_hyper_plan"] = plan

    def plan(self) -> Any:
        """Return the plan that the forward left; None if it was not one of ours."""
        return vars(self.carrier).get("_torchdiffeq_hyper_plan")


def known_options(
    options: dict[str, Any], known: Sequence[str], method: str, also_accepted: frozenset[str]
) -> dict[str, Any]:
    """Return those options of a call that its method has; refuse what is not accepted either."""
    for name in options:
        if name not in known and name not in also_accepted:
            where = ' ("alpha" goes with method "hyper2")' if name == "alpha" else ""
            raise OptionError(
                problem=f'method "{method}" has no option "{name}"{where}.',
                expected="one of " + ", ".join(f'"{option}"' for option in known) + ".",
                fix=f'options={{"{closest(name, known)}": ...}}',
            )
    return {name: value for name, value in options.items() if name in known}
