"""2-norms of states, sample by sample."""

from __future__ import annotations

import torch
from torch import Tensor

from torchdiffeq_hyper._types import State

FLOOR = 0.1
"""Smallest size of a state to divide its error by, as a share of the root mean square."""


def sample_norms(states: State, unit: float = 1.0) -> Tensor:
    """Return the 2-norm over all but the first two dimensions, the parts taken together.

    Args:
        states: (n, batch, ...), or a tuple of such.
        unit: what states are divided by first: squares of large ones would overflow.

    Returns:
        (n, batch) norms.
    """
    parts = (states,) if isinstance(states, Tensor) else states
    columns = [part.reshape(*part.shape[:2], -1) for part in parts]
    joined = columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)
    norms: Tensor = torch.linalg.vector_norm(joined if unit == 1 else joined / unit, dim=-1)
    return norms


def sample_sizes(states: State, unit: float = 1.0) -> Tensor:
    """Return the norms that relative errors are divided by, (n, batch).

    Where a state happens to be near zero, a tenth of the root mean square over all stands
    in for its norm.
    """
    norms = sample_norms(states, unit)
    floor = FLOOR * norms.square().mean().sqrt()
    return norms.clamp_min(floor).clamp_min(1e-30)
