"""The torchdiffeq host: methods for `odeint`, `odeint_adjoint` and `odeint_event`."""

from torchdiffeq_hyper.hosts.torchdiffeq._methods import (
    host,
    override,
    register_method,
    unregister_method,
)
from torchdiffeq_hyper.hosts.torchdiffeq._recording import odeint_with_errors, record

__all__ = [
    "host",
    "odeint_with_errors",
    "override",
    "record",
    "register_method",
    "unregister_method",
]
