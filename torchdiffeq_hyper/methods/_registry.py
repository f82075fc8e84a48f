"""The methods that exist: one entry a name, each with an owner."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from torchdiffeq_hyper.errors import (
    DuplicateMethodError,
    OptionError,
    closest,
    unknown_method,
)
from torchdiffeq_hyper.methods._method import Method
from torchdiffeq_hyper.tableaus import Tableau, second_order

lock = threading.RLock()
"""Held by whoever changes the registry, or what hosts hold of it, from the first look on.

Reentrant: the garbage collector may end a scope while the lock is held.
"""

# Replaced, never changed: readers need no lock.
_methods: Mapping[str, Method] = {}
_hosts: Mapping[str, Mapping[str, bool]] = {}


def reserve(follows_grid: Mapping[str, bool], owner: str) -> None:
    """Note which methods a host has of its own, and whether each follows a time grid.

    No entry can take their names.
    """
    global _hosts  # noqa: PLW0603 - one registry for the whole process
    with lock:
        _hosts = {**_hosts, owner: dict(follows_grid)}


def host_methods() -> Mapping[str, bool]:
    """Return the hosts' own method names and whether each follows a time grid."""
    return {name: follows for names in _hosts.values() for name, follows in names.items()}


def add(method: Method) -> None:
    """Add an entry, inside `changing`; its name must be no other entry's and no host's."""
    if not isinstance(method.name, str) or not method.name:
        raise OptionError(
            problem=f"a method's name is {method.name!r}.",
            expected="a non-empty string.",
            fix='name="my-method"',
        )
    owners = {name: host for host, names in _hosts.items() for name in names}
    owners.update({name: other.owner for name, other in _methods.items()})
    if method.name in owners:
        raise name_taken(method, f"method of {owners[method.name]}")
    _replace({**_methods, method.name: method})


def name_taken(method: Method, by: str) -> DuplicateMethodError:
    """Return the error for a name that is already a method of somebody else."""
    return DuplicateMethodError(
        problem=f'method "{method.name}" of {method.owner} is already a {by}.',
        expected="a name that no host, plugin or published solver has.",
        fix=f'choose another name, e.g. "{method.name}-2"',
    )


def _replace(methods: Mapping[str, Method]) -> None:
    global _methods  # noqa: PLW0603 - one registry for the whole process
    _methods = methods


def remove(name: str) -> None:
    """Remove an entry, inside `changing`."""
    _replace({other: entry for other, entry in _methods.items() if other != name})


def find(name: str) -> Method:
    """Return the entry called ``name``; `UnknownMethodError` where there is none."""
    known = _methods
    if name not in known:
        raise unknown_method(name, known, 'method="{}"')
    return known[name]


def methods() -> Mapping[str, Method]:
    """Return all entries by name, in the order of registration."""
    return dict(_methods)


def method_for(part: object) -> Method | None:
    """Return the method that a fitted part serves; None for other objects."""
    for method in _methods.values():
        if method.fitted is None and method.serves(part):
            return method
    return None


def bases() -> Mapping[str, Method]:
    """Return the learned methods by the names of the bases that they correct."""
    return {
        method.tableau.name: method
        for method in _methods.values()
        if method.tableau is not None and method.fitted is None
    }


def check_base(base: object, known: Iterable[str]) -> None:
    """Refuse what is none of the known names of bases."""
    names = list(known)
    if not isinstance(base, str) or base not in names:
        raise OptionError(
            problem=f"base is {base!r}.",
            expected="one of " + ", ".join(f'"{name}"' for name in names) + ".",
            fix=f'base="{closest(base, names or ["euler"])}"',
        )


def method_of(base: str) -> Method:
    """Return the learned method built on the base called ``base``."""
    learned = bases()
    check_base(base, learned)
    return learned[base]


def find_tableau(base: str, alpha: float | None = None) -> Tableau:
    """Return the tableau called ``base`` (``alpha`` belongs to the base "alpha" only)."""
    tableau = method_of(base).tableau
    assert tableau is not None
    if alpha is None:
        return tableau
    if tableau.alpha is None:
        raise OptionError(
            problem=f"alpha is {alpha!r}, but the base is {base!r}.",
            expected='alpha goes with base="alpha" (method "hyper2") only.',
            fix=f'base="alpha", alpha={alpha!r}',
        )
    return second_order(alpha)


_listeners: list[Callable[[], None]] = []


def on_change(listener: Callable[[], None]) -> None:
    """Have ``listener`` called whenever methods come or go (hosts follow the registry)."""
    _listeners.append(listener)


def _notify() -> None:
    """Tell all listeners that methods have come or gone."""
    with lock:
        for listener in _listeners:
            listener()


@contextmanager
def changing() -> Iterator[None]:
    """Change the methods inside the block and have hosts follow; an error undoes it all."""
    with lock:
        _notify()  # a host may have got methods of its own meanwhile
        before = _methods
        try:
            yield
            _notify()
        except BaseException:
            _replace(before)
            _notify()
            raise
