"""The torchdyn host: solvers for `NeuralODE` and `torchdyn.numerics.odeint`.

Imports nothing of torchdyn; it waits for the user's import.
"""

from torchdiffeq_hyper._fields import add_models, look_through_by
from torchdiffeq_hyper.hosts.torchdyn._field import NeuralODEField
from torchdiffeq_hyper.hosts.torchdyn._methods import host, load
from torchdiffeq_hyper.hosts.torchdyn._upstream import wrapped_field

__all__ = ["host", "load"]

add_models(NeuralODEField.of)
look_through_by(wrapped_field)
