"""A host's table of methods, kept in line with the registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchdiffeq_hyper.errors import DuplicateMethodError, explain
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.methods._method import Builder


class MethodTable:
    """Puts the registry's methods into a host's dict, and takes them out again.

    Args:
        host: the host's name, for messages.
        what: what it calls its methods, for messages.
        entries: returns the host's dict from name to solver; None while it is not imported.
        builder: makes what the host is given for a method; None for those it cannot run.
    """

    def __init__(
        self,
        host: str,
        what: str,
        entries: Callable[[], dict[str, Any] | None],
        builder: Builder[Any],
    ) -> None:
        self._host, self._what = host, what
        self._entries = entries
        self._builder = builder
        self._clashing: set[str] = set()
        self.added: dict[str, Any] = {}
        self.is_installed = False

    def follow(self) -> None:
        """Make the host's dict hold what the registry holds; nothing of ours if uninstalled.

        Raises:
            DuplicateMethodError: the host has a solver of the same name, which was not known
                before; all others are added.
        """
        entries = self._entries()
        if entries is None:
            return
        wanted = _registry.methods() if self.is_installed else {}
        for name in [name for name in self.added if name not in wanted]:
            del self.added[name]
            entries.pop(name, None)
        known, self._clashing = self._clashing, set()
        new_clash = None
        for name, method in wanted.items():
            built = None if name in self.added else method.build(self._builder)
            if built is None:
                continue
            if name not in entries:
                entries[name] = self.added[name] = built
                continue
            self._clashing.add(name)
            if name not in known and new_clash is None:
                new_clash = method
        if new_clash is not None:
            raise DuplicateMethodError(
                explain(
                    f'method "{new_clash.name}" of {new_clash.owner} is already a {self._what} of '
                    f"{self._host}.",
                    f"a name that {self._host} does not have.",
                    f'choose another name, e.g. "{new_clash.name}-2"',
                )
            )
