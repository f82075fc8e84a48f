"""Names and private behaviour of torchdyn (checked against 1.0.6).

The signatures by which torchdyn calls us are in `_methods` and `_stepper`.

Imports nothing of torchdyn: it looks at what the user has imported.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType, ModuleType
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._fields import own_random_state
from torchdiffeq_hyper.errors import HostWarning
from torchdiffeq_hyper.hosts._host import warn_once

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


def holders(name: str) -> Iterator[ModuleType]:
    """Yield the imported modules through which torchdyn calls its function ``name``.

    (`core.problems` holds names of its own, imported from `numerics.sensitivity`.)
    """
    for module_name in ENTRANCES:
        module = sys.modules.get(module_name)
        if module is not None and hasattr(module, name):
            yield module


def holders_of_solvers() -> Iterator[tuple[type[Any], tuple[str, ...]]]:
    """Yield the imported classes whose objects hold solvers, and under which attributes."""
    for module_name, name, attributes in (
        (_PROBLEMS, "ODEProblem", ("solver", "solver_adjoint")),
        (_SHOOTING, "MultipleShootingDiffeqSolver", ("coarse_method", "fine_method")),
    ):
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


def solve_dopri5(func: Any, y0: Tensor, t: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Return times and states of torchdyn's own dopri5, with ``return_all_eval`` of all steps."""
    found: tuple[Tensor, Tensor] = sys.modules[_ODEINT].odeint(
        func, y0, t, dopri5(y0.dtype), **options
    )
    return found


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

    The times (n,) increase; the states are (n, batch, d).
    """
    host = sys.modules[_SENSITIVITY]
    coefficients = host.natural_cubic_coeffs(x=states.permute(1, 0, 2), t=t)
    cells = dict(zip(func.__code__.co_freevars, func.__closure__, strict=True))
    cells["x_spline"].cell_contents = host.CubicSpline(coeffs=coefficients, t=t)


def is_problem(model: object) -> TypeGuard[nn.Module]:
    """Return whether ``model`` is a `NeuralODE`, or another `ODEProblem`."""
    kind = getattr(sys.modules.get(_PROBLEMS), "ODEProblem", None)
    return kind is not None and isinstance(model, kind)


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


Held: TypeAlias = tuple[nn.Module, str, Tensor | None]
"""A layer, an attribute of it, and its value: for each sample along dim 0, or None for one
that is only put back after a call."""


def held_by(held: Sequence[Held], index: Tensor) -> list[Held]:
    """Return what layers hold of the samples at ``index``."""
    return [
        (module, name, None if value is None else value[index.to(value.device)])
        for module, name, value in held
    ]


def sample_state(func: Any, batch: int) -> list[Held]:
    """Return what layers of ``func`` hold of every sample: data control, and a CNF's noise.

    Depth, which layers are told at every call and which calls leave behind, comes with None.
    """
    found: list[Held] = []
    for module in func.modules() if isinstance(func, nn.Module) else ():
        for name in ("_control", "noise"):
            held = getattr(module, name, None)
            if isinstance(held, Tensor) and held.dim() and len(held) == batch:
                found.append((module, name, held))
        if hasattr(module, "t"):
            found.append((module, "t", None))
    return found


def set_at_start(model: Any, y0: Tensor) -> list[Held]:
    """Return what a `NeuralODE` sets on its layers at the start of a solve."""
    found: list[Held] = []
    # An integral loss and each log-density come before the state proper.
    has_integral = getattr(model, "integral_loss", None) is not None
    excess = int(has_integral and getattr(model, "sensitivity", "") == "autograd")
    for part in model.vf.modules():
        if hasattr(part, "trace_estimator"):
            noise_dist = getattr(part, "noise_dist", None)
            if noise_dist is not None:
                with own_random_state(0):
                    found.append((part, "noise", noise_dist.sample((len(y0),)).to(y0)))
            excess += 1
        if hasattr(part, "_control"):
            found.append((part, "_control", y0[:, excess:]))
    return found


def set_by_solves(model: Any) -> list[tuple[nn.Module, str, Any]]:
    """Return what solves set on a model's modules, as it is now."""
    # Calls, the time of layers, the start that data control sees, a trace estimator's noise.
    names = ("nfe", "t", "_control", "noise")
    return [(m, name, vars(m)[name]) for m in model.modules() for name in names if name in vars(m)]


def draws_noise(model: Any) -> bool:
    """Return whether a trace estimator of a model draws noise at the start of each solve."""
    return any(getattr(part, "noise_dist", None) is not None for part in model.modules())


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


def warn(what: str, part: Any) -> None:
    """Warn, once a solver, of a defect of the host."""
    warn_once(part, what, _TEXTS[what], HostWarning)
