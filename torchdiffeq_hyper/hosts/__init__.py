"""Adapters to the ODE libraries; nothing else knows their internals."""

from __future__ import annotations

import importlib

from torchdiffeq_hyper.errors import MissingExtraError, OptionError
from torchdiffeq_hyper.hosts.torchdiffeq._methods import host as _torchdiffeq
from torchdiffeq_hyper.hosts.torchdyn._methods import host as _torchdyn
from torchdiffeq_hyper.methods import _registry

__all__ = ["install", "uninstall"]


def install(host: str | None = None) -> None:
    """Add the registered methods to torchdiffeq and torchdyn; importing the package does this.

    Changes no existing name. torchdyn is not imported: its methods are added when somebody
    imports it, before or after this package.

    Args:
        host: "torchdyn" imports torchdyn now (it takes seconds), and reports a missing one.

    Raises:
        DuplicateMethodError: a host has got a method of the same name meanwhile.
        MissingExtraError: torchdyn was asked for and cannot be imported.
        OptionError: there is no such host.

    Example:
        >>> import torchdiffeq_hyper as tdh
        >>> tdh.install()
    """
    if host not in (None, _torchdiffeq.name, _torchdyn.name):
        raise OptionError(
            problem=f"host is {host!r}.",
            expected='"torchdiffeq", "torchdyn" or None.',
            fix='tdh.install("torchdyn")',
        )
    _set_installed(is_installed=True)
    if host == _torchdyn.name:
        try:
            importlib.import_module("torchdyn.numerics")
        except ImportError as error:
            raise MissingExtraError(
                problem=f"torchdyn cannot be imported: {error}.",
                expected="torchdyn and what it needs.",
                fix='pip install "torchdiffeq_hyper[torchdyn]"',
            ) from error


def uninstall() -> None:
    """Remove everything that `install` added: the hosts are as they were before the import.

    Example:
        >>> import torchdiffeq, torchdiffeq_hyper as tdh
        >>> tdh.uninstall()
        >>> tdh.install()
    """
    _set_installed(is_installed=False)


def _set_installed(*, is_installed: bool) -> None:
    with _registry.lock:
        for host in (_torchdiffeq, _torchdyn):
            host.is_installed = is_installed
            host.follow()
