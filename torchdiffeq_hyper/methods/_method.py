"""A registered method: what it declares, and which fitted part solves with it."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from torchdiffeq_hyper.errors import (
    BaseMismatchError,
    MissingHypernetError,
    OptionError,
    StateTypeError,
)
from torchdiffeq_hyper.tableaus import Tableau


@dataclass(frozen=True)
class WholeSolve:
    """A method whose part solves the whole problem at once.

    Attributes:
        kind: the part's class, with ``solve(func, y0, t, *, rtol, atol) -> solution`` and,
            where parts are fitted, the attribute ``method``.
        option: the option that holds the fitted part; None: nothing is fitted, each call's
            part is ``kind(**options)``.
        example: code that makes a part, for messages.
    """

    kind: type[Any]
    option: str | None
    example: str


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """One registered method."""

    name: str  # what users pass as ``method=``
    order: int  # of convergence; of learned methods, with no correction
    calls_per_step: int
    follows_grid: bool  # whether it steps along a time grid it is given
    owner: str  # who registered it, for messages
    fitted: Any = None  # the solver behind a published name
    tableau: Tableau | None = None  # the base that a learned method corrects
    option: str | None = None  # of a call, that holds a fitted part; None: nothing is fitted
    kind: type[Any] | None = None  # of the parts, where it was registered with one

    @property
    def corrects_base(self) -> bool:
        """Whether it corrects a base with a hypernet, step by step."""
        return self.tableau is not None

    @abstractmethod
    def build(self, host: Any) -> Any:
        """Return what a host makes of this kind of method; None where it cannot run it."""

    def serves(self, part: object) -> bool:
        """Return whether ``part`` is a part of this method."""
        return False

    def checked(self, part: Any) -> Any:
        """Return the part of a call, after checking that there is one and that it serves."""
        return part

    def given(self, options: Mapping[str, Any]) -> Any:
        """Return the part that a call's options hold; None without."""
        return None if self.option is None else options.get(self.option)

    def published(self, name: str, part: Any, owner: str) -> Method:
        """Return the method called ``name`` whose fitted part is ``part``."""
        return replace(self, name=name, fitted=part, owner=owner)

    def _refuse(self, part: Any, kind: str, example: str) -> NoReturn:
        """Refuse a part that is of another kind, or not there."""
        name, option = self.name, self.option
        if part is not None:
            fix = f'options={{"{option}": {example}}}'
            if base_of(part) is not None:
                fix = f'odeint(..., method="{part.method}")   # the method of this solver'
            problem = f'the part for method "{name}" is a {type(part).__name__}.'
            raise StateTypeError(problem=problem, expected=f"a {kind}.", fix=fix)
        raise MissingHypernetError(
            problem=f'method "{name}" found no {kind} for this func.',
            expected="a fitted part: an option, attached to func, in scope, or published.",
            fix=f"{option} = {example}\n"
            f'odeint(func, y0, t, method="{name}", options={{"{option}": {option}}})\n'
            f"NeuralODE(vf, solver={option})            # torchdyn\n"
            f'tdh.attach(func, {option})                # then method="{name}" on this func\n'
            f'with tdh.using({option}): ...             # then method="{name}" inside\n'
            f'tdh.register_method("my-fast", {option})  # then method="my-fast" anywhere',
        )


@dataclass(frozen=True, kw_only=True)
class SteppingMethod(Method):
    """A tableau's base and its learned correction, step by step."""

    tableau: Tableau
    option: str | None = "solver"

    def build(self, host: Any) -> Any:
        return host.step_by_step(self)

    def serves(self, part: object) -> bool:
        tableau = getattr(part, "tableau", None)
        return isinstance(tableau, Tableau) and tableau.name == self.tableau.name

    def checked(self, part: Any) -> Any:
        base = self.tableau.name
        if base_of(part) is None:
            example = f'tdh.fit(func, y0, (0.0, 1.0), base="{base}", steps=10)'
            self._refuse(part, "HyperSolver", example)
        if part.base != base:
            raise BaseMismatchError(
                problem=f'the solver for "{self.name}" was fitted for base "{part.base}".',
                expected=f'a correction fitted for base "{base}".',
                fix=f'odeint(..., method="{part.method}")',
            )
        return part

    def published(self, name: str, part: Any, owner: str) -> Method:
        base = part.tableau  # with the part's own alpha
        method = super().published(name, part, owner)
        return replace(method, tableau=base, order=base.order, calls_per_step=base.calls)


@dataclass(frozen=True, kw_only=True)
class WholeMethod(Method):
    """A `WholeSolve`: its part solves the whole problem."""

    kind: type[Any]
    example: str

    def build(self, host: Any) -> Any:
        return host.all_at_once(self)

    def serves(self, part: object) -> bool:
        return isinstance(part, self.kind) and getattr(part, "method", self.name) == self.name

    @property
    def options(self) -> list[str]:
        """The names of the options that a call may give."""
        return [self.option] if self.option else list(inspect.signature(self.kind).parameters)

    def given(self, options: Mapping[str, Any]) -> Any:
        return self.kind(**options) if self.option is None else options.get(self.option)

    def checked(self, part: Any) -> Any:
        if not isinstance(part, self.kind):
            self._refuse(part, self.kind.__name__, self.example)
        return part


@dataclass(frozen=True, kw_only=True)
class ReadyMethod(Method):
    """A solver class of torchdiffeq's own kind, with nothing fitted."""

    solver: Callable[..., Any]

    def build(self, host: Any) -> Any:
        return host.ready_made(self)


def base_of(part: object) -> str | None:
    """Return the name of the base that a fitted solver corrects; None for other parts."""
    base = getattr(part, "base", None)
    return base if isinstance(base, str) else None


def make_method(
    owner: str,
    name: str,
    solver: Tableau | WholeSolve | Callable[..., Any],
    *,
    order: int | None = None,
    calls_per_step: int | None = None,
    follows_grid: bool = True,
) -> Method:
    """Return the method that a plugin registers, after checking it; see `register_solvers`."""
    if isinstance(solver, Tableau):
        order, calls_per_step = solver.order, solver.calls
    declared: dict[str, Any] = {"order": order, "calls_per_step": calls_per_step}
    problem = ""
    if not all(isinstance(count, int) and count >= 1 for count in declared.values()):
        problem = f'method "{name}" of {owner} declares {order=!r}, {calls_per_step=!r}.'
        expected = "both, for all but a Tableau, ints of at least 1."
    elif not isinstance(solver, Tableau | WholeSolve) and not callable(solver):
        problem = f'method "{name}" has solver={solver!r}.'
        expected = "a Tableau, a WholeSolve or a torchdiffeq solver class."
    if problem:
        fix = f'register("{name}", MySolver, order=2, calls_per_step=2)'
        raise OptionError(problem=problem, expected=expected, fix=fix)
    declared |= {"name": name, "owner": owner, "follows_grid": follows_grid}
    if isinstance(solver, Tableau):
        return SteppingMethod(**declared, tableau=solver)
    if isinstance(solver, WholeSolve):
        return WholeMethod(**declared, **vars(solver))
    return ReadyMethod(**declared, solver=solver)
