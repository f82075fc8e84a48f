"""A state as one row a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from torchdiffeq_hyper._state import State, StateLayout, how_to_batch, parts_of
from torchdiffeq_hyper.errors import StateShapeError, StateTypeError, explain

Tolerance: TypeAlias = float | Tensor | Sequence[float | Tensor]
"""A number, a tensor that broadcasts against y0, or for tuple states one of these a part."""


@dataclass(frozen=True)
class RowLayout:
    """How the samples of a state lie in a matrix of shape (samples, numbers of a sample).

    Attributes:
        shapes: each part's shape without its batch dimension.
        is_tuple: whether the state is a tuple.
    """

    shapes: tuple[tuple[int, ...], ...]
    is_tuple: bool

    @classmethod
    def of(cls, y: State) -> RowLayout:
        """Return the layout of a state, after checking that it has samples along dim 0.

        Raises:
            StateTypeError: not a state.
            StateShapeError: a part has no batch dimension, or another number of samples.
        """
        StateLayout.of(y)
        parts = parts_of(y)
        sizes = {part.shape[0] if part.dim() else None for part in parts}
        if len(sizes) != 1 or None in sizes:
            raise StateShapeError(
                explain(
                    "y0 has shape" + "s" * (len(parts) > 1) + " "
                    f"{', '.join(str(tuple(part.shape)) for part in parts)}.",
                    "the samples along dim 0, as many in every part.",
                    how_to_batch(y),
                )
            )
        return cls(tuple(tuple(part.shape[1:]) for part in parts), isinstance(y, tuple))

    @property
    def widths(self) -> list[int]:
        """Numbers of a sample in each part."""
        return [prod(shape) for shape in self.shapes]

    def join(self, y: State) -> Tensor:
        """Return the matrix of a state."""
        if isinstance(y, Tensor):
            return y.reshape(len(y), -1) if y.numel() else y.reshape(len(y), self.widths[0])
        return torch.cat([p.reshape(len(p), w) for p, w in zip(y, self.widths, strict=True)], 1)

    def split(self, rows: Tensor) -> State:
        """Return the state in a matrix; more dimensions in front of its last stay there."""
        front = rows.shape[:-1]
        if not self.is_tuple:
            return rows.reshape(*front, *self.shapes[0])
        parts = rows.split(self.widths, dim=-1)
        return tuple(p.reshape(*front, *s) for p, s in zip(parts, self.shapes, strict=True))

    def norm(self, rows: Tensor) -> Tensor:
        """Return each row's root mean square, of a tuple state its parts' largest."""
        parts = rows.split(self.widths, dim=1) if self.is_tuple else (rows,)
        norms = [part.abs().pow(2).mean(dim=1).sqrt() for part in parts if part.shape[1]]
        return norms[0] if len(norms) == 1 else torch.stack(norms).amax(dim=0)

    def tolerance(self, name: str, given: Tolerance, rows: Tensor) -> Tensor:
        """Return a tolerance as a 0-d tensor or as a matrix like ``rows``, in float64.

        Raises:
            StateTypeError: a tuple of tolerances for a state that is one tensor.
            StateShapeError: not as many tolerances as parts, or not of a part's shape.
        """
        if isinstance(given, float | int) or (isinstance(given, Tensor) and given.dim() == 0):
            return torch.as_tensor(given, dtype=torch.float64, device=rows.device)
        tolerances = [given] if isinstance(given, Tensor) else list(given)
        if len(tolerances) != len(self.shapes):
            error = StateShapeError if self.is_tuple else StateTypeError
            raise error(
                explain(
                    f"{name} has {len(tolerances)} entries.",
                    f"one a part: {len(self.shapes)}." if self.is_tuple else "one number.",
                    f"{name}=1e-3",
                )
            )
        parts = []
        for tolerance, shape, width in zip(tolerances, self.shapes, self.widths, strict=True):
            # As the host does: a number in a tuple is rounded to the default dtype first.
            part = torch.as_tensor(tolerance).to(rows.device, torch.float64)
            full = (len(rows), *shape)
            try:
                parts.append(part.expand(full).reshape(len(rows), width))
            except RuntimeError as problem:
                raise StateShapeError(
                    explain(
                        f"{name} has shape {tuple(part.shape)}.",
                        f"a number, or a shape that broadcasts to y0's {full}.",
                        f"{name}=1e-3",
                    )
                ) from problem
        return torch.cat(parts, dim=1)
