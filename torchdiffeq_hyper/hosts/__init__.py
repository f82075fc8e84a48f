"""Adapters to the ODE libraries; nothing else knows their internals."""

from __future__ import annotations

from torchdiffeq_hyper.hosts import torchdiffeq, torchdyn
from torchdiffeq_hyper.hosts._host import Host
from torchdiffeq_hyper.methods import _registry

__all__ = ["install", "uninstall"]

_HOSTS: tuple[Host, ...] = (torchdiffeq.host, torchdyn.host)


def install() -> None:
    """Add the registered methods to torchdiffeq and torchdyn; importing the package does this.

    Changes no existing name. torchdyn is not imported: its methods are added when somebody
    imports it, before or after this package.

    Raises:
        DuplicateMethodError: a host has got a method of the same name meanwhile.

    Example:
        >>> import torchdiffeq_hyper as tdh
        >>> tdh.install()
    """
    _set_installed(is_installed=True)


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
        for host in _HOSTS:
            host.is_installed = is_installed
            host.follow()
