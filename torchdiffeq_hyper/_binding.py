"""How a call finds its fitted part: attached to func, or in scope.

(An option given with the call comes first, a published name last; both are in the
call itself, so they need no state here.)
"""

from __future__ import annotations

import contextvars
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Protocol, TypeAlias, TypeVar

from torchdiffeq_hyper._types import VectorField
from torchdiffeq_hyper.errors import OptionError, StateTypeError, explain


class Fitted(Protocol):
    """A fitted part: knows the method string it serves."""

    @property
    def method(self) -> str:
        """The method string, e.g. "hypereuler"."""
        ...


FittedT = TypeVar("FittedT", bound=Fitted)
_Attached: TypeAlias = tuple[object, dict[str, Fitted]]

_attached: dict[int, _Attached] = {}
_scoped: contextvars.ContextVar[tuple[Fitted, ...]] = contextvars.ContextVar("scoped", default=())

_WRAPPED = ("base_func", "_orig_mod", "_torchdynamo_orig_callable", "module", "vf")


def attach(func: VectorField, solver: FittedT) -> FittedT:
    """Bind a fitted solver to a vector field; ``odeint(func, ..., method=...)`` finds it.

    ``func`` itself is not changed: its parameters, state_dict, mode, copies and pickles
    know nothing of the solver. One solver a method string; a new one replaces the old.
    A bound method stands for its instance, so ``attach(model.forward, s)`` serves
    ``odeint(model, ...)`` too; torchdyn's `NeuralODE` stands for the field that it solves.

    Args:
        func: any callable, hashable or not. Kept alive only if it allows no weak reference.
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
    target = _owner(func)
    if not callable(func):
        raise StateTypeError(
            explain(f"func is a {type(func).__name__}.", "a callable func(t, y).", "func=model")
        )
    method = check_fitted(solver).method
    known = _attached.get(id(target))
    if known is None:
        known = (_reference(target), {})
        _attached[id(target)] = known
    known[1][method] = solver
    return solver


def detach(func: VectorField, method: str | None = None) -> None:
    """Undo `attach`, for one method string or for all.

    Raises:
        OptionError: nothing is attached to ``func`` (for that method).

    Example:
        >>> import torchdiffeq_hyper as tdh
        >>> func = lambda t, y: -y
        >>> _ = tdh.attach(func, tdh.HyperSolver("heun", lambda step: step.y, steps=2))
        >>> tdh.detach(func, "hyperheun")
    """
    key = id(_owner(func))
    solvers = _attached[key][1] if key in _attached else {}
    if not solvers or (method is not None and method not in solvers):
        what = "a solver" if method is None else f'a solver for "{method}"'
        raise OptionError(
            explain(
                f"{what} is not attached to this func.",
                "the very object that was given to attach (copies are not attached).",
                "tdh.attach(func, solver) first",
            )
        )
    if method is not None:
        del solvers[method]
    if method is None or not solvers:
        del _attached[key]


@contextmanager
def using(solver: FittedT) -> Iterator[FittedT]:
    """Let calls inside the block use ``solver`` for its method string.

    Scopes nest (the innermost solver of a method wins), do not leak into other threads,
    and reach threads that copy the context (``contextvars.copy_context().run``).

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


def find_bound(func: VectorField, method: str) -> Fitted | None:
    """Return the solver for ``method`` attached to ``func`` or in scope, else None."""
    for candidate in _unwrap(func):
        known = _attached.get(id(candidate))
        if known is not None and method in known[1]:
            return known[1][method]
    for solver in reversed(_scoped.get()):
        if solver.method == method:
            return solver
    return None


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


def _owner(func: object) -> object:
    if isinstance(func, MethodType):
        return func.__self__
    # A problem of torchdyn's, such as a NeuralODE, stands for the field that it solves.
    field = getattr(func, "vf", None)
    return field if callable(field) and callable(getattr(func, "odeint", None)) else func


def _unwrap(func: object) -> Iterator[object]:
    """Walk from ``func`` inwards through the wrappers that hosts and torch put around it."""
    seen: set[int] = set()
    pending = [func]
    while pending:
        current = _owner(pending.pop(0))
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        if isinstance(current, partial):
            pending.append(current.func)
        # "vf" and the like may be missing, or anything at all on a user's class.
        inner = (getattr(current, name, None) for name in _WRAPPED)
        pending.extend(item for item in inner if callable(item))


def _reference(target: object) -> object:
    """Return what keeps an attachment's key valid for as long as the target lives."""
    key = id(target)
    try:
        return weakref.ref(target, lambda _: _attached.pop(key, None))
    except TypeError:  # no weak references: hold the object, so that its id stays its own
        return target
