"""States as samples along dim 0: counted, taken apart, put together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchdiffeq_hyper._layout import parts_of
from torchdiffeq_hyper._per_sample._rows import RowLayout
from torchdiffeq_hyper._types import State


def count(y0: State) -> int:
    """Return the number of samples in a state.

    Raises:
        StateTypeError: not a state.
        StateShapeError: no batch dimension, or parts with different numbers of samples.
    """
    RowLayout.of(y0)
    return len(parts_of(y0)[0])


def take(y: State, index: Tensor, dim: int = 0) -> State:
    """Return the samples at some positions."""
    if isinstance(y, Tensor):
        return y.index_select(dim, index)
    return tuple(part.index_select(dim, index) for part in y)


def concatenate(solutions: Sequence[State]) -> State:
    """Return solutions (times, samples, ...) as one, samples behind each other."""
    if isinstance(solutions[0], Tensor):
        return torch.cat([parts_of(solution)[0] for solution in solutions], dim=1)
    return tuple(torch.cat(group, dim=1) for group in zip(*map(parts_of, solutions), strict=True))


def cast(y: State, dtype: torch.dtype) -> State:
    """Return a state in another dtype."""
    return y.to(dtype) if isinstance(y, Tensor) else tuple(part.to(dtype) for part in y)


def last(solution: State) -> State:
    """Return the state at the last point of a solution."""
    return solution[-1] if isinstance(solution, Tensor) else tuple(part[-1] for part in solution)


def are_finite(solution: State) -> Tensor:
    """Return for each sample of a solution whether it holds no inf and no nan."""
    flags = [
        torch.isfinite(part).transpose(0, 1).flatten(1).all(dim=1) for part in parts_of(solution)
    ]
    return torch.stack(flags).all(dim=0)
