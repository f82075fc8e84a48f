"""How a call finds its fitted part: attached to func, or in scope.

(An option given with the call comes first, a published name last; both are in the
call itself, so they need no state here.)
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from torchdiffeq_hyper._fields import owner_of, owners_in
from torchdiffeq_hyper._state import VectorField
from torchdiffeq_hyper.errors import OptionError, StateTypeError, explain
from torchdiffeq_hyper.solvers import _attached
from torchdiffeq_hyper.solvers._domain import FitDomain, Match
from torchdiffeq_hyper.solvers._solver import Solver


class Fitted(Protocol):
    """A fitted part: knows the method string it serves."""

    @property
    def method(self) -> str:
        """The method string, e.g. "hypereuler"."""
        ...


FittedT = TypeVar("FittedT", bound=Fitted)

_scoped: contextvars.ContextVar[tuple[Fitted, ...]] = contextvars.ContextVar("scoped", default=())


def attach(func: VectorField, solver: FittedT) -> FittedT:
    """Bind a fitted solver to a vector field; ``odeint(func, ..., method=...)`` finds it.

    func's parameters, state_dict, mode and calls know nothing of the solver, which is kept
    in a private entry of ``func.__dict__``; copies and unpickled funcs are not attached.
    A func that its own solver holds is freed with it.

    One solver for each method string, direction and span; a new one replaces the old. A
    call takes the one that was fitted for the direction and the span of its ``t``, else
    one fitted for the direction, else the latest; of "bns", one whose span starts where
    ``t`` does and holds all of it.

    A bound method is its instance and its function: ``attach(model.density, s)`` serves
    that method alone. ``model.forward`` and ``model.__call__`` stand for ``model``,
    torchdyn's `NeuralODE` for the field that it solves. What is attached to a func also
    serves `Conditioned`, `DataParallel`, `DistributedDataParallel` and `torch.compile` of
    it, and a `functools.partial` without arguments; no other wrapper.

    Args:
        func: any callable, hashable or not. Kept alive only if it allows no weak
            reference, or has no ``__dict__`` and is held by the solver.
        solver: a fitted solver, e.g. a `HyperSolver`.

    Returns:
        ``solver``, for chaining.

    Raises:
        StateTypeError: ``func`` is not callable, or ``solver`` is not a fitted solver.

    Example:
        >>> import torch, torchdiffeq_hyper as tdh
        >>> from torchdiffeq import odeint
        >>> def func(t, y):
        ...     return -y
        >>> _ = tdh.attach(func, tdh.HyperSolver("euler", lambda step: step.y / 2, steps=10))
        >>> odeint(func, torch.ones(1), torch.tensor([0.0, 1.0]), method="hypereuler")[-1]
        tensor([0.3685])
        >>> tdh.detach(func)
    """
    if not callable(func):
        raise StateTypeError(
            explain(f"func is a {type(func).__name__}.", "a callable func(t, y).", "func=model")
        )
    _attached.add(owner_of(func), _key(check_fitted(solver)), solver)
    return solver


def detach(func: VectorField, method: str | None = None) -> None:
    """Undo `attach`: for all solvers of one method string, or for all.

    Raises:
        OptionError: nothing is attached to ``func`` (for that method).

    Example:
        >>> import torchdiffeq_hyper as tdh
        >>> func = lambda t, y: -y
        >>> _ = tdh.attach(func, tdh.HyperSolver("heun", lambda step: step.y, steps=2))
        >>> tdh.detach(func, "hyperheun")
    """
    if not _attached.remove(owner_of(func), method):
        what = "a solver" if method is None else f'a solver for "{method}"'
        raise OptionError(
            explain(
                f"{what} is not attached to this func.",
                "the very object that was given to attach (copies are not attached).",
                "tdh.attach(func, solver) first",
            )
        )


@contextmanager
def using(solver: FittedT) -> Iterator[FittedT]:
    """Let calls inside the block use ``solver`` for its method string.

    Scopes nest, do not leak into other threads, and reach threads that copy the context
    (``contextvars.copy_context().run``). Solvers of one method are told apart as in
    `attach`; among equals the innermost wins.

    Raises:
        StateTypeError: ``solver`` is not a fitted solver.

    Example:
        >>> import torch, torchdiffeq_hyper as tdh
        >>> from torchdiffeq import odeint
        >>> t = torch.tensor([0.0, 1.0])
        >>> with tdh.using(tdh.HyperSolver("euler", lambda step: step.y / 2, steps=10)):
        ...     y = odeint(lambda t, y: -y, torch.ones(1), t, method="hypereuler")
        >>> y[-1]
        tensor([0.3685])
    """
    check_fitted(solver)
    token = _scoped.set((*_scoped.get(), solver))
    try:
        yield solver
    finally:
        _scoped.reset(token)


@dataclass(frozen=True)
class Times:
    """The times of one call, by which a solver is chosen.

    Attributes:
        t: the host's times (n,), or the start alone (0-d) where an event ends the solve.
        is_negated: whether these are negated, as hosts do in reverse time.
    """

    t: Tensor
    is_negated: bool

    @property
    def direction(self) -> int:
        """1 where time grows, -1 where it falls; known to the host, not read from ``t``."""
        return -1 if self.is_negated else 1

    def ends(self) -> tuple[float | None, float | None]:
        """Return the true start and end; None where there is none, or no value to look at."""
        t = self.t.detach().reshape(-1)
        is_capturing = t.is_cuda and torch.cuda.is_current_stream_capturing()
        if torch.compiler.is_compiling() or is_capturing:
            return None, None
        try:
            points = t[:: max(1, len(t) - 1)].tolist()
        except RuntimeError:  # no values to look at: vmap, fake and meta tensors
            return None, None
        ends = [self.direction * point for point in points] + [None, None]
        return ends[0], ends[1]


def find_bound(func: VectorField, method: str, times: Times) -> Fitted | None:
    """Return the solver for ``method`` attached to ``func`` or in scope, else None.

    Args:
        func: the user's vector field.
        method: the method string.
        times: of the call. Looked at only where several solvers come into question.

    Raises:
        OptionError: there are several, and none serves these times, or the times that
            would tell them apart have no values (compiled, under vmap, fake tensors).
    """
    places: list[list[Fitted]] = [_attached.solvers(owner, method) for owner in owners_in(func)]
    places.append([solver for solver in _scoped.get() if solver.method == method])
    solvers = [solver for place in places for solver in place]
    if len(solvers) < 2 or (len(places[0]) == 1 and _serves_all(solvers[0])):
        return solvers[0] if solvers else None
    start, end = times.ends()
    for least in (Match.DIRECTION, Match.OUTSIDE):
        for place in places:
            matches = [_match(solver, times, start, end) for solver in place]
            best = max(matches, default=Match.NONE)
            if best < least:
                continue
            found = [solver for solver, match in zip(place, matches, strict=True) if match == best]
            if len(found) > 1 and start is None and _are_tied_to_span(found):
                raise OptionError(_cannot_choose(method))
            return found[-1]
    raise OptionError(_none_serves(method, solvers, times, start, end))


def check_fitted(solver: FittedT) -> FittedT:
    """Return ``solver`` if it is a fitted part.

    Raises:
        StateTypeError: it is not, e.g. a bare hypernet.
    """
    if isinstance(getattr(solver, "method", None), str):
        return solver
    raise StateTypeError(
        explain(
            f"solver is a {type(solver).__name__}.",
            "a fitted solver, e.g. a HyperSolver.",
            'tdh.HyperSolver(base="euler", hypernet=g, steps=10)',
        )
    )


def _key(solver: Fitted) -> tuple[Any, ...]:
    """Return what tells a solver from others: method, directions and span."""
    domain = getattr(solver, "domain", None)
    if not isinstance(domain, FitDomain):
        return (solver.method,)
    return solver.method, frozenset(domain.directions), tuple(sorted(domain.span))


def _serves_all(solver: Fitted) -> bool:
    return not isinstance(solver, Solver) or solver.domain is None


def _match(solver: Fitted, times: Times, start: float | None, end: float | None) -> Match:
    if not isinstance(solver, Solver):
        return Match.SPAN
    return solver.match(times.direction, start, end)


def _are_tied_to_span(solvers: Sequence[Fitted]) -> bool:
    return any(isinstance(s, Solver) and s.is_tied_to_span for s in solvers)


def _cannot_choose(method: str) -> str:
    return explain(
        f'several solvers for method "{method}" differ in their span alone, and t has no values '
        "here to choose one by.",
        "the solver itself, where a solve is compiled or runs under vmap.",
        f'odeint(func, y0, t, method="{method}", options={{"solver": solver}})',
    )


def _none_serves(
    method: str, solvers: Sequence[Fitted], times: Times, start: float | None, end: float | None
) -> str:
    spans = [getattr(solver, "span", None) for solver in solvers]
    fitted = ", ".join(f"from {span[0]:.6g} to {span[1]:.6g}" for span in spans if span)
    way = "forward" if times.direction > 0 else "in reverse"
    asked = f"goes {way}" if start is None else f"starts at {start:.6g} and goes {way}"
    if start is not None and end is not None:
        asked = f"goes from {start:.6g} to {end:.6g}"
    return explain(
        f'no solver for method "{method}" was fitted for these times: t {asked}; those '
        f"attached to func or in scope were fitted {fitted}.",
        "times that start where one of them does and stay in its span.",
        f"a fit for them: tdh.attach(func, tdh.fit(func, y0, ({start or 0:.6g}, "
        f'{1 if end is None else end:.6g}), base="{method}", steps=8))',
    )
