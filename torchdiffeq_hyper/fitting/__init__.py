"""Fitting a hypersolver's correction to a vector field."""

from torchdiffeq_hyper.fitting.config import FitConfig
from torchdiffeq_hyper.fitting.fit import fit

__all__ = ["FitConfig", "fit"]
