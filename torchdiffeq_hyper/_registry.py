"""The methods that exist: one entry a name, each with an owner.

The registry knows no host: an entry holds a `Tableau`, of which every host makes a
hypersolver, a `WholeSolve`, whose part solves the whole problem, or a ready solver class
of torchdiffeq's kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torchdiffeq_hyper.errors import (
    DuplicateMethodError,
    OptionError,
    UnknownMethodError,
    closest,
    explain,
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


_methods: dict[str, Method] = {}
_host_methods: dict[str, bool] = {}
_host_owner: dict[str, str] = {}


def reserve(follows_grid: Mapping[str, bool], owner: str) -> None:
    """Note a host's own methods as they are now, so that no entry can take their names.

    Args:
        follows_grid: for each name, whether the method steps along a time grid.
        owner: the host's name, for messages.
    """
    for name in [name for name, host in _host_owner.items() if host == owner]:
        del _host_methods[name], _host_owner[name]
    _host_methods.update(follows_grid)
    _host_owner.update(dict.fromkeys(follows_grid, owner))


def host_methods() -> Mapping[str, bool]:
    """Return the hosts' own method names and whether each follows a time grid."""
    return dict(_host_methods)


def add(method: Method) -> None:
    """Add an entry.

    Raises:
        DuplicateMethodError: the name is another entry's or a host's.
        OptionError: the entry's declarations make no sense.
    """
    _check(method)
    taken = _methods[method.name].owner if method.name in _methods else _host_owner.get(method.name)
    if taken is not None:
        raise DuplicateMethodError(
            explain(
                f'method "{method.name}" of {method.owner} is already a method of {taken}.',
                "a name that no host, plugin or published solver has.",
                f'choose another name, e.g. "{method.name}-2"',
            )
        )
    _methods[method.name] = method


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
    find(name)
    return _methods.pop(name)


def find(name: str) -> Method:
    """Return the entry called ``name``.

    Raises:
        UnknownMethodError: there is no such entry.
    """
    if name not in _methods:
        raise UnknownMethodError(
            explain(
                f"no method is called {name!r}.",
                "one of " + ", ".join(f'"{known}"' for known in _methods) + ".",
                f'method="{closest(name, _methods or ["hypereuler"])}"',
            )
        )
    return _methods[name]


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
    """Leave the registry as it was if the block raises."""
    before = dict(_methods)
    try:
        yield
    except BaseException:
        _methods.clear()
        _methods.update(before)
        raise
