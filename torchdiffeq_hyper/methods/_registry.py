"""The methods that exist: one entry a name, each with an owner.

The registry knows no host: an entry holds a `Tableau`, of which every host makes a
hypersolver, a `WholeSolve`, whose part solves the whole problem, or a ready solver class
of torchdiffeq's kind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torchdiffeq_hyper.errors import (
    DuplicateMethodError,
    OptionError,
    closest,
    explain,
    unknown_method,
)
from torchdiffeq_hyper.tableaus import Tableau, second_order


@dataclass(frozen=True)
class WholeSolve:
    """A method whose part solves the whole problem at once.

    Attributes:
        kind: the part's class; its objects have
            ``solve(func, y0, t, *, rtol, atol) -> solution`` and, where they are fitted,
            the attribute ``method``.
        option: the option that holds the fitted part. None for methods with nothing
            fitted: the part is then built from the call's options, ``kind(**options)``.
        example: code that makes a part, for messages.
    """

    kind: type[Any]
    option: str | None
    example: str


@dataclass(frozen=True)
class Method:
    """One registered method.

    Attributes:
        name: the string users pass as ``method=``.
        solver: a `Tableau` (hosts build a hypersolver on it), a `WholeSolve`, or a class
            called as ``solver(func=..., y0=..., rtol=..., atol=..., **options)`` whose
            objects have ``integrate(t)``, as torchdiffeq's own solvers are.
        order: order of convergence (with no correction, for learned methods).
        calls_per_step: calls of func in one step.
        follows_grid: whether the method steps along a time grid it is given.
        owner: who registered it, for messages.
        fitted: the fitted solver behind a published name, else None.
    """

    name: str
    solver: Tableau | WholeSolve | Callable[..., Any]
    order: int
    calls_per_step: int
    follows_grid: bool
    owner: str
    fitted: Any = None

    @property
    def is_learned(self) -> bool:
        """Whether the method corrects a base with a hypernet."""
        return isinstance(self.solver, Tableau)


lock = threading.RLock()
"""Held by whoever changes the registry, or what hosts hold of it, from the first look on.

Reentrant: the garbage collector may end a scope while the lock is held.
"""

# Replaced, never changed: readers need no lock.
_methods: Mapping[str, Method] = {}
_hosts: Mapping[str, Mapping[str, bool]] = {}


def reserve(follows_grid: Mapping[str, bool], owner: str) -> None:
    """Note a host's own methods as they are now, so that no entry can take their names.

    Args:
        follows_grid: for each name, whether the method steps along a time grid.
        owner: the host's name, for messages.
    """
    global _hosts  # noqa: PLW0603 - one registry for the whole process
    with lock:
        _hosts = {**_hosts, owner: dict(follows_grid)}


def host_methods() -> Mapping[str, bool]:
    """Return the hosts' own method names and whether each follows a time grid."""
    return {name: follows for names in _hosts.values() for name, follows in names.items()}


def add(method: Method) -> None:
    """Add an entry.

    Raises:
        DuplicateMethodError: the name is another entry's or a host's.
        OptionError: the entry's declarations make no sense.
    """
    _check(method)
    with lock:
        owners = {name: host for host, names in _hosts.items() for name in names}
        owners.update({name: other.owner for name, other in _methods.items()})
        taken = owners.get(method.name)
        if taken is None:
            _replace({**_methods, method.name: method})
    if taken is not None:
        raise DuplicateMethodError(
            explain(
                f'method "{method.name}" of {method.owner} is already a method of {taken}.',
                "a name that no host, plugin or published solver has.",
                f'choose another name, e.g. "{method.name}-2"',
            )
        )


def _replace(methods: Mapping[str, Method]) -> None:
    global _methods  # noqa: PLW0603 - one registry for the whole process
    _methods = methods


def _check(method: Method) -> None:
    if not isinstance(method.name, str) or not method.name:
        raise OptionError(
            explain(
                f"a method's name is {method.name!r}.", "a non-empty string.", 'name="my-method"'
            )
        )
    for field, low in (("order", 1), ("calls_per_step", 1)):
        value = getattr(method, field)
        if not isinstance(value, int) or value < low:
            raise OptionError(
                explain(
                    f'method "{method.name}" declares {field}={value!r}.',
                    f"an int of at least {low}.",
                    f"{field}={low}",
                )
            )
    if not callable(method.solver) and not isinstance(method.solver, Tableau | WholeSolve):
        raise OptionError(
            explain(
                f'method "{method.name}" has solver={method.solver!r}.',
                "a Tableau, a WholeSolve or a torchdiffeq solver class.",
                f'register("{method.name}", MySolver, order=2, calls_per_step=2)',
            )
        )


def remove(name: str) -> Method:
    """Remove and return an entry.

    Raises:
        UnknownMethodError: there is no such entry.
    """
    with lock:
        method = find(name)
        _replace({other: entry for other, entry in _methods.items() if other != name})
    return method


def find(name: str) -> Method:
    """Return the entry called ``name``.

    Raises:
        UnknownMethodError: there is no such entry.
    """
    known = _methods
    if name not in known:
        raise unknown_method(name, known, 'method="{}"')
    return known[name]


def methods() -> Mapping[str, Method]:
    """Return all entries by name, in the order of registration."""
    return dict(_methods)


def method_of(base: str) -> Method:
    """Return the learned method built on the base called ``base``.

    Raises:
        OptionError: no registered method has that base.
    """
    learned = {
        m.solver.name: m
        for m in _methods.values()
        if isinstance(m.solver, Tableau) and m.fitted is None
    }
    if not isinstance(base, str) or base not in learned:
        raise OptionError(
            explain(
                f"base is {base!r}.",
                "one of " + ", ".join(f'"{name}"' for name in learned) + ".",
                f'base="{closest(base, learned or ["euler"])}"',
            )
        )
    return learned[base]


def find_tableau(base: str, alpha: float | None = None) -> Tableau:
    """Return the tableau called ``base`` (``alpha`` belongs to the base "alpha" only).

    Raises:
        OptionError: the name is unknown, or ``alpha`` is given to another base.
    """
    tableau = method_of(base).solver
    assert isinstance(tableau, Tableau)
    if alpha is None:
        return tableau
    if tableau.alpha is None:
        raise OptionError(
            explain(
                f"alpha is {alpha!r}, but the base is {base!r}.",
                'alpha goes with base="alpha" (method "hyper2") only.',
                f'base="alpha", alpha={alpha!r}',
            )
        )
    return second_order(alpha)


@contextmanager
def rollback_on_error() -> Iterator[None]:
    """Leave the registry as it was if the block raises; others wait for the end of it."""
    with lock:
        before = _methods
        try:
            yield
        except BaseException:
            _replace(before)
            raise
