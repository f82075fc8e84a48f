"""The torchdyn host: solvers for `NeuralODE` and `torchdyn.numerics.odeint`.

Imports nothing of torchdyn; it waits for the user's import.
"""

from torchdiffeq_hyper.hosts.torchdyn._methods import host

__all__ = ["host"]
