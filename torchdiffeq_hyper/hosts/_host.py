"""A host: an ODE library whose dict of methods follows the registry; and warnings given once."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from torchdiffeq_hyper.errors import AdjointWarning
from torchdiffeq_hyper.methods import _registry


class Host(ABC):
    """Puts the registry's methods into a library's dict, and takes them out again.

    Each kind of method asks for its own way to be built: ``step_by_step`` along a time grid,
    ``all_at_once`` by its part, or ``ready_made`` as a solver class of torchdiffeq's own kind.
    """

    name: ClassVar[str]

    def __init__(self) -> None:
        self.added: dict[str, Any] = {}  # what of ours its dict holds now
        self.is_installed = False
        self._clashing: set[str] = set()
        _registry.listeners.append(self.follow)

    @abstractmethod
    def entries(self) -> dict[str, Any] | None:
        """Return the library's dict of methods; None while it is not imported."""

    def follow(self) -> None:
        """Make the dict hold what the registry holds, if installed; clashing names raise once."""
        entries = self.entries()
        if entries is None:
            return
        wanted = _registry.methods() if self.is_installed else {}
        for name in [name for name in self.added if name not in wanted]:
            del self.added[name]
            entries.pop(name, None)
        known, self._clashing = self._clashing, set()
        for name, method in wanted.items():
            built = None if name in self.added else method.build(self)
            if built is not None and name in entries:
                self._clashing.add(name)
            elif built is not None:
                entries[name] = self.added[name] = built
        for name in sorted(self._clashing - known):
            raise _registry.name_taken(wanted[name], self.name)


_warned: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


def warn_once(part: Any, what: str, text: str, category: type[Warning]) -> None:
    """Warn of ``what``, unless ``part`` has given that warning before."""
    # Equal parts are the same to a dictionary: their class stands for them.
    is_itself = getattr(type(part), "__hash__", None) is object.__hash__
    known = _warned.setdefault(part if is_itself else type(part), set())
    if what not in known:
        known.add(what)
        warnings.warn(text, category, stacklevel=2)


def warn_if_untrained(part: Any, what: str, adjoint: str, instead: str) -> None:
    """Warn, once a part, that an adjoint gives it no gradient, if it wants one."""
    if not isinstance(part, nn.Module) or torch.is_inference_mode_enabled():
        return
    if any(parameter.requires_grad for parameter in part.parameters()):
        text = (
            f"{adjoint} gives the parameters of the {what} no gradient, and they require one. "
            f"To train them use {instead}; otherwise {what}.requires_grad_(False)."
        )
        warn_once(part, adjoint, text, AdjointWarning)
