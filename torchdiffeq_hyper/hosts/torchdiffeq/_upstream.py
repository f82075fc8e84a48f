"""Everything taken from torchdiffeq's internals (checked against 0.2.5), and one call of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple

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
from torchdiffeq_hyper.tableaus import Tableau

__all__ = [
    "SOLVERS",
    "FixedGridODESolver",
    "Perturb",
    "PerturbFunc",
    "RKAdaptiveStepsizeODESolver",
]


def unperturbed(func: Any) -> Callable[..., Any] | None:
    """Return what the outermost wrapper calls with t cast to the state's dtype, else None."""
    # Not its subclasses, which do more than cast.
    inner: Callable[..., Any] | None = func.base_func if type(func) is PerturbFunc else None
    return inner


def forward_func_of(func: Any) -> Callable[..., Any] | None:
    """Return the func of the forward solve behind `odeint_adjoint`'s backward dynamics.

    None when ``func`` is not that local function of ``OdeintAdjointMethod.backward``.
    """
    if not isinstance(func, FunctionType) or func.__closure__ is None:
        return None
    if (func.__module__, func.__name__) != ("torchdiffeq._impl.adjoint", "augmented_dynamics"):
        return None
    closure = dict(zip(func.__code__.co_freevars, func.__closure__, strict=True))
    found: Callable[..., Any] = closure["func"].cell_contents
    return found


def is_default_norm(norm: Any) -> bool:
    """Return whether the host chose this norm because the user gave none."""
    if norm is None or norm is _rms_norm:
        return True
    # Around the norm of a tuple state the host puts a function of its own.
    wrapper = "_check_inputs.<locals>._norm"
    if not isinstance(norm, FunctionType) or norm.__qualname__ != wrapper:
        return False
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
    options = {name: value for name, value in options.items() if name in known}
    return Dopri5Solver(func=func, y0=y0, rtol=rtol, atol=atol, **options)


_PLAN = "_torchdiffeq_hyper_plan"


class ForwardPlan(NamedTuple):
    """How the forward solve of an `odeint_adjoint` call stepped, for its backward solves."""

    tableau: Tableau
    grid_between: Callable[[Tensor], Tensor]
    """From the two ends of a backward interval (host time) to the steps between."""


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
