"""Fitting under a Lightning `Trainer`: its loggers, callbacks, devices and DDP are the user's.

Needs ``pytorch_lightning`` or ``lightning``: ``pip install "torchdiffeq_hyper[lightning]"``.
The package itself does not import this module.
"""

from torchdiffeq_hyper.lightning._module import HyperSolverModule

__all__ = ["HyperSolverModule"]
