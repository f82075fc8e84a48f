"""Which fitted part a call uses: option, attached, in scope, published."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from torchdiffeq_hyper._state import Hypernet
from torchdiffeq_hyper.errors import (
    AdjointWarning,
    BaseMismatchError,
    MissingHypernetError,
    OptionError,
    StateTypeError,
    explain,
)
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.solvers import _binding
from torchdiffeq_hyper.solvers._hypersolver import HyperSolver
from torchdiffeq_hyper.solvers._solver import Solver
from torchdiffeq_hyper.tableaus import Tableau, second_order

_warned: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True)
class Bound:
    """The fitted part of one call.

    Attributes:
        hypernet: g.
        tableau: the base it corrects.
        solver: the hypersolver g belongs to; None for a bare hypernet.
    """

    hypernet: Hypernet
    tableau: Tableau
    solver: HyperSolver | None


def find(
    method: _registry.Method, func: Any, options: dict[str, Any], times: _binding.Times
) -> Bound:
    """Return the fitted part for a call; the first match wins.

    Args:
        method: the method called.
        func: the user's vector field.
        options: "hypernet", "solver" and "alpha" of the call, where given.
        times: the call's.

    Raises:
        MissingHypernetError: nothing found.
        BaseMismatchError: a solver of another base was given.
        OptionError: both a hypernet and a solver were given, or ``alpha`` is impossible.
        StateTypeError: an option is of the wrong kind.
    """
    assert isinstance(method.solver, Tableau)
    alpha, net, solver = (options.get(name) for name in ("alpha", "hypernet", "solver"))
    tableau = method.solver if alpha is None else second_order(alpha)
    if net is not None and solver is not None:
        raise OptionError(
            explain('options hold both "hypernet" and "solver".', "one of them.", 'drop "hypernet"')
        )
    if net is not None:
        return Bound(_check_hypernet(net, method), tableau, None)
    found = solver
    if found is None:
        found = _binding.find_bound(func, method.name, times) or method.fitted
    if found is None:
        raise MissingHypernetError(_how_to_bind(method.name, tableau.name))
    solver = _checked_solver(found, method, tableau)
    own = solver.tableau if alpha is None else tableau
    return Bound(solver.hypernet, own, solver)


def find_part(
    method: _registry.Method, func: Any, options: dict[str, Any], times: _binding.Times
) -> Any:
    """Return the part that solves the whole problem of a call; the first match wins.

    Args:
        method: the method called; its solver is a `WholeSolve`.
        func: the user's vector field.
        options: the call's.
        times: the call's.

    Raises:
        MissingHypernetError: nothing found.
        OptionError: several were found, and none serves the times.
        StateTypeError: what was found is not such a part.
    """
    whole = method.solver
    assert isinstance(whole, _registry.WholeSolve)
    if whole.option is None:
        return whole.kind(**options)
    part = options.get(whole.option)
    if part is None:
        part = _binding.find_bound(func, method.name, times) or method.fitted
    if part is None:
        raise MissingHypernetError(_how_to_bind_part(method.name, whole))
    if not isinstance(part, whole.kind):
        raise StateTypeError(
            explain(
                f'the part for method "{method.name}" is a {type(part).__name__}.',
                f"a {whole.kind.__name__}.",
                f'odeint(..., method="{part.method}")   # the method of this solver'
                if isinstance(part, Solver)
                else f'options={{"{whole.option}": {whole.example}}}',
            )
        )
    return part


def _check_hypernet(net: Any, method: _registry.Method) -> Hypernet:
    if isinstance(net, Solver) or not callable(net):
        raise StateTypeError(
            explain(
                f'options["hypernet"] is a {type(net).__name__}.',
                "a callable g(step) -> correction like step.y.",
                f'odeint(..., method="{method.name}", options={{"solver": solver}})',
            )
        )
    hypernet: Hypernet = net
    return hypernet


def _checked_solver(solver: Any, method: _registry.Method, tableau: Tableau) -> HyperSolver:
    if not isinstance(solver, Solver):
        raise StateTypeError(
            explain(
                f"the solver for {method.name!r} is a {type(solver).__name__}.",
                "a HyperSolver.",
                'options={"solver": tdh.HyperSolver(base, hypernet, steps)}   '
                '# or {"hypernet": net}',
            )
        )
    if solver.base != tableau.name:
        raise BaseMismatchError(
            explain(
                f'the solver was fitted for base "{solver.base}", method "{method.name}" '
                f'corrects base "{tableau.name}".',
                "a correction fitted for the base it is used on.",
                f'odeint(..., method="{solver.method}")',
            )
        )
    assert isinstance(solver, HyperSolver)
    return solver


def _how_to_bind(method: str, base: str) -> str:
    return explain(
        f'method "{method}" found no fitted hypernet for this func.',
        "a fitted part as an option, attached to func, in scope, or under a published name.",
        f'solver = tdh.fit(func, y0, (0.0, 1.0), base="{base}", steps=10)\n'
        f'odeint(func, y0, t, method="{method}", options={{"solver": solver}})\n'
        f'tdh.attach(func, solver)                # then method="{method}" on this func\n'
        f'with tdh.using(solver): ...             # then method="{method}" inside\n'
        'tdh.register_method("my-fast", solver)  # then method="my-fast" anywhere',
    )


def _how_to_bind_part(method: str, whole: _registry.WholeSolve) -> str:
    option = whole.option
    return explain(
        f'method "{method}" found no {whole.kind.__name__} for this func.',
        "one as an option, attached to func, in scope, or under a published name.",
        f"{option} = {whole.example}\n"
        f'odeint(func, y0, t, method="{method}", options={{"{option}": {option}}})\n'
        f'tdh.attach(func, {option})                # then method="{method}" on this func\n'
        f'with tdh.using({option}): ...             # then method="{method}" inside\n'
        f'tdh.register_method("my-fast", {option})  # then method="my-fast" anywhere',
    )


def warn_if_trained_through_adjoint(part: object, name: str = "hypernet") -> None:
    """Warn, once a part, that `odeint_adjoint` gives it no gradient.

    Args:
        part: a hypernet, or a solver with weights of its own.
        name: what to call it.
    """
    if not isinstance(part, nn.Module) or torch.is_inference_mode_enabled():
        return
    if part in _warned or not any(p.requires_grad for p in part.parameters()):
        return
    _warned.add(part)
    warnings.warn(
        f"odeint_adjoint gives the {name} no gradient, and its parameters require one. "
        f"To train it use odeint; otherwise {name}.requires_grad_(False).",
        AdjointWarning,
        stacklevel=2,
    )
