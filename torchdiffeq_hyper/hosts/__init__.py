"""Adapters to the ODE libraries; nothing else knows their internals."""
