"""The hook through which plugins add methods, and the plugins: ours, others', entry points."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any, Protocol

import pluggy

from torchdiffeq_hyper.errors import OptionError, PluginWarning
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.methods._method import WholeSolve, make_method
from torchdiffeq_hyper.tableaus import Tableau

PROJECT = "torchdiffeq_hyper"
"""Name of the pluggy project, and of the entry-point group."""

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
        ...


@hookspec
def register_solvers(register: Register) -> None:
    """Add solver methods by calling ``register``, once a method.

    ``solver`` is a `Tableau`, of which every host makes a learned method (order and
    calls a step are the tableau's), a `WholeSolve`, whose part solves the whole problem,
    or a solver class of torchdiffeq's kind: called as
    ``solver(func=..., y0=..., rtol=..., atol=..., **options)``, with ``integrate(t)``,
    usually a subclass of torchdiffeq's own. For the last two ``order`` and
    ``calls_per_step`` must be declared; ``follows_grid`` says whether the method steps
    along the points of ``t``.

    Example:
        >>> import torchdiffeq_hyper as tdh
        >>> @tdh.hookimpl
        ... def register_solvers(register):
        ...     register("my-ralston", MyRalston, order=2, calls_per_step=2)
    """


_manager = pluggy.PluginManager(PROJECT)
_manager.add_hookspecs(sys.modules[__name__])


def register_plugin(plugin: object, name: str | None = None) -> None:
    """Add the methods of a plugin: any object with a `register_solvers` hook.

    All its methods are added, or, on any error, none.

    Args:
        plugin: a module or object that implements the hook with ``tdh.hookimpl``.
        name: its owner name in messages; default the plugin's ``__name__``.

    Raises:
        DuplicateMethodError: a method name is taken; names both owners.
        OptionError: the plugin implements no hook, or declares nonsense.

    Example:
        >>> import dataclasses
        >>> import torchdiffeq_hyper as tdh
        >>> from torchdiffeq_hyper.tableaus import second_order
        >>> class Ralston:
        ...     @tdh.hookimpl
        ...     def register_solvers(self, register):
        ...         register(
        ...             "hyperralston",
        ...             dataclasses.replace(second_order(2 / 3), name="ralston", alpha=None),
        ...         )
        >>> tdh.register_plugin(Ralston(), name="my-plugin")
        >>> tdh.HyperSolver("ralston", lambda step: step.y, steps=4).method
        'hyperralston'
        >>> tdh.unregister_plugin("my-plugin")
    """
    owner = name or str(getattr(plugin, "__name__", type(plugin).__name__))
    with _registry.lock:
        if _manager.has_plugin(owner) or _manager.is_registered(plugin):
            raise OptionError(
                problem=f"plugin {owner!r} is registered already.",
                expected="a plugin, and a name, that is new.",
                fix=f"tdh.unregister_plugin({owner!r}) first",
            )
        try:
            with _registry.changing():
                _collect(plugin, owner)
        except BaseException:
            if _manager.has_plugin(owner):
                _manager.unregister(name=owner)
            raise


def unregister_plugin(name: str) -> None:
    """Remove a plugin and its methods.

    Raises:
        OptionError: no plugin has that name.
    """
    with _registry.lock:
        if _manager.get_plugin(name) is None:
            raise OptionError(
                problem=f"no plugin is called {name!r}.",
                expected="one of "
                + ", ".join(repr(known) for known, _ in _manager.list_name_plugin()),
                fix="tdh.register_plugin(plugin, name=...) first",
            )
        with _registry.changing():
            for method in _registry.methods().values():
                if method.owner == name:
                    _registry.remove(method.name)
        _manager.unregister(name=name)


def _collect(plugin: object, owner: str) -> None:
    """Register a plugin with pluggy and call its hook alone."""

    def register(
        name: str,
        solver: Tableau | WholeSolve | Callable[..., Any],
        *,
        order: int | None = None,
        calls_per_step: int | None = None,
        follows_grid: bool = True,
    ) -> None:
        method = make_method(
            owner,
            name,
            solver,
            order=order,
            calls_per_step=calls_per_step,
            follows_grid=follows_grid,
        )
        _registry.add(method)

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


def load_entry_points() -> None:
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
