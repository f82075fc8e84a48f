"""Fitting the weights of a bespoke solver to a vector field."""

from torchdiffeq_hyper.fitting._bespoke import run_bespoke
from torchdiffeq_hyper.fitting.bespoke._problem import BespokeProblem

__all__ = ["BespokeProblem", "run_bespoke"]
