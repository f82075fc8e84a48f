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

from torchdiffeq_hyper.errors import DuplicateMethodError, MissingExtraError, PluginWarning
from torchdiffeq_hyper.hosts._host import Host
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


class Torchdyn(Host):
    """torchdyn's dict `SOLVER_DICT`, now if it is imported, else when it is."""

    name = "torchdyn"
    noun = "solver"

    def entries(self) -> dict[str, Any] | None:
        """Return `SOLVER_DICT`; None while torchdyn is not imported."""
        return _upstream.solver_dict()

    def step_by_step(self, method: Method) -> Any:
        """Return what torchdyn calls with a dtype to get a solver object."""
        return lambda dtype=torch.float32: Stepper(method)

    all_at_once = step_by_step

    def ready_made(self, method: Method) -> None:
        """Return None: torchdyn cannot run solver classes of torchdiffeq's kind."""

    def follow(self) -> None:
        """Make torchdyn, if imported, hold what the registry holds; wait for its import if not."""
        with _registry.lock:
            watch, patch = (_hook.add, _patches.put)
            if not self.is_installed:
                watch, patch = (_hook.remove, _patches.take_back)
            watch()
            if self.entries() is not None:
                patch()
            super().follow()


host = Torchdyn()


def load() -> None:
    """Import torchdyn now (its numerics; takes seconds).

    Raises:
        MissingExtraError: torchdyn is not installed, or lacks a package that it needs.
    """
    try:
        importlib.import_module(_upstream.ENTRANCES[0])
    except ImportError as error:
        raise MissingExtraError(
            problem=f"torchdyn cannot be imported: {error}.",
            expected="torchdyn and what it needs.",
            fix='pip install "torchdiffeq_hyper[torchdyn]"',
        ) from error


def _follow_import() -> None:
    """Follow an import of torchdyn, which no name of ours may break."""
    try:
        host.follow()
    except DuplicateMethodError as error:
        warnings.warn(f"{error}", PluginWarning, stacklevel=2)


_hook = ImportHook(_upstream.ENTRANCES, _follow_import)
