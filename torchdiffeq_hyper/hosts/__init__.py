"""Adapters to the ODE libraries; nothing else knows their internals."""

from __future__ import annotations

from torchdiffeq_hyper.errors import OptionError
from torchdiffeq_hyper.hosts import torchdiffeq, torchdyn
from torchdiffeq_hyper.hosts._host import Host
from torchdiffeq_hyper.methods import _registry

__all__ = ["install", "uninstall"]

_HOSTS: tuple[Host, ...] = (torchdiffeq.host, torchdyn.host)


def install(host: str | None = None) -> None:
    """Add the registered methods to torchdiffeq and torchdyn; importing the package does this.

    Changes no existing name. torchdyn is not imported: its methods are added when somebody
    imports it, before or after this package.

    Args:
        host: "torchdyn" also imports torchdyn now, which takes seconds.

    Raises:
        DuplicateMethodError: a host has got a method of the same name meanwhile.
        MissingExtraError: torchdyn was asked for and cannot be imported.
        OptionError: there is no such host.

    Example:
        >>> import torchdiffeq_hyper as tdh
        >>> tdh.install()
    """
    if host not in ("torchdiffeq", "torchdyn", None):
        raise OptionError(
            problem=f"host is {host!r}.",
            expected='"torchdiffeq", "torchdyn" or None.',
            fix='tdh.install("torchdyn")',
        )
    _set_installed(is_installed=True)
    if host == "torchdyn":
        torchdyn.load()


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


for _known in _HOSTS:
    _registry.on_change(_known.follow)
