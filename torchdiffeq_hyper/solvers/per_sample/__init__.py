"""Dopri5 with step sizes of its own for every sample."""

from torchdiffeq_hyper.solvers.per_sample._method import PerSampleDopri5

__all__ = ["PerSampleDopri5"]
