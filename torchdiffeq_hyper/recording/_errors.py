"""What can go wrong with the gradient of a record."""

from __future__ import annotations

from torchdiffeq_hyper.errors import HyperError


class NothingRecordedError(HyperError, ValueError):
    """A penalty was asked of a record that holds nothing to make it of."""


class FreedGraphError(HyperError, RuntimeError):
    """The gradient of a record was asked for after backward had freed its graph."""


class AdjointGradientError(HyperError, RuntimeError):
    """The gradient of a record was asked for after `odeint_adjoint`, which keeps no graph."""
