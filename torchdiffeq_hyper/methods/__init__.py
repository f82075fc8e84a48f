"""Solver methods and how plugins add them: what an author of a plugin imports."""

from torchdiffeq_hyper.methods._method import WholeSolve
from torchdiffeq_hyper.methods._registry import Register, hookimpl

__all__ = ["Register", "WholeSolve", "hookimpl"]
