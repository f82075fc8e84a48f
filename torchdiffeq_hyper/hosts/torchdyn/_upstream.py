"""Everything taken from torchdyn's internals (checked against 1.0.6).

Imports nothing of torchdyn, it looks at what the user has imported. A change upstream
breaks this file and no other.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from torchdiffeq_hyper.errors import AdjointWarning, HostWarning
from torchdiffeq_hyper.solvers._solver import Solver

_SOLVERS = "torchdyn.numerics.solvers.ode"
_ODEINT = "torchdyn.numerics.odeint"
_SENSITIVITY = "torchdyn.numerics.sensitivity"
_PROBLEMS = "torchdyn.core.problems"
_FIELDS = "torchdyn.core.defunc"
_SHOOTING = "torchdyn.numerics.solvers.templates"

ENTRANCES = (_ODEINT, _SENSITIVITY, _PROBLEMS)
"""The modules that whoever uses torchdyn's numerics, adjoints or models imports first."""

FIXED_LOOP = "_fixed_odeint"
ADAPTIVE_LOOP = "_adaptive_odeint"
ADJOINT = "_gather_odefunc_adjoint"
INTERPOLATED_ADJOINT = "_gather_odefunc_interp_adjoint"

# `core.problems` holds names of its own, imported from `numerics.sensitivity`.
_HOLDERS = {
    FIXED_LOOP: (_ODEINT,),
    ADAPTIVE_LOOP: (_ODEINT,),
    ADJOINT: (_SENSITIVITY, _PROBLEMS),
    INTERPOLATED_ADJOINT: (_SENSITIVITY, _PROBLEMS),
}

_SOLVER_HOLDERS = (
    (_PROBLEMS, "ODEProblem", ("solver", "solver_adjoint")),
    (_SHOOTING, "MultipleShootingDiffeqSolver", ("coarse_method", "fine_method")),
)


def holders(name: str) -> Iterator[ModuleType]:
    """Yield the imported modules through which torchdyn calls its function ``name``."""
    for module_name in _HOLDERS[name]:
        module = sys.modules.get(module_name)
        if module is not None and hasattr(module, name):
            yield module


def holders_of_solvers() -> Iterator[tuple[type[Any], tuple[str, ...]]]:
    """Yield the imported classes whose objects hold solvers, and under which attributes."""
    for module_name, name, attributes in _SOLVER_HOLDERS:
        kind = getattr(sys.modules.get(module_name), name, None)
        if kind is not None:
            yield kind, attributes


def solver_dict() -> dict[str, Any] | None:
    """Return the dict from a solver's name to its class; None while torchdyn is not imported."""
    found: dict[str, Any] | None = getattr(sys.modules.get(_SOLVERS), "SOLVER_DICT", None)
    return found if _ODEINT in sys.modules else None


def default_tolerances() -> tuple[float, float]:
    """Return the (rtol, atol) of `odeint`, whose loop for fixed steps is told of none."""
    parameters = inspect.signature(sys.modules[_ODEINT].odeint).parameters
    return float(parameters["rtol"].default), float(parameters["atol"].default)


def dopri5(dtype: torch.dtype) -> Any:
    """Return a solver object of torchdyn's own dopri5."""
    return sys.modules[_SOLVERS].str_to_solver("dopri5", dtype)


def solve_dopri5(func: Any, y0: Tensor, t: Tensor, *, rtol: float, atol: float) -> Tensor:
    """Solve by torchdyn's own dopri5."""
    odeint, solver = sys.modules[_ODEINT].odeint, dopri5(y0.dtype)
    solution: Tensor = odeint(func, y0, t, solver, rtol=rtol, atol=atol)[1]
    return solution


def dopri5_steps(
    func: Any, y0: Tensor, t: Tensor, *, rtol: float, atol: float
) -> tuple[Tensor, Tensor]:
    """Return the times of all steps of torchdyn's own dopri5, and the states there."""
    odeint, solver = sys.modules[_ODEINT].odeint, dopri5(y0.dtype)
    steps: tuple[Tensor, Tensor] = odeint(
        func, y0, t, solver, rtol=rtol, atol=atol, return_all_eval=True
    )
    return steps


def unreversed(func: Any) -> Callable[..., Any] | None:
    """Return the field whose time and sign `odeint` has negated, or None if it has not."""
    if not isinstance(func, FunctionType) or func.__module__ != _ODEINT:
        return None
    if func.__qualname__ not in ("odeint.<locals>.<lambda>", "odeint_symplectic.<locals>.<lambda>"):
        return None
    found: Callable[..., Any] = inspect.getclosurevars(func).nonlocals["f"]
    return found


def is_adjoint_dynamics(func: Any) -> bool:
    """Return whether ``func`` is the field of an adjoint's backward solve."""
    found = (getattr(func, "__module__", None), getattr(func, "__name__", None))
    return found == (_SENSITIVITY, "adjoint_dynamics")


def refine_spline(func: Any, t: Tensor, states: Tensor) -> None:
    """Have an interpolated adjoint's field read states off a spline through these.

    Args:
        func: the field of a backward solve.
        t: increasing times (n,).
        states: (n, batch, d).
    """
    host = sys.modules[_SENSITIVITY]
    coefficients = host.natural_cubic_coeffs(x=states.permute(1, 0, 2), t=t)
    cells = dict(zip(func.__code__.co_freevars, func.__closure__, strict=True))
    cells["x_spline"].cell_contents = host.CubicSpline(coeffs=coefficients, t=t)


def field_of(problem: object) -> object | None:
    """Return the field that a `NeuralODE`, or another `ODEProblem`, solves; None for others."""
    kind = getattr(sys.modules.get(_PROBLEMS), "ODEProblem", None)
    if kind is None or not isinstance(problem, kind):
        return None
    found: object = getattr(problem, "vf", None)
    return found


def wrapped_field(func: object) -> object | None:
    """Return the field inside torchdyn's wrapper if the two are the same; else None."""
    host = sys.modules.get(_FIELDS)
    if host is None or type(func) not in (host.DEFunc, host.DEFuncBase):
        return None
    if type(func) is host.DEFunc and drops_args(func):
        return None  # more states than the field inside
    found: object = func.vf  # type: ignore[attr-defined]
    return found


def takes_args(func: Any, args: Any) -> bool:
    """Return whether ``func`` is to be called with ``args=args``, as `DEFunc` calls its field."""
    try:
        parameters = inspect.signature(getattr(func, "forward", func)).parameters
    except (TypeError, ValueError):  # no signature to look at: builtins
        return False
    named = parameters.get("args")
    if named is not None and named.kind is not inspect.Parameter.VAR_POSITIONAL:
        return True
    kinds = {parameter.kind for parameter in parameters.values()}
    return bool(args) and inspect.Parameter.VAR_KEYWORD in kinds


def drops_args(func: Any) -> bool:
    """Return whether ``func`` is a `DEFunc` that keeps ``args`` from the user's field."""
    is_wrapper = type(func).__module__ == "torchdyn.core.defunc"
    order, loss = getattr(func, "order", 1), getattr(func, "integral_loss", None)
    return is_wrapper and (order > 1 or loss is not None)


def sample_state(func: Any, batch: int) -> list[tuple[nn.Module, str, Tensor | None]]:
    """Return what layers of ``func`` hold of every sample: data control, and a CNF's noise.

    Depth, which layers are told at every call, is listed with None: it holds nothing, but
    calls leave theirs behind.
    """
    found: list[tuple[nn.Module, str, Tensor | None]] = []
    for module in func.modules() if isinstance(func, nn.Module) else ():
        for name in ("_control", "noise"):
            held = getattr(module, name, None)
            if isinstance(held, Tensor) and held.dim() and len(held) == batch:
                found.append((module, name, held))
        if hasattr(module, "t"):
            found.append((module, "t", None))
    return found


_TEXTS = {
    "t_eval": "torchdyn returns the times of a reverse-time solve negated, for every solver. The "
    "solution is right, and belongs to t_span as you gave it: use that in place of t_eval.",
    "reverse adjoint": "torchdyn's adjoint gradients of a reverse-time solve have the wrong value "
    "and sign, for every solver. The solution is right. For gradients use "
    'sensitivity="autograd", or torchdiffeq\'s odeint_adjoint.',
    "save_at": "torchdyn ignores save_at under adjoint sensitivities, for every solver, and "
    'returns all of t_span. Use sensitivity="autograd", or pick points out of the solution.',
    "args": "torchdyn keeps args from the vector field where order > 1 or an integral loss is "
    "set, for every solver. Let the vector field hold them itself.",
}

_warned: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


def warn(what: str, part: Any) -> None:
    """Warn, once a solver, of a defect of the host.

    Args:
        what: which of them: "t_eval", "reverse adjoint", "save_at" or "args".
        part: the solver it happens to.
    """
    known = _warned.setdefault(_key(part), set())
    if what not in known:
        known.add(what)
        warnings.warn(_TEXTS[what], HostWarning, stacklevel=2)


def warn_if_trained_through_adjoint(part: Any) -> None:
    """Warn, once a solver, that torchdyn's adjoints give a hypernet no gradient."""
    known = _warned.setdefault(_key(part), set())
    if "untrained" in known or not isinstance(part, Solver):
        return
    if any(parameter.requires_grad for parameter in part.parameters()):
        known.add("untrained")
        warnings.warn(
            "torchdyn's adjoint sensitivities give a solver's own parameters (the hypernet's) no "
            'gradient, and they require one. To train them use sensitivity="autograd"; otherwise '
            "solver.requires_grad_(False).",
            AdjointWarning,
            stacklevel=2,
        )


def _key(part: Any) -> Any:
    """Return what stands for a part: itself, or its class where equal parts are the same."""
    is_itself = getattr(type(part), "__hash__", None) is object.__hash__
    return part if is_itself else type(part)
