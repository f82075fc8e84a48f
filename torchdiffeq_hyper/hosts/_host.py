"""A host: an ODE library whose dict of methods follows the registry; and warnings given once."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from torchdiffeq_hyper.errors import AdjointWarning, DuplicateMethodError
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.methods._method import ReadyMethod, SteppingMethod, WholeMethod


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
    def step_by_step(self, method: SteppingMethod) -> Any:
        """Return what the dict holds for a method that follows a time grid."""

    @abstractmethod
    def all_at_once(self, method: WholeMethod) -> Any:
        """Return what it holds for a method whose part solves the whole problem."""

    @abstractmethod
    def ready_made(self, method: ReadyMethod) -> Any:
        """Return what it holds for a solver class of torchdiffeq's kind; None where it cannot."""

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
            built = None if name in self.added else method.build(self)
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


_warned: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


def warn_once(part: Any, what: str, text: str, category: type[Warning]) -> None:
    """Warn of ``what``, unless ``part`` has given that warning before."""
    # Equal parts are the same to a dictionary: their class stands for them.
    is_itself = getattr(type(part), "__hash__", None) is object.__hash__
    known = _warned.setdefault(part if is_itself else type(part), set())
    if what not in known:
        known.add(what)
        warnings.warn(text, category, stacklevel=2)


_UNTRAINED = {
    "hypernet": "odeint_adjoint gives the hypernet no gradient, and its parameters require one. "
    "To train it use odeint; otherwise hypernet.requires_grad_(False).",
    "solver": "odeint_adjoint gives the solver no gradient, and its parameters require one. "
    "To train it use odeint; otherwise solver.requires_grad_(False).",
    "torchdyn": "torchdyn's adjoint sensitivities give a solver's own parameters (the "
    "hypernet's) no gradient, and they require one. To train them use "
    'sensitivity="autograd"; otherwise solver.requires_grad_(False).',
}


def warn_if_untrained(part: Any, which: str) -> None:
    """Warn, once a part, that an adjoint gives it no gradient, if it wants one."""
    if not isinstance(part, nn.Module) or torch.is_inference_mode_enabled():
        return
    if any(parameter.requires_grad for parameter in part.parameters()):
        warn_once(part, which, _UNTRAINED[which], AdjointWarning)
