"""Puts the registry's methods among torchdyn's, whichever package is imported first."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from torchdiffeq_hyper.errors import DuplicateMethodError, MissingExtraError, PluginWarning, explain
from torchdiffeq_hyper.hosts.torchdyn import _patches, _upstream
from torchdiffeq_hyper.hosts.torchdyn._stepper import Stepper
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.tableaus import Tableau


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


_installed: dict[str, Any] = {}
_clashing: set[str] = set()
_is_installed = False


def install() -> None:
    """Add the registered methods to torchdyn: now if it is imported, else when it is."""
    global _is_installed  # noqa: PLW0603 - the one switch of the process-wide SOLVER_DICT
    with _registry.lock:
        _is_installed = True
        _hook.add()
        follow_registry()


def uninstall() -> None:
    """Remove everything that `install` added, and the import hook."""
    global _is_installed  # noqa: PLW0603 - the one switch of the process-wide SOLVER_DICT
    with _registry.lock:
        _is_installed = False
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
    """Make torchdyn's dict hold what the registry holds, if installed and imported.

    Methods of torchdiffeq's kind (solver classes) are left out: torchdyn cannot run them.

    Raises:
        DuplicateMethodError: torchdyn has a method of the same name, which was not known
            before; all others are added.
    """
    with _registry.lock:
        solvers = _upstream.solver_dict()
        if solvers is None:
            return
        wanted = _registry.methods() if _is_installed else {}
        for name in [name for name in _installed if name not in wanted]:
            del _installed[name]
            solvers.pop(name, None)
        new = {
            name: method
            for name, method in wanted.items()
            if name not in _installed and _can_serve(method)
        }
        clashes = [method for name, method in new.items() if name in solvers]
        for name, method in new.items():
            if name not in solvers:
                solvers[name] = _installed[name] = partial(_make, method)
        unknown = [method for method in clashes if method.name not in _clashing]
        _clashing.clear()
        _clashing.update(method.name for method in clashes)
        if _is_installed:
            _patches.put()
        else:
            _patches.take_back()
    for method in unknown:
        raise DuplicateMethodError(
            explain(
                f'method "{method.name}" of {method.owner} is already a solver of torchdyn.',
                "a name that torchdyn does not have.",
                f'choose another name, e.g. "{method.name}-2"',
            )
        )


def _can_serve(method: _registry.Method) -> bool:
    return isinstance(method.solver, Tableau | _registry.WholeSolve)


def _make(method: _registry.Method, dtype: torch.dtype = torch.float32) -> Stepper:
    """Return a solver object, as torchdyn's classes do when called with a dtype."""
    return Stepper(method)


def _follow_import() -> None:
    """Follow an import of torchdyn, which no name of ours may break."""
    try:
        follow_registry()
    except DuplicateMethodError as error:
        warnings.warn(f"{error}", PluginWarning, stacklevel=2)


_hook = ImportHook(_upstream.ENTRANCES, _follow_import)
