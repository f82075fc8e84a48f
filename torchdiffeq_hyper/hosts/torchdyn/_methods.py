"""Puts the registry's methods among torchdyn's, whichever package is imported first."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from torchdiffeq_hyper.errors import DuplicateMethodError, MissingExtraError, PluginWarning, explain
from torchdiffeq_hyper.hosts._table import MethodTable
from torchdiffeq_hyper.hosts.torchdyn import _patches, _upstream
from torchdiffeq_hyper.hosts.torchdyn._stepper import Stepper
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.methods._method import Method


class ImportHook(MetaPathFinder):
    """Calls ``then()`` after each of some modules has been imported.

    The modules are found and loaded by whoever finds and loads them otherwise.

    Args:
        names: the modules' full names.
        then: called with nothing, after the module's code has run.
    """

    def __init__(self, names: Sequence[str], then: Callable[[], None]) -> None:
        self._names = frozenset(names)
        self._then = then

    def add(self) -> None:
        """Watch imports from now on; doing it again changes nothing."""
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def remove(self) -> None:
        """Stop watching."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return what the other finders find; its loader calls ``then`` once."""
        if fullname not in self._names:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find is None else find(fullname, path, target)
            if spec is not None:
                self._watch(spec)
                return spec
        return None

    def _watch(self, spec: ModuleSpec) -> None:
        loader = spec.loader
        run = getattr(loader, "exec_module", None)
        if loader is None or run is None:
            return

        def run_then_tell(module: ModuleType) -> None:
            # The loader is the file's own again before its code can look at it.
            del loader.exec_module
            run(module)
            self._then()

        loader.exec_module = run_then_tell  # type: ignore[method-assign]


class _SolverObjects:
    """Makes what torchdyn calls with a dtype to get a solver object."""

    def step_by_step(self, method: Method) -> Any:
        """Return what makes the method's solver object."""
        return lambda dtype=torch.float32: Stepper(method)

    all_at_once = step_by_step

    def ready_made(self, method: Method) -> None:
        """Return None: torchdyn cannot run solver classes of torchdiffeq's kind."""


_table = MethodTable("torchdyn", "solver", _upstream.solver_dict, _SolverObjects())


def install() -> None:
    """Add the registered methods to torchdyn: now if it is imported, else when it is."""
    with _registry.lock:
        _table.is_installed = True
        _hook.add()
        follow_registry()


def uninstall() -> None:
    """Remove everything that `install` added, and the import hook."""
    with _registry.lock:
        _table.is_installed = False
        _hook.remove()
        follow_registry()


def load() -> None:
    """Import torchdyn now (its numerics; takes seconds).

    Raises:
        MissingExtraError: torchdyn is not installed, or lacks a package that it needs.
    """
    try:
        importlib.import_module(_upstream.ENTRANCES[0])
    except ImportError as error:
        raise MissingExtraError(
            explain(
                f"torchdyn cannot be imported: {error}.",
                "torchdyn and what it needs.",
                'pip install "torchdiffeq_hyper[torchdyn]"',
            )
        ) from error


def follow_registry() -> None:
    """Make torchdyn hold what the registry holds, if installed and imported.

    Raises:
        DuplicateMethodError: torchdyn has a method of the same name, which was not known
            before; all others are added.
    """
    with _registry.lock:
        if _upstream.solver_dict() is None:
            return
        if _table.is_installed:
            _patches.put()
        else:
            _patches.take_back()
        _table.follow()


def _follow_import() -> None:
    """Follow an import of torchdyn, which no name of ours may break."""
    try:
        follow_registry()
    except DuplicateMethodError as error:
        warnings.warn(f"{error}", PluginWarning, stacklevel=2)


_hook = ImportHook(_upstream.ENTRANCES, _follow_import)
