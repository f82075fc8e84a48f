"""Bespoke non-stationary solvers: n calls of func over a span, every weight and time learned."""

from torchdiffeq_hyper.solvers.bespoke._solver import ORDER, BespokeSolver
from torchdiffeq_hyper.solvers.bespoke._weights import classical, compositions, stage_times

__all__ = ["ORDER", "BespokeSolver", "classical", "compositions", "stage_times"]
