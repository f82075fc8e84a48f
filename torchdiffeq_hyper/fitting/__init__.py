"""Fitting learned solvers to a vector field."""

from torchdiffeq_hyper.fitting._config import FitConfig
from torchdiffeq_hyper.fitting._fit import fit

__all__ = ["FitConfig", "fit"]
