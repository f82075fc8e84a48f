"""Which fitted part a call uses: attached, in scope, published."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_hyper.errors import (
    BaseMismatchError,
    MissingHypernetError,
    OptionError,
    StateTypeError,
    explain,
)
from torchdiffeq_hyper.hosts.torchdyn import _upstream
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.solvers import _binding
from torchdiffeq_hyper.solvers._hypersolver import HyperSolver
from torchdiffeq_hyper.tableaus import Tableau


def find(method: _registry.Method, func: Any, times: _binding.Times) -> Any:
    """Return the part that serves a method's call; the first match wins.

    Args:
        method: the method called.
        func: the user's vector field, in torchdyn's wrappers.
        times: the call's.

    Raises:
        MissingHypernetError: nothing found.
        StateTypeError: what was found is not such a part.
        BaseMismatchError: a solver of another base was found.
        OptionError: several were found, and none serves the times.
    """
    whole = method.solver
    if isinstance(whole, _registry.WholeSolve) and whole.option is None:
        return whole.kind()
    part = _binding.find_bound(func, method.name, times) or method.fitted
    if part is None:
        raise MissingHypernetError(_how_to_bind(method))
    kind = whole.kind if isinstance(whole, _registry.WholeSolve) else HyperSolver
    if not isinstance(part, kind):
        raise StateTypeError(
            explain(
                f'the part for solver="{method.name}" is a {type(part).__name__}.',
                f"a {kind.__name__}.",
                f"solver = {_example(method)}",
            )
        )
    if isinstance(whole, Tableau) and part.base != whole.name:
        raise BaseMismatchError(
            explain(
                f'the solver was fitted for base "{part.base}", solver="{method.name}" corrects '
                f'base "{whole.name}".',
                "a correction fitted for the base it is used on.",
                f'NeuralODE(vf, solver="{part.method}")',
            )
        )
    return part


def kinds() -> tuple[type[Any], ...]:
    """Return the classes whose objects are solvers of ours."""
    solvers = [method.solver for method in _registry.methods().values()]
    whole = [solver.kind for solver in solvers if isinstance(solver, _registry.WholeSolve)]
    return tuple(dict.fromkeys([HyperSolver, *whole]))


def method_of(part: Any) -> _registry.Method:
    """Return the method that a part serves.

    Raises:
        OptionError: the method is no longer registered.
    """
    for method in _registry.methods().values():
        whole = method.solver
        if isinstance(whole, _registry.WholeSolve) and isinstance(part, whole.kind):
            return method
    if isinstance(part, HyperSolver):
        return _registry.method_of(part.base)
    raise OptionError(
        explain(
            f"the solver is a {type(part).__name__}, which serves no registered method.",
            "a HyperSolver, or a part of a registered method.",
            "tdh.register_plugin(...) again",
        )
    )


def _example(method: _registry.Method) -> str:
    if isinstance(method.solver, _registry.WholeSolve):
        return method.solver.example
    assert isinstance(method.solver, Tableau)
    return f'tdh.fit(func, y0, (0.0, 1.0), base="{method.solver.name}", steps=10)'


def _how_to_bind(method: _registry.Method) -> str:
    return explain(
        f'solver="{method.name}" found no fitted part for this vector field.',
        "a fitted part as the solver itself, attached to the field, in scope, or under a "
        "published name.",
        f"solver = {_example(method)}\n"
        "NeuralODE(vf, solver=solver)\n"
        f'tdh.attach(vf, solver)                  # then solver="{method.name}" on this vf\n'
        f'with tdh.using(solver): ...             # then solver="{method.name}" inside\n'
        'tdh.register_method("my-fast", solver)  # then solver="my-fast" anywhere',
    )


@dataclass(frozen=True)
class HostCall:
    """One call of the host, seen through its reverse-time wrapper.

    Attributes:
        func: the field as it was given to `odeint`.
        t: the true times, decreasing in reverse time.
        negated: whether the host gave time and derivative negated.
        is_adjoint_backward: whether this is a backward solve of an adjoint.
    """

    func: Callable[..., Any]
    t: Tensor
    negated: bool
    is_adjoint_backward: bool

    @classmethod
    def of(cls, func: Any, t: Tensor) -> HostCall:
        """Look through the wrapper that `odeint` may have put around ``func``."""
        inner = _upstream.unreversed(func)
        negated = inner is not None
        func = func if inner is None else inner
        return cls(func, -t if negated else t, negated, _upstream.is_adjoint_dynamics(func))


def saved_points(save_at: Any, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``save_at`` as a tensor, and where its times lie in ``t``.

    Raises:
        OptionError: a time is not in ``t``.
    """
    wanted = torch.as_tensor(save_at, dtype=t.dtype, device=t.device)
    is_same = torch.isclose(wanted.reshape(-1, 1), t.detach())
    missing = wanted[~is_same.any(dim=1)]
    if len(missing):
        raise OptionError(
            explain(
                f"save_at holds {missing[0].item():.6g}, which is not in t_span.",
                "times of t_span.",
                "odeint(f, x, t_span, solver, save_at=t_span[[0, -1]])",
            )
        )
    return wanted, is_same.int().argmax(dim=1)
