"""The torchdiffeq host: methods for `odeint`, `odeint_adjoint` and `odeint_event`."""

from torchdiffeq_hyper.hosts.torchdiffeq._methods import (
    follow_registry,
    install,
    override,
    register_method,
    reserve_host_names,
    uninstall,
    unregister_method,
)
from torchdiffeq_hyper.hosts.torchdiffeq._recording import odeint_with_errors, record

__all__ = [
    "follow_registry",
    "install",
    "odeint_with_errors",
    "override",
    "record",
    "register_method",
    "reserve_host_names",
    "uninstall",
    "unregister_method",
]
