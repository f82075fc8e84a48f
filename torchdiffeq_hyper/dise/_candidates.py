"""What a selector chooses among: methods with their settings."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torchdiffeq import odeint

from torchdiffeq_hyper._rules import Whole, checked_arguments
from torchdiffeq_hyper._state import State, VectorField
from torchdiffeq_hyper.errors import OptionError, StateTypeError, unknown_method
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.solvers._solver import Solver

# Methods on a grid that read no tolerance (the implicit ones iterate until they meet theirs).
_EXPLICIT = frozenset({"euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams"})


class Candidate:
    """A method that a `Dise` can send samples to.

    Args:
        method: name of any method that torchdiffeq knows, or a fitted `Solver`.
        steps: steps between consecutive points of t, for methods that follow a time grid;
            None takes one (a fitted solver takes its own between two points).
        rtol: relative tolerance; None takes that of the call.
        atol: absolute tolerance; None takes that of the call.
        options: further options of the method.

    Raises:
        UnknownMethodError: no method has that name.
        StateTypeError: ``method`` is neither a name nor a `Solver`.
        OptionError: a setting is impossible, or means nothing to the method.

    Example:
        >>> import torchdiffeq_hyper as tdh
        >>> tdh.Candidate("rk4", steps=2), tdh.Candidate("dopri5", rtol=1e-3, atol=1e-3)
        (Candidate('rk4', steps=2), Candidate('dopri5', rtol=0.001, atol=0.001))
    """

    def __init__(
        self,
        method: str | Solver,
        *,
        steps: int | None = None,
        rtol: float | None = None,
        atol: float | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.solver = method if isinstance(method, Solver) else None
        self.method = method.method if isinstance(method, Solver) else method
        self.steps = steps
        self.rtol, self.atol = rtol, atol
        self.options: dict[str, Any] = dict(options or {})
        self.follows_grid = _check_method(self.method)
        self._check_steps()
        self._check_tolerances()

    def __repr__(self) -> str:
        settings = {name: getattr(self, name) for name in ("steps", "rtol", "atol")}
        settings["options"] = self.options or None
        given = [f"{name}={value!r}" for name, value in settings.items() if value is not None]
        return f"Candidate({', '.join([repr(self.method), *given])})"

    @property
    def label(self) -> str:
        """The candidate as tables call it, e.g. "rk4, 2 steps"."""
        given = [self.method]
        if self.steps is not None:
            given.append(f"{self.steps} step" + "s" * (self.steps > 1))
        tolerances = (("rtol", self.rtol), ("atol", self.atol))
        given += [f"{name} {value:g}" for name, value in tolerances if value is not None]
        return ", ".join(given + [f"{name} {value}" for name, value in self.options.items()])

    @property
    def steps_taken(self) -> int | None:
        """Steps between two points of t: one, where a host's method on a grid is not told."""
        is_hosts = self.follows_grid and self.method in _registry.host_methods()
        return 1 if self.steps is None and is_hosts and not self._own_grid else self.steps

    @property
    def _own_grid(self) -> set[str]:
        return {"step_size", "grid_constructor"} & self.options.keys()

    def is_same(self, other: Candidate) -> bool:
        """Return whether both would solve a problem the same way."""
        mine, theirs = (
            (c.method, c.steps_taken, c.rtol, c.atol, set(c.options)) for c in (self, other)
        )
        if mine != theirs or self.solver is not other.solver:
            return False
        pairs = [(value, other.options[name]) for name, value in self.options.items()]
        # Tensors and callables have no equality to speak of: only the same object counts.
        return all(a is b or (isinstance(a, float | int | str) and a == b) for a, b in pairs)

    def tolerances(self, rtol: Any, atol: Any) -> tuple[Any, Any]:
        """Return its own tolerances, and the call's where it has none."""
        return rtol if self.rtol is None else self.rtol, atol if self.atol is None else self.atol

    def solve(self, func: VectorField, y0: State, t: Tensor, *, rtol: Any, atol: Any) -> State:
        """Return ``odeint`` of this method with these settings; see `tolerances`.

        Raises:
            OptionError: the method has none of one of the options.
        """
        options = dict(self.options)
        if self.steps is not None:
            # Not step_size: the host rounds the number of steps up, often to one too many.
            options["grid_constructor"] = lambda func, y0, t: _refined(t, self.steps or 1)
        if self.solver is not None:
            options["solver"] = self.solver
        rtol, atol = self.tolerances(rtol, atol)
        run: Callable[[], State] = partial(
            odeint, func, y0, t, rtol=rtol, atol=atol, method=self.method, options=options
        )
        if not self.options:
            return run()
        ignored = ".*Unexpected arguments"  # the host only warns of them
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=ignored, category=UserWarning)
            try:
                return run()
            except UserWarning as warning:
                if not re.match(ignored, str(warning)):
                    raise
                raise OptionError(
                    problem=f"{self} has an option that torchdiffeq does not know ({warning}).",
                    expected=f'options of method "{self.method}".',
                    fix=f'tdh.Candidate("{self.method}")   # check the spelling of its options',
                ) from warning

    def _check_steps(self) -> None:
        if self.steps is None:
            return
        checked_arguments({"steps": Whole(1)}, {"steps": self.steps}, fix=self._ways_to_set())
        if not self.follows_grid:
            problem = f'"{self.method}" chooses its own steps, and steps is {self.steps}.'
        elif self._own_grid:
            problem = f"both steps and the option {self._own_grid.pop()!r} are given."
        else:
            return
        raise OptionError(
            problem=problem,
            expected="steps for a method on a time grid, and no other option for that grid.",
            fix=self._ways_to_set(),
        )

    def _ways_to_set(self) -> str:
        if self.solver is not None:
            return "tdh.Candidate(solver)   # with the steps that it was fitted for"
        return 'tdh.Candidate("rk4", steps=4)\ntdh.Candidate("dopri5", rtol=1e-3, atol=1e-3)'

    def _check_tolerances(self) -> None:
        entry = _registry.methods().get(self.method)
        is_learned = self.solver is not None or (entry is not None and entry.corrects_base)
        for name, value in (("rtol", self.rtol), ("atol", self.atol)):
            if value is None:
                continue
            is_number = isinstance(value, float | int) and not isinstance(value, bool)
            if not is_number or not (math.isfinite(value) and value >= 0):
                problem = f"{name} is {value!r}."
            elif is_learned or self.method in _EXPLICIT:
                problem = f'"{self.method}" has no error estimate to hold against {name}.'
            else:
                continue
            raise OptionError(
                problem=problem,
                expected="a finite number of at least 0, for adaptive methods.",
                fix=self._ways_to_set(),
            )


def check_candidates(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Return the candidates of a `Dise`: at least one, and no two the same."""
    example = 'tdh.Dise([tdh.Candidate("euler", steps=2), tdh.Candidate("dopri5", rtol=1e-3)])'
    is_list = isinstance(candidates, Sequence) and not isinstance(candidates, str)
    others = [c for c in candidates if not isinstance(c, Candidate)] if is_list else [candidates]
    if others:
        problem = f"a candidate is a {type(others[0]).__name__}."
        raise StateTypeError(problem=problem, expected="a list of tdh.Candidate.", fix=example)
    if not candidates:
        raise OptionError(problem="there are no candidates.", expected="at least one.", fix=example)
    for (first, one), (second, other) in combinations(enumerate(candidates), 2):
        if one.is_same(other):
            raise OptionError(
                problem=f"candidates {first} and {second} are the same: {other!r}.",
                expected="candidates that differ.",
                fix=f"drop candidate {second}, or change its settings",
            )
    return tuple(candidates)


def _check_method(name: object) -> bool:
    """Return whether a method follows a time grid, after checking that it exists."""
    if not isinstance(name, str):
        raise StateTypeError(
            problem=f"a candidate's method is a {type(name).__name__}.",
            expected="a method's name or a fitted solver.",
            fix='tdh.Candidate("euler", steps=2)',
        )
    entry, hosts = _registry.methods().get(name), _registry.host_methods()
    if entry is None:
        known = [*_registry.methods(), *hosts]
        if name not in hosts:
            raise unknown_method(name, known, 'tdh.Candidate("{}")')
        return hosts[name]
    if entry.option == "dise":
        raise OptionError(
            problem=f'"{name}" is a Dise, which cannot be a candidate of another.',
            expected="a method that solves by itself.",
            fix="one Dise with the candidates of both",
        )
    return entry.follows_grid


def _refined(t: Tensor, steps: int) -> Tensor:
    """Return ``t`` with each interval cut into equal steps; its points stay exact."""
    weights = torch.arange(steps, dtype=t.dtype, device=t.device) / steps
    return torch.cat([torch.lerp(t[:-1, None], t[1:, None], weights).flatten(), t[-1:]])
