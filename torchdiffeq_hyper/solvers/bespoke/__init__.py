"""Bespoke non-stationary solvers: n calls of func, every weight and time learned ([B])."""

from torchdiffeq_hyper.solvers.bespoke._dense import stage_times
from torchdiffeq_hyper.solvers.bespoke._solver import ORDER, BespokeSolver
from torchdiffeq_hyper.solvers.bespoke._weights import classical, compositions

__all__ = [
    "ORDER",
    "BespokeSolver",
    "classical",
    "compositions",
    "stage_times",
]
