"""Puts the registry's methods among torchdyn's, whichever package is imported first."""

from __future__ import annotations

import importlib
import warnings
from functools import partial
from typing import Any

import torch

from torchdiffeq_hyper import _registry
from torchdiffeq_hyper.errors import (
    DuplicateMethodError,
    MissingExtraError,
    PluginWarning,
    explain,
)
from torchdiffeq_hyper.hosts.torchdyn import _patches, _upstream
from torchdiffeq_hyper.hosts.torchdyn._hook import ImportHook
from torchdiffeq_hyper.hosts.torchdyn._stepper import Stepper
from torchdiffeq_hyper.tableaus import Tableau

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
