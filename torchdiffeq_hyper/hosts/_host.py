"""A host: an ODE library whose dict of methods is kept in line with the registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torchdiffeq_hyper.errors import DuplicateMethodError
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.methods._method import Method


class Host(ABC):
    """Puts the registry's methods into a library's dict, and takes them out again.

    Attributes:
        name: the library's name.
        noun: what it calls a method.
        added: what of ours its dict holds now.
        is_installed: whether it is to hold any.
    """

    name: ClassVar[str]
    noun: ClassVar[str]

    def __init__(self) -> None:
        self.added: dict[str, Any] = {}
        self.is_installed = False
        self._clashing: set[str] = set()

    @abstractmethod
    def entries(self) -> dict[str, Any] | None:
        """Return the library's dict of methods; None while it is not imported."""

    @abstractmethod
    def build(self, method: Method) -> Any:
        """Return what the dict holds for a method; None for one that the library cannot run."""

    def install(self) -> None:
        """Add the registered methods, and change no existing name.

        Raises:
            DuplicateMethodError: the library has got a method of the same name meanwhile.
        """
        with _registry.lock:
            self.is_installed = True
            self.follow()

    def uninstall(self) -> None:
        """Remove everything that `install` added."""
        with _registry.lock:
            self.is_installed = False
            self.follow()

    def follow(self) -> None:
        """Make the dict hold what the registry holds, if installed.

        Raises:
            DuplicateMethodError: the library has a method of the same name, which was not
                known before; all others are added.
        """
        entries = self.entries()
        if entries is None:
            return
        wanted = _registry.methods() if self.is_installed else {}
        for name in [name for name in self.added if name not in wanted]:
            del self.added[name]
            entries.pop(name, None)
        known, self._clashing = self._clashing, set()
        new_clashes = []
        for name, method in wanted.items():
            built = None if name in self.added else self.build(method)
            if built is not None and name in entries:
                self._clashing.add(name)
                new_clashes += [] if name in known else [method]
            elif built is not None:
                entries[name] = self.added[name] = built
        if new_clashes:
            name, owner = new_clashes[0].name, new_clashes[0].owner
            raise DuplicateMethodError(
                problem=f'method "{name}" of {owner} is already a {self.noun} of {self.name}.',
                expected=f"a name that {self.name} does not have.",
                fix=f'choose another name, e.g. "{name}-2"',
            )
