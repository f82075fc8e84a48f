"""Bespoke non-stationary solvers: n calls of func, every weight and time learned ([B])."""

from torchdiffeq_hyper.bespoke._classical import classical, compositions
from torchdiffeq_hyper.bespoke._dense import stage_times
from torchdiffeq_hyper.bespoke._solver import ORDER, BespokeSolver

__all__ = [
    "ORDER",
    "BespokeSolver",
    "classical",
    "compositions",
    "stage_times",
]
