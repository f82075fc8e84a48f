"""The torchdyn host: solvers for `NeuralODE` and `torchdyn.numerics.odeint`.

Imports nothing of torchdyn; it waits for the user's import.
"""

from torchdiffeq_hyper._fields import _wrappers
from torchdiffeq_hyper.hosts.torchdyn import _upstream
from torchdiffeq_hyper.hosts.torchdyn._methods import follow_registry, install, load, uninstall

__all__ = ["follow_registry", "install", "load", "uninstall"]

_wrappers.stand_for_field(_upstream.field_of)
_wrappers.look_through_by(_upstream.wrapped_field)
