"""Adapters to the ODE libraries; nothing else knows their internals."""

from torchdiffeq_hyper.hosts._install import install, uninstall

__all__ = ["install", "uninstall"]
