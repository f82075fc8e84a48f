"""Everything taken from torchdiffeq's internals (checked against 0.2.5).

A change upstream breaks this file and no other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

from torchdiffeq._impl.dopri5 import Dopri5Solver
from torchdiffeq._impl.misc import Perturb, _mixed_norm, _rms_norm
from torchdiffeq._impl.misc import _PerturbFunc as PerturbFunc
from torchdiffeq._impl.misc import _ReverseFunc as ReverseFunc
from torchdiffeq._impl.misc import _TupleFunc as TupleFunc
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver
from torchdiffeq._impl.solvers import FixedGridODESolver

__all__ = [
    "SOLVERS",
    "FixedGridODESolver",
    "Perturb",
    "PerturbFunc",
    "RKAdaptiveStepsizeODESolver",
    "ReverseFunc",
    "TupleFunc",
    "dopri5_solver",
    "forward_func_of",
    "is_default_norm",
    "options_of",
    "unperturbed",
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
