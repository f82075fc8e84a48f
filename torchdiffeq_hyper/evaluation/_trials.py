"""What `evaluate` runs: each method at each of its settings, through the host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from torchdiffeq import odeint

from torchdiffeq_hyper._state import State
from torchdiffeq_hyper.errors import (
    OptionError,
    StateTypeError,
    explain,
    unknown_method,
)
from torchdiffeq_hyper.evaluation._problem import Problem, state_at, without_start
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.solvers._grid import check_steps, equal_steps
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
    is_learned: bool
    solver: Solver | None = None
    steps: int | None = None
    tolerance: float | None = None
    steps_between_points: bool = False

    def shares(self) -> list[Fraction]:
        """Return shares of the span at which the method has states at no further call.

        The points of its grid (at most 16 of them), or eight where it chooses its own.
        """
        if self.steps_between_points:
            return [Fraction(1)]
        n = self.steps or OWN_POINTS
        every = -(-n // MOST_POINTS)
        return [Fraction(k, n) for k in range(n, 0, -every)][::-1]

    def solve(self, problem: Problem) -> State:
        """Return the state at the end of the problem's span."""
        return state_at(self.solve_at(problem, [Fraction(1)]), -1)

    def solve_at(self, problem: Problem, shares: Sequence[Fraction]) -> State:
        """Return the states at some shares of the problem's span, of those in `shares`."""
        options: dict[str, object] = {}
        tolerances: dict[str, float] = {}
        if self.steps is not None and self.follows_grid:
            # Not step_size: the host rounds the number of steps up, often to one too many.
            options["grid_constructor"] = lambda func, y0, t: equal_steps(t[[0, -1]], self.steps)
        if self.tolerance is not None:
            tolerances = {"rtol": self.tolerance, "atol": self.tolerance}
        if self.solver is not None:
            options["solver"] = self.solver
        func, y0, t = problem.func, problem.y0, problem.times_at((Fraction(0), *shares))
        solution = odeint(func, y0, t, method=self.method, options=options, **tolerances)
        return without_start(solution)


def expand(
    methods: Sequence[str | Solver],
    steps: int | Sequence[int] | None,
    tolerances: float | Sequence[float],
) -> list[Trial]:
    """Return the trials of `evaluate`, in the order of ``methods``.

    Raises:
        OptionError: impossible settings, or a method that follows a grid without steps.
        UnknownMethodError: no method has that name.
        StateTypeError: a method is neither a name nor a `HyperSolver`.
    """
    if isinstance(methods, str | Solver) or len(methods) == 0:
        got = "empty" if not isinstance(methods, str | Solver) else "a single method"
        raise OptionError(
            explain(
                f"methods is {got}.",
                "a list of method names and HyperSolvers.",
                'methods=["euler", "dopri5", solver]',
            )
        )
    counts = _check_all_steps(steps)
    limits = _check_tolerances(tolerances)
    trials: list[Trial] = []
    for method in methods:
        first = _first_trial(method)
        alike = (t for t in trials if None in (t.steps, first.steps) or t.steps == first.steps)
        label = _distinct(first.label, {trial.label for trial in alike})
        first = replace(first, label=label)
        if first.follows_grid:
            trials += [replace(first, steps=n) for n in counts or [_own_steps(first)]]
        elif first.is_learned:  # all its steps belong to the fit
            trials.append(first)
        else:
            trials += [replace(first, tolerance=limit) for limit in limits]
    return trials


def _first_trial(method: str | Solver) -> Trial:
    """Return a trial of a method, its settings still to be filled in."""
    if isinstance(method, Solver):
        return Trial(
            label=method.label,
            method=method.method,
            follows_grid=method.follows_grid,
            is_learned=True,
            # So that its one warning is not used up here.
            solver=method.without_warnings(),
            steps=None if method.follows_grid else method.n_steps,
        )
    if not isinstance(method, str):
        raise StateTypeError(
            explain(
                f"a method is a {type(method).__name__}.",
                "a method's name or a HyperSolver.",
                'methods=["euler", tdh.HyperSolver("euler", net, steps=10)]',
            )
        )
    entry = _registry.methods().get(method)
    if entry is not None:
        if isinstance(entry.fitted, Solver):
            return replace(_first_trial(entry.fitted), label=method)
        follows_grid, is_learned, is_dise = entry.follows_grid, entry.is_learned, False
        if isinstance(entry.solver, _registry.WholeSolve):
            is_learned = issubclass(entry.solver.kind, Solver)
            is_dise = entry.solver.option is not None and not is_learned
    else:
        follows_grid, is_learned, is_dise = _host_follows_grid(method), False, False
    return Trial(
        label=method,
        method=method,
        follows_grid=follows_grid,
        is_learned=is_learned,
        steps_between_points=is_dise,
    )


def _host_follows_grid(method: str) -> bool:
    hosts = _registry.host_methods()
    if method not in hosts:
        known = [*_registry.methods(), *hosts]
        raise unknown_method(method, known, 'methods=["{}"]')
    return hosts[method]


def _own_steps(trial: Trial) -> int:
    if trial.solver is not None and trial.solver.n_steps is not None:
        return trial.solver.n_steps
    raise OptionError(
        explain(
            f'"{trial.label}" follows a time grid, and steps is None.',
            "the numbers of steps to measure it at.",
            "steps=[2, 4, 8]",
        )
    )


def _distinct(label: str, taken: set[str]) -> str:
    names = (label if i == 1 else f"{label} #{i}" for i in range(1, len(taken) + 2))
    return next(name for name in names if name not in taken)


def _check_all_steps(steps: int | Sequence[int] | None) -> list[int]:
    if steps is None:
        return []
    counts = [steps] if isinstance(steps, int) else list(steps)
    if not counts or any(isinstance(n, tuple) or check_steps(n) is None for n in counts):
        raise OptionError(
            explain(
                f"steps is {steps!r}.",
                "numbers of steps, each an int of at least 1, or None.",
                "steps=[2, 4, 8]",
            )
        )
    return counts


def _check_tolerances(tolerances: float | Sequence[float]) -> list[float]:
    limits = [tolerances] if isinstance(tolerances, int | float) else list(tolerances)
    if not limits or not all(math.isfinite(limit) and limit > 0 for limit in limits):
        raise OptionError(
            explain(
                f"tolerances is {tolerances!r}.",
                "finite numbers above 0.",
                "tolerances=[1e-2, 1e-3]",
            )
        )
    return limits
