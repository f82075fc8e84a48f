"""How a call finds its fitted part: given as an option, attached to func, in scope, published.

Attached solvers are an entry of the object's ``__dict__``, so that they end with it: a weak
dictionary would keep every field that its own solver holds. A copy of the object may carry the
entry, and is not attached.
"""

from __future__ import annotations

import contextvars
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from torchdiffeq_hyper._fields._wrappers import Owner, owner_of, owners_in
from torchdiffeq_hyper._state import VectorField, values_of
from torchdiffeq_hyper.errors import OptionError, StateTypeError, check_callable
from torchdiffeq_hyper.methods._method import Method
from torchdiffeq_hyper.recording import assigned
from torchdiffeq_hyper.solvers._domain import FitDomain, Match
from torchdiffeq_hyper.solvers._solver import Solver


class Fitted(Protocol):
    """A fitted part: knows the method string it serves."""

    @property
    def method(self) -> str: ...


FittedT = TypeVar("FittedT", bound=Fitted)

_scoped: contextvars.ContextVar[tuple[Fitted, ...]] = contextvars.ContextVar("scoped", default=())


def attach(func: VectorField, solver: FittedT) -> FittedT:
    """Bind a fitted solver to a vector field; ``odeint(func, ..., method=...)`` finds it.

    func's parameters, state_dict, mode and calls know nothing of the solver, which is freed
    with func; copies and unpickled funcs are not attached.

    One solver for each method string, direction and span; a new one replaces the old. A
    call takes the one that was fitted for the direction and the span of its ``t``, else
    one fitted for the direction, else the latest; of "bns", one whose span starts where
    ``t`` does and holds all of it.

    ``attach(model.density, s)`` serves that method of the instance alone; ``model.forward``
    and ``model.__call__`` stand for ``model``, torchdyn's `NeuralODE` for the field that it
    solves. Also served are `Conditioned`, `DataParallel`, `DistributedDataParallel` and
    `torch.compile` of func, and a `functools.partial` without arguments; no other wrapper.

    Args:
        func: any callable, hashable or not. Kept alive only if it allows no weak
            reference, or has no ``__dict__`` and is held by the solver.
        solver: a fitted solver, e.g. a `HyperSolver`; returned, for chaining.

    Raises:
        StateTypeError: ``func`` is not callable, or ``solver`` is not a fitted solver.

    Example:
        >>> import torch, torchdiffeq, torchdiffeq_hyper as tdh
        >>> func = lambda t, y: -y
        >>> _ = tdh.attach(func, tdh.HyperSolver("euler", lambda step: step.y / 2, steps=10))
        >>> torchdiffeq.odeint(func, torch.ones(1), torch.tensor([0.0, 1.0]), method="hypereuler")
        tensor([[1.0000],
                [0.3685]])
    """
    check_callable("func", func, "func=model", "a callable func(t, y).")
    owner, domain = owner_of(func), _domain_of(check_fitted(solver))
    told_by = () if domain is None else (frozenset(domain.directions), tuple(sorted(domain.span)))
    function, key = owner.function, (solver.method, *told_by)
    with _lock:
        items = _read(owner.target)
        kept = [item for item in items if item.function is not function or item.key != key]
        _write(owner.target, [*kept, _Attachment(function, key, solver)])
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
    owner = owner_of(func)
    with _lock:
        before = _read(owner.target)
        kept = [item for item in before if not item.belongs_to(owner, method)]
        if len(kept) < len(before):
            _write(owner.target, kept)
            return
    what = "a solver" if method is None else f'a solver for "{method}"'
    problem = f"{what} is not attached to this func."
    expected = "the very object that was given to attach (copies are not attached)."
    raise OptionError(problem, expected, fix="tdh.attach(func, solver) first")


@contextmanager
def using(solver: FittedT) -> Iterator[FittedT]:
    """Let calls inside the block use ``solver`` for its method string.

    Scopes nest, do not leak into other threads, and reach threads that copy the context
    (``contextvars.copy_context().run``). Solvers of one method are told apart as in
    `attach`; among equals the innermost wins.

    Raises:
        StateTypeError: ``solver`` is not a fitted solver.

    Example:
        >>> import torch, torchdiffeq, torchdiffeq_hyper as tdh
        >>> t = torch.tensor([0.0, 1.0])
        >>> with tdh.using(tdh.HyperSolver("euler", lambda step: step.y / 2, steps=10)):
        ...     y = torchdiffeq.odeint(lambda t, y: -y, torch.ones(1), t, method="hypereuler")
    """
    check_fitted(solver)
    with assigned(_scoped, (*_scoped.get(), solver)):
        yield solver


@dataclass(frozen=True)
class Times:
    """The times of one call, by which a solver is chosen."""

    t: Tensor  # the host's (n,), or the start alone (0-d) where an event ends the solve
    is_negated: bool  # as hosts do in reverse time

    @property
    def direction(self) -> int:
        """1 where time grows, -1 where it falls; known to the host, not read from ``t``."""
        return -1 if self.is_negated else 1

    def ends(self) -> tuple[float | None, float | None]:
        """Return the true start and end; None where there is none, or no value to look at."""
        points = values_of(self.t)
        if not points:
            return None, None
        end = self.direction * points[-1] if len(points) > 1 else None
        return self.direction * points[0], end


def resolve(
    method: Method,
    func: VectorField,
    times: Times,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """Return the fitted part that serves a call, checked by the method.

    The first match wins: the call's option, attached to func, in scope, behind a published name.
    """
    part = method.given(options)
    if part is None:
        part = find_bound(func, method.name, times)
    return method.checked(method.fitted if part is None else part)


def find_bound(func: VectorField, method: str, times: Times) -> Fitted | None:
    """Return the solver for ``method`` attached to ``func`` or in scope, else None.

    Of several it is chosen by the times, which are refused where none serves them, or where they
    have no values (compiled, under vmap) to choose by.
    """
    places: list[list[Fitted]] = [attached_to(owner, method) for owner in owners_in(func)]
    places.append([solver for solver in _scoped.get() if solver.method == method])
    solvers = [solver for place in places for solver in place]
    if len(solvers) < 2 or (len(places[0]) == 1 and _domain_of(solvers[0]) is None):
        return solvers[0] if solvers else None
    start, end = times.ends()
    for least in (Match.DIRECTION, Match.OUTSIDE):
        for place in places:
            # Other parts than solvers serve all times alike.
            matches = [
                one.match(times.direction, start, end) if isinstance(one, Solver) else Match.SPAN
                for one in place
            ]
            best = max(matches, default=Match.NONE)
            if best < least:
                continue
            found = [solver for solver, match in zip(place, matches, strict=True) if match == best]
            if len(found) > 1 and start is None and any(map(_span_of, found)):
                raise OptionError(
                    problem=f'several solvers for method "{method}" differ in their span alone, '
                    "and t has no values here to choose one by.",
                    expected="the solver itself, where a solve is compiled or runs under vmap.",
                    fix=f'odeint(func, y0, t, method="{method}", options={{"solver": solver}})',
                )
            return found[-1]
    raise _none_serves(method, solvers, times)


def check_fitted(solver: FittedT) -> FittedT:
    """Return ``solver``; refuse what is no fitted part, e.g. a bare hypernet."""
    if isinstance(getattr(solver, "method", None), str):
        return solver
    problem, fix = f"solver is a {type(solver).__name__}.", 'tdh.HyperSolver("euler", g, steps=10)'
    raise StateTypeError(problem, "a fitted solver, e.g. a HyperSolver.", fix)


def _domain_of(solver: Any) -> FitDomain | None:
    """Return what a solver was fitted on; None for parts that serve every call alike."""
    domain = getattr(solver, "domain", None)
    return domain if isinstance(domain, FitDomain) else None


def _span_of(solver: Any) -> tuple[float, float] | None:
    """Return the times that a solver is tied to; None for those that serve others too."""
    return solver.span if isinstance(solver, Solver) else None


def _none_serves(method: str, solvers: Sequence[Fitted], times: Times) -> OptionError:
    start, end = times.ends()
    spans = filter(None, map(_span_of, solvers))
    fitted = ", ".join(f"from {first:.6g} to {last:.6g}" for first, last in spans)
    asked = "goes forward" if times.direction > 0 else "goes in reverse"
    if start is not None and end is not None:
        asked = f"goes from {start:.6g} to {end:.6g}"
    elif start is not None:
        asked = f"starts at {start:.6g} and {asked}"
    return OptionError(
        problem=f'no solver for method "{method}" was fitted for these times: t {asked}; those '
        f"attached to func or in scope were fitted {fitted}.",
        expected="times that start where one of them does and stay in its span.",
        fix=f"a fit for them: tdh.attach(func, tdh.fit(func, y0, ({start or 0:.6g}, "
        f'{1 if end is None else end:.6g}), base="{method}", steps=8))',
    )


class _Attachment(NamedTuple):
    """A solver, the function of the bound method it serves, and what else tells it from others."""

    function: object | None
    key: tuple[Any, ...]
    solver: Any

    def belongs_to(self, owner: Owner, method: str | None) -> bool:
        return self.function is owner.function and method in (None, self.key[0])


@dataclass(eq=False)
class _Entry:
    """What is attached to one object. Pickles and deep copies hold None in its place."""

    target: weakref.ref[Any]
    attachments: list[_Attachment]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # nothing of this package's: a pickle may be read without it


_ENTRY = "_torchdiffeq_hyper_attached"
# For objects without a dict of their own: by id, with what keeps that id theirs.
_elsewhere: dict[int, tuple[object, list[_Attachment]]] = {}
# Reentrant: the garbage collector may end an attachment while the lock is held.
_lock = threading.RLock()


def attached_to(owner: Owner, method: str) -> list[Any]:
    """Return the solvers for ``method`` attached to ``owner``, the latest last."""
    items = _read(owner.target)
    return [item.solver for item in items if item.belongs_to(owner, method)]


def _read(target: object) -> list[_Attachment]:
    entry = (_dict_of(target) or {}).get(_ENTRY)
    if isinstance(entry, _Entry) and entry.target() is target:
        return entry.attachments
    return _elsewhere.get(id(target), (None, []))[1]


def _write(target: object, items: list[_Attachment]) -> None:
    own = _dict_of(target)
    if own is not None and _is_free(own, target):
        if items:
            # Past `__setattr__`, which a class may have taken over.
            own[_ENTRY] = _Entry(weakref.ref(target), items)
        else:
            own.pop(_ENTRY, None)
    elif items:
        key = id(target)
        try:
            keeps_id: object = weakref.ref(target, lambda _: _elsewhere.pop(key, None))
        except TypeError:  # no weak references: hold the object, so that its id stays its own
            keeps_id = target
        _elsewhere[key] = (keeps_id, items)
    else:
        _elsewhere.pop(id(target), None)


def _dict_of(target: object) -> dict[str, Any] | None:
    """Return where an object keeps its attributes; None where it has no such place."""
    try:
        found = object.__getattribute__(target, "__dict__")
        weakref.ref(target)
    except (AttributeError, TypeError):
        return None
    return found if isinstance(found, dict) else None  # a class gives a read-only view


def _is_free(own: dict[str, Any], target: object) -> bool:
    """Return whether no other living object keeps its attachments in this very dict."""
    entry = own.get(_ENTRY)
    other = entry.target() if isinstance(entry, _Entry) else None
    # Shallow copies of a `functools.partial` share one dict.
    return other is None or other is target or _dict_of(other) is not own
