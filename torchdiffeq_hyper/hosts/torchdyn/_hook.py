"""Tells when modules have been imported, without importing them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


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
