"""What a selector chooses among: methods with their settings, and solves by them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torchdiffeq import odeint

from torchdiffeq_hyper import recording
from torchdiffeq_hyper._fields._independence import check_independence
from torchdiffeq_hyper._rules import Maybe, Real, Whole, shown
from torchdiffeq_hyper._state import (
    RowLayout,
    State,
    VectorField,
    cast,
    is_half,
    map_parts,
    parts_of,
    take,
)
from torchdiffeq_hyper.dise._costs import check_number
from torchdiffeq_hyper.errors import OptionError, StateTypeError, unknown_method
from torchdiffeq_hyper.evaluation._measure import Counted
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.solvers._grid import check_times
from torchdiffeq_hyper.solvers._solver import Solver
from torchdiffeq_hyper.solvers._stepping import cast_back

# Methods on a grid that read no tolerance (the implicit ones iterate until they meet theirs).
_EXPLICIT = frozenset({"euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams"})
_GRID_OPTIONS = {"step_size", "grid_constructor"}

_FIX = """tdh.Candidate("rk4", steps=4)
tdh.Candidate("dopri5", rtol=1e-3, atol=1e-3)
tdh.Candidate(solver)   # with the steps that it was fitted for"""


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
        self._check_settings()

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
    def key(self) -> tuple[Any, ...]:
        """What tells it from other candidates: equal where both solve a problem the same way."""
        is_hosts = self.follows_grid and self.method in _registry.host_methods()
        # A host's method on a grid takes one step where it is not told.
        is_told = self.steps is not None or _GRID_OPTIONS & self.options.keys()
        steps = self.steps if is_told or not is_hosts else 1
        # Tensors and callables have no equality to speak of: only the same object counts.
        options = {
            name: value if isinstance(value, float | int | str) else id(value)
            for name, value in self.options.items()
        }
        return self.method, self.solver, steps, self.rtol, self.atol, options

    def tolerances(self, rtol: Any, atol: Any) -> tuple[Any, Any]:
        """Return its own tolerances, and the call's where it has none."""
        return rtol if self.rtol is None else self.rtol, atol if self.atol is None else self.atol

    def solve(self, func: VectorField, y0: State, t: Tensor, *, rtol: Any, atol: Any) -> State:
        """Return ``odeint`` of this method with these settings; see `tolerances`.

        Raises `OptionError` for an option that the method does not know.
        """
        options = dict(self.options)
        if self.steps is not None:
            # Not step_size: the host rounds the number of steps up, often to one too many.
            options["grid_constructor"] = lambda func, y0, t: _refined(t, self.steps or 1)
        if self.solver is not None:
            options["solver"] = self.solver
        rtol, atol = self.tolerances(rtol, atol)
        how = {"rtol": rtol, "atol": atol, "method": self.method, "options": options}
        unknown = "Unexpected arguments"  # what the host only warns of
        with warnings.catch_warnings() if self.options else nullcontext():
            if self.options:
                warnings.filterwarnings("error", f".*{unknown}", UserWarning)
            try:
                solution: State = odeint(func, y0, t, **how)
            except UserWarning as warning:
                if unknown not in str(warning):
                    raise
                problem = f"{self} has an option that torchdiffeq does not know ({warning})."
                fix = f'tdh.Candidate("{self.method}")   # check how its options are spelt'
                raise OptionError(problem=problem, expected="known options.", fix=fix) from warning
        return solution

    def _check_settings(self) -> None:
        for name, rule in (("steps", Whole(1)), ("rtol", Real(low=0.0)), ("atol", Real(low=0.0))):
            check_number(name, getattr(self, name), Maybe(rule), _FIX)
        entry = _registry.methods().get(self.method)
        is_learned = self.solver is not None or (entry is not None and entry.corrects_base)
        has_tolerance = self.rtol is not None or self.atol is not None
        problem, own_grid = "", _GRID_OPTIONS & self.options.keys()
        if self.steps is not None and not self.follows_grid:
            problem = f'"{self.method}" chooses its own steps, and steps is {self.steps}.'
        elif self.steps is not None and own_grid:
            problem = f"both steps and the option {own_grid.pop()!r} are given."
        elif has_tolerance and (is_learned or self.method in _EXPLICIT):
            problem = f'"{self.method}" has no error estimate to hold against a tolerance.'
        if problem:
            expected = "steps or grid options for methods on a grid, tolerances for adaptive ones."
            raise OptionError(problem=problem, expected=expected, fix=_FIX)


def check_candidates(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Return the candidates of a `Dise`: at least one, and no two the same."""
    example = 'tdh.Dise([tdh.Candidate("euler", steps=2), tdh.Candidate("dopri5", rtol=1e-3)])'
    is_list = isinstance(candidates, Sequence)
    others = [c for c in candidates if not isinstance(c, Candidate)] if is_list else [candidates]
    if others:
        problem = f"a candidate is a {type(others[0]).__name__}."
        raise StateTypeError(problem=problem, expected="a list of tdh.Candidate.", fix=example)
    if not candidates:
        raise OptionError(problem="there are no candidates.", expected="at least one.", fix=example)
    for (first, one), (second, other) in combinations(enumerate(candidates), 2):
        if one.key == other.key:
            problem = f"candidates {first} and {second} are the same: {other!r}."
            fix = f"drop candidate {second}, or change its settings"
            raise OptionError(problem=problem, expected="candidates that differ.", fix=fix)
    return tuple(candidates)


def _check_method(name: object) -> bool:
    """Return whether a method follows a time grid, after checking that it exists."""
    if not isinstance(name, str):
        problem = f"a candidate's method is a {type(name).__name__}."
        raise StateTypeError(problem=problem, expected="a name or a fitted solver.", fix=_FIX)
    entry, hosts = _registry.methods().get(name), _registry.host_methods()
    if entry is None and name not in hosts:
        raise unknown_method(name, [*_registry.methods(), *hosts], 'tdh.Candidate("{}")')
    if entry is None:
        return hosts[name]
    if entry.option == "dise":
        problem = f'"{name}" is a Dise, which cannot be a candidate of another.'
        fix = "one Dise with the candidates of both"
        raise OptionError(problem=problem, expected="a method that solves by itself.", fix=fix)
    return entry.follows_grid


def _refined(t: Tensor, steps: int) -> Tensor:
    """Return ``t`` with each interval cut into equal steps; its points stay exact."""
    weights = torch.arange(steps, dtype=t.dtype, device=t.device) / steps
    return torch.cat([torch.lerp(t[:-1, None], t[1:, None], weights).flatten(), t[-1:]])


def count_samples(y0: State, least: int = 0) -> int:
    """Return the number of samples, after checking that they lie along dim 0 of every part."""
    RowLayout.of(y0)
    n = len(parts_of(y0)[0])
    if n < least:
        problem = f"y0 has {n} sample{'s' * (n != 1)}."
        expected = f"at least {least} along dim 0, better hundreds."
        raise OptionError(problem=problem, expected=expected, fix="y0 = torch.randn(256, 2)")
    return n


@dataclass(frozen=True)
class Batch:
    """The problem of a batch; its tolerances are those of candidates without their own."""

    func: VectorField
    y0: State
    t: Tensor
    rtol: Any
    atol: Any

    @classmethod
    def of(cls, func: VectorField, y0: State, t: Tensor, *, rtol: Any, atol: Any) -> Batch:
        """Return the problem, after checking its state and times."""
        count_samples(y0)
        return cls(func, y0, check_times(t, parts_of(y0)[0]), rtol, atol)

    def __len__(self) -> int:
        return len(self.first)

    @property
    def first(self) -> Tensor:
        """The state's first part."""
        return parts_of(self.y0)[0]

    @property
    def is_empty(self) -> bool:
        """Whether there are no numbers to solve for."""
        return not any(part.numel() for part in parts_of(self.y0))

    def constant(self, y0: State) -> State:
        """Return the solution that stays at a state."""
        return map_parts(lambda part: part.expand(len(self.t), *part.shape).clone(), y0)

    def field(self, index: Tensor | None = None) -> Counted:
        """Return the field of the samples at ``index``; of all for None."""
        return Counted(self.func, index, dtype=self.first.dtype)

    def solve(self, candidate: Candidate, field: Counted, index: Tensor | None = None) -> State:
        """Return a candidate's solution for some samples; half precision in float32."""
        start, dtype = self.y0 if index is None else take(self.y0, index), self.first.dtype
        rtol, atol = (_restricted(given, self.y0, index) for given in (self.rtol, self.atol))
        if is_half(dtype):
            start = cast(start, torch.float32)
        solution = candidate.solve(field, start, self.t, rtol=rtol, atol=atol)
        return map_parts(partial(cast_back, dtype=dtype), solution) if is_half(dtype) else solution

    def dispatch(
        self,
        candidates: Sequence[Candidate],
        selection: Tensor,
        draft: recording.Draft | None = None,
    ) -> State:
        """Return each sample's solution by the candidate selected; tell the draft of the groups."""
        n, is_tensor = len(candidates), isinstance(selection, Tensor)
        is_index = is_tensor and not (selection.is_floating_point() or selection.is_complex())
        is_fitting = is_index and selection.shape == (len(self),)
        if not is_fitting or bool(((selection < 0) | (selection >= n)).any()):
            problem = f"selection is {shown(selection)}."
            expected = f"for each of the {len(self)} samples its candidate, 0 to {n - 1}."
            raise OptionError(problem=problem, expected=expected, fix="selection=dise.select(y0)")
        selection = selection.to(self.first.device, torch.int64)
        order = selection.argsort(stable=True)
        groups = order.split(torch.bincount(selection, minlength=n).tolist())
        if max(map(len, groups)) < len(self):
            check_independence(self.func, self.y0, self.t, groups=groups)
        solutions, calls, sample_nfe = [], 0, torch.zeros_like(selection)
        for candidate, group in zip(candidates, groups, strict=True):
            if len(group) == 0:
                continue
            index = None if len(group) == len(self) else group
            field = self.field(index)
            solutions.append(self.solve(candidate, field, index))
            calls += field.calls
            if draft is not None and draft.recorders:  # the group's record tells samples apart
                sample_nfe[group] = draft.recorders[-1].solves[-1].sample_nfe
        if draft is not None:
            draft.nfe, draft.sample_nfe, draft.selection = calls, sample_nfe, selection
        if len(solutions) == 1:
            return solutions[0]
        return take(joined(solutions), order.argsort(), dim=1)


def joined(solutions: Sequence[State]) -> State:
    """Return solutions (times, samples, ...) as one, samples behind each other."""
    return map_parts(lambda *parts: torch.cat(parts, dim=1), *solutions)


def _restricted(tolerance: Any, y0: State, index: Tensor | None) -> Any:
    """Return a tolerance for some samples: what has a batch dimension loses the others."""
    if isinstance(tolerance, tuple | list):
        n_parts = len(y0) if isinstance(y0, tuple) else 0
        if len(tolerance) != n_parts:
            problem = f"rtol or atol has {len(tolerance)} entries."
            expected = f"a number, or of a tuple state one a part: {n_parts}."
            raise OptionError(problem=problem, expected=expected, fix="rtol=1e-3, atol=1e-3")
        parts = (_restricted(*pair, index) for pair in zip(tolerance, parts_of(y0), strict=True))
        # The host wants what belongs to a part of a tuple state flat.
        return tuple(part.flatten() if isinstance(part, Tensor) else part for part in parts)
    if index is None or not isinstance(tolerance, Tensor) or not isinstance(y0, Tensor):
        return tolerance
    has_batch = tolerance.dim() == y0.dim() and len(tolerance) > 1
    return tolerance.index_select(0, index) if has_batch else tolerance
