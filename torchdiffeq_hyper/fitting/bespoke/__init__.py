"""Fitting the weights of a bespoke solver to a vector field."""

from torchdiffeq_hyper.fitting.bespoke._problem import BespokeProblem
from torchdiffeq_hyper.fitting.bespoke._session import run_bespoke

__all__ = ["BespokeProblem", "run_bespoke"]
