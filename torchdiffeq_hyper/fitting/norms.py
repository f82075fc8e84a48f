"""2-norms of states, sample by sample."""

from __future__ import annotations

import torch
from torch import Tensor

from torchdiffeq_hyper._types import State


def sample_norms(states: State) -> Tensor:
    """Return the 2-norm over all but the first two dimensions, the parts taken together.

    Args:
        states: (n, batch, ...), or a tuple of such.

    Returns:
        (n, batch) norms.
    """
    parts = (states,) if isinstance(states, Tensor) else states
    columns = [part.reshape(*part.shape[:2], -1) for part in parts]
    joined = columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)
    norms: Tensor = torch.linalg.vector_norm(joined, dim=-1)
    return norms
