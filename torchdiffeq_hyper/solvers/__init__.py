"""Solvers of dy/dt = func(t, y): hypersolvers, bespoke solvers, per-sample dopri5."""
