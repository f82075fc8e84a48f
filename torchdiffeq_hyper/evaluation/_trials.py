"""What `evaluate` runs: each method at each of its settings, through the host."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from torchdiffeq_hyper._rules import Whole, checked_arguments
from torchdiffeq_hyper._state import State
from torchdiffeq_hyper.errors import OptionError, StateTypeError, unknown_method
from torchdiffeq_hyper.evaluation._measure import Problem
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.solvers._grid import equal_steps
from torchdiffeq_hyper.solvers._solver import Solver

OWN_POINTS = 8
"""Points along the span at which a method that chooses its own steps is looked at."""
MOST_POINTS = 16
"""Points of a grid that are looked at."""


@dataclass(frozen=True)
class Trial:
    """One method at one setting.

    Attributes:
        label: how tables call the method.
        method: how the host calls it.
        follows_grid: whether it takes ``steps``, else a ``tolerance``.
        is_learned: whether it is a fitted `Solver`.
        solver: the fitted solver behind it, where it is known here.
        steps: equal steps to take; for "bns" its calls of func, where known.
        tolerance: rtol = atol.
        steps_between_points: whether more points mean more steps, as for "dise": there are
            no other points to look at.
    """

    label: str
    method: str
    follows_grid: bool
    is_learned: bool = False
    solver: Solver | None = None
    steps: int | None = None
    tolerance: float | None = None
    steps_between_points: bool = False

    def shares(self) -> list[float]:
        """Return shares of the span at which the method has states at no further call.

        The points of its grid (at most 16 of them), or eight where it chooses its own.
        """
        if self.steps_between_points:
            return [1.0]
        n = self.steps or OWN_POINTS
        every = -(-n // MOST_POINTS)
        return [k / n for k in range(n, 0, -every)][::-1]

    def solve(self, problem: Problem, shares: Sequence[float] = (1.0,)) -> list[State]:
        """Return the states at some shares of the problem's span, of those in `shares`."""
        options: dict[str, object] = {}
        how: dict[str, Any] = {"method": self.method, "options": options}
        if self.steps is not None and self.follows_grid:
            # Not step_size: the host rounds the number of steps up, often to one too many.
            options["grid_constructor"] = lambda func, y0, t: equal_steps(t[[0, -1]], self.steps)
        if self.solver is not None:
            options["solver"] = self.solver
        if self.tolerance is not None:
            how |= {"rtol": self.tolerance, "atol": self.tolerance}
        return problem.solve(shares, **how)


def expand(
    methods: Sequence[str | Solver],
    steps: int | Sequence[int] | None,
    tolerances: float | Sequence[float],
) -> list[Trial]:
    """Return the trials of `evaluate`, in the order of ``methods``, after checking all three."""
    if isinstance(methods, str | Solver) or len(methods) == 0:
        got = "a single method" if isinstance(methods, str | Solver) else "empty"
        raise OptionError(
            problem=f"methods is {got}.",
            expected="a list of method names and fitted solvers.",
            fix='methods=["euler", "dopri5", solver]',
        )
    counts = _check_all_steps(steps)
    limits = _check_tolerances(tolerances)
    trials: list[Trial] = []
    for method in methods:
        first = _first_trial(method)
        alike = (t for t in trials if None in (t.steps, first.steps) or t.steps == first.steps)
        first = replace(first, label=distinct(first.label, {trial.label for trial in alike}))
        if first.follows_grid:
            trials += [replace(first, steps=n) for n in counts or [_own_steps(first)]]
        elif first.is_learned:  # all its steps belong to the fit
            trials.append(first)
        else:
            trials += [replace(first, tolerance=limit) for limit in limits]
    return trials


def _first_trial(method: str | Solver) -> Trial:
    """Return a trial of a method, its settings still to be filled in."""
    entry = _registry.methods().get(method) if isinstance(method, str) else None
    solver = method if entry is None else entry.fitted
    if isinstance(solver, Solver):
        return Trial(
            method.label if isinstance(method, Solver) else method,
            solver.method,
            solver.follows_grid,
            is_learned=True,
            # So that its one warning is not used up here.
            solver=solver.without_warnings(),
            steps=None if solver.follows_grid else solver.n_steps,
        )
    if not isinstance(method, str):
        raise StateTypeError(
            problem=f"a method is a {type(method).__name__}.",
            expected="a method's name or a fitted solver.",
            fix='methods=["euler", tdh.HyperSolver("euler", net, steps=10)]',
        )
    if entry is not None:
        return Trial(
            method,
            method,
            entry.follows_grid,
            is_learned=entry.option == "solver",
            steps_between_points=entry.option not in {None, "solver"},
        )
    hosts = _registry.host_methods()
    if method not in hosts:
        raise unknown_method(method, [*_registry.methods(), *hosts], 'methods=["{}"]')
    return Trial(method, method, hosts[method])


def _own_steps(trial: Trial) -> int:
    if trial.solver is not None and trial.solver.n_steps is not None:
        return trial.solver.n_steps
    raise OptionError(
        problem=f'"{trial.label}" follows a time grid, and steps is None.',
        expected="the numbers of steps to measure it at.",
        fix="steps=[2, 4, 8]",
    )


def distinct(label: str, taken: Collection[str]) -> str:
    """Return a label, numbered where it is taken."""
    names = (label if i == 1 else f"{label} #{i}" for i in count(1))
    return next(name for name in names if name not in taken)


def _check_all_steps(steps: int | Sequence[int] | None) -> list[int]:
    if steps is None:
        return []
    counts: list[Any] = [steps] if isinstance(steps, int) else list(steps)
    for n in counts or [counts]:
        checked_arguments({"steps": Whole(1)}, {"steps": n}, fix="steps=[2, 4, 8]")
    return counts


def _check_tolerances(tolerances: float | Sequence[float]) -> list[float]:
    limits = [tolerances] if isinstance(tolerances, int | float) else list(tolerances)
    if not limits or not all(math.isfinite(limit) and limit > 0 for limit in limits):
        raise OptionError(
            problem=f"tolerances is {tolerances!r}.",
            expected="finite numbers above 0.",
            fix="tolerances=[1e-2, 1e-3]",
        )
    return limits
