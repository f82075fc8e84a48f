"""Solver methods and how plugins add them: what an author of a plugin imports."""

from torchdiffeq_hyper.methods._hookspecs import Register, hookimpl
from torchdiffeq_hyper.methods._method import WholeSolve

__all__ = ["Register", "WholeSolve", "hookimpl"]
