"""The methods that exist, one entry a name, and the plugins that add them: ours and others'."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from typing import Any, Protocol

import pluggy

from torchdiffeq_hyper.errors import (
    DuplicateMethodError,
    OptionError,
    PluginWarning,
    closest,
    unknown_method,
)
from torchdiffeq_hyper.methods._method import Method, WholeSolve, make_method
from torchdiffeq_hyper.tableaus import Tableau, second_order

# Held by whoever changes the registry, or what hosts hold of it, from the first look on.
# Reentrant: the garbage collector may end a scope while the lock is held.
lock = threading.RLock()

# Replaced, never changed: readers need no lock.
_methods: Mapping[str, Method] = {}
_hosts: Mapping[str, Mapping[str, bool]] = {}


def reserve(follows_grid: Mapping[str, bool], owner: str) -> None:
    """Note a host's own methods, whose names no entry can take, and which follow a time grid."""
    global _hosts  # noqa: PLW0603 - one registry for the whole process
    with lock:
        _hosts = {**_hosts, owner: dict(follows_grid)}


def host_methods() -> Mapping[str, bool]:
    """Return the hosts' own method names and whether each follows a time grid."""
    return {name: follows for names in _hosts.values() for name, follows in names.items()}


def add(method: Method) -> None:
    """Add an entry, inside `changing`; its name must be no other entry's and no host's."""
    if not isinstance(method.name, str) or not method.name:
        problem = f"a method's name is {method.name!r}."
        raise OptionError(problem=problem, expected="a non-empty string.", fix='name="my-method"')
    owners = {name: host for host, names in _hosts.items() for name in names}
    owners |= {name: other.owner for name, other in _methods.items()}
    if method.name in owners:
        raise name_taken(method, owners[method.name])
    _replace({**_methods, method.name: method})


def name_taken(method: Method, by: str) -> DuplicateMethodError:
    """Return the error for a name that is already a method of somebody else."""
    return DuplicateMethodError(
        problem=f'method "{method.name}" of {method.owner} is already a method of {by}.',
        expected="a name that no host, plugin or published solver has.",
        fix=f'choose another name, e.g. "{method.name}-2"',
    )


def remove(*names: str) -> None:
    """Remove entries, inside `changing`."""
    _replace({name: entry for name, entry in _methods.items() if name not in names})


def _replace(methods: Mapping[str, Method]) -> None:
    global _methods  # noqa: PLW0603 - one registry for the whole process
    _methods = methods


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
    return next((m for m in _methods.values() if m.fitted is None and m.serves(part)), None)


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


listeners: list[Callable[[], None]] = []
"""Called whenever methods come or go: hosts follow the registry."""


def _notify() -> None:
    for listener in listeners:
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


PROJECT = "torchdiffeq_hyper"  # of pluggy, and the entry-point group

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Register(Protocol):
    """Adds one method; see `register_solvers`."""

    def __call__(
        self,
        name: str,
        solver: Tableau | WholeSolve | Callable[..., Any],
        *,
        order: int | None = None,
        calls_per_step: int | None = None,
        follows_grid: bool = True,
    ) -> None:
        """Add a method called ``name``."""


@hookspec
def register_solvers(register: Register) -> None:
    """Add solver methods by calling ``register``, once a method.

    ``solver`` is a `Tableau`, of which hosts make a learned method, a `WholeSolve`, or a
    solver class of torchdiffeq's kind: called as
    ``solver(func=..., y0=..., rtol=..., atol=..., **options)``, with ``integrate(t)``. The
    last two must declare ``order`` and ``calls_per_step``; ``follows_grid`` says whether the
    method steps along the points of ``t``.

    Example:
        >>> import torchdiffeq_hyper as tdh
        >>> @tdh.hookimpl
        ... def register_solvers(register):
        ...     register("my-ralston", MyRalston, order=2, calls_per_step=2)
    """


_manager = pluggy.PluginManager(PROJECT)
_manager.add_hookspecs(sys.modules[__name__])


def register_plugin(plugin: object, name: str | None = None) -> None:
    """Add the methods of a plugin, any object with a `register_solvers` hook; on errors, none.

    Args:
        plugin: a module or object whose hook is marked by ``tdh.hookimpl``.
        name: how messages call it; default its ``__name__``.

    Raises:
        DuplicateMethodError: a method name is taken; names both owners.
        OptionError: the plugin implements no hook, or declares nonsense.

    Example:
        >>> import dataclasses, torchdiffeq_hyper as tdh
        >>> ralston = dataclasses.replace(tdh.second_order(2 / 3), name="ralston", alpha=None)
        >>> class Plugin:
        ...     @tdh.hookimpl
        ...     def register_solvers(self, register):
        ...         register("hyperralston", ralston)
        >>> tdh.register_plugin(Plugin(), name="my-plugin")
        >>> tdh.unregister_plugin("my-plugin")
    """
    owner = name or str(getattr(plugin, "__name__", type(plugin).__name__))
    with lock:
        if _manager.has_plugin(owner) or _manager.is_registered(plugin):
            raise OptionError(
                problem=f"plugin {owner!r} is registered already.",
                expected="a plugin, and a name, that is new.",
                fix=f"tdh.unregister_plugin({owner!r}) first",
            )
        try:
            with changing():
                _collect(plugin, owner)
        except BaseException:
            if _manager.has_plugin(owner):
                _manager.unregister(name=owner)
            raise


def unregister_plugin(name: str) -> None:
    """Remove a plugin and its methods; `OptionError` where no plugin has that name."""
    with lock:
        if _manager.get_plugin(name) is None:
            known = ", ".join(repr(known) for known, _ in _manager.list_name_plugin())
            raise OptionError(
                problem=f"no plugin is called {name!r}.",
                expected=f"one of {known}.",
                fix="tdh.register_plugin(plugin, name=...) first",
            )
        with changing():
            remove(*(entry.name for entry in _methods.values() if entry.owner == name))
        _manager.unregister(name=name)


def _collect(plugin: object, owner: str) -> None:
    """Register a plugin with pluggy and call its hook alone."""

    def register(name: str, solver: Any, **declared: Any) -> None:
        add(make_method(owner, name, solver, **declared))

    others = [p for _, p in _manager.list_name_plugin()]
    problem = None
    try:
        _manager.register(plugin, name=owner)
        _manager.check_pending()
    except pluggy.PluginValidationError as error:
        problem = f"plugin {owner!r} does not fit the hook: {error}"
    if problem is None and not _manager.get_hookcallers(plugin):
        problem = f"plugin {owner!r} implements no hook."
    if problem is not None:
        raise OptionError(
            problem=problem,
            expected="a function register_solvers(register) marked with tdh.hookimpl.",
            fix="@tdh.hookimpl\ndef register_solvers(register): ...",
        )
    _manager.subset_hook_caller("register_solvers", others)(register=register)


def load_plugins() -> None:
    """Register installed plugins; one that breaks or clashes is warned about and skipped."""
    for entry_point in metadata.entry_points(group=PROJECT):
        try:
            register_plugin(entry_point.load(), entry_point.name)
        except Exception as error:  # noqa: BLE001 - a plugin may raise anything
            warnings.warn(
                f"the plugin {entry_point.name!r} ({entry_point.value}) is skipped: {error}",
                PluginWarning,
                stacklevel=2,
            )
