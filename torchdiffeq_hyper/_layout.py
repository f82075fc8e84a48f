"""A state as one flat tensor, the way the host integrates tuples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from torchdiffeq_hyper._types import State
from torchdiffeq_hyper.errors import StateTypeError, explain


@dataclass(frozen=True)
class StateLayout:
    """How a state lies in one tensor: as it is, or parts behind each other.

    Attributes:
        shapes: the parts' shapes for a tuple state, None for one tensor.
    """

    shapes: tuple[tuple[int, ...], ...] | None

    @classmethod
    def of(cls, y: State) -> StateLayout:
        """Return the layout of a state, after checking that it is one.

        Raises:
            StateTypeError: not a tensor or a tuple of tensors, or of integers.
        """
        if isinstance(y, Tensor):
            check_dtype(y.dtype)
            return _TENSOR
        parts: Sequence[object] = y if isinstance(y, tuple) else ()
        if not parts or not all(isinstance(part, Tensor) for part in parts):
            raise StateTypeError(
                explain(
                    f"y0 is a {type(y).__name__}.",
                    "a tensor, or a tuple of tensors.",
                    "y0 = torch.as_tensor(y0)" if not isinstance(y, list) else "y0 = tuple(y0)",
                )
            )
        shapes = []
        for part in parts:
            assert isinstance(part, Tensor)
            check_dtype(part.dtype, is_tuple=True)
            shapes.append(tuple(part.shape))
        return cls(tuple(shapes))

    def split(self, flat: Tensor) -> State:
        """Return the state lying in ``flat``; leading dimensions stay in front."""
        if self.shapes is None:
            return flat
        parts, start = [], 0
        for shape in self.shapes:
            end = start + prod(shape)
            parts.append(flat[..., start:end].reshape((*flat.shape[:-1], *shape)))
            start = end
        return tuple(parts)

    def join(self, y: State) -> Tensor:
        """Return the state as one tensor."""
        if isinstance(y, Tensor):
            return y
        return torch.cat([part.reshape(-1) for part in y])

    def bounds(self, part: int) -> tuple[int, int]:
        """Return where a part of a tuple state starts and ends in the flat tensor."""
        assert self.shapes is not None
        start = sum(prod(shape) for shape in self.shapes[:part])
        return start, start + prod(self.shapes[part])


_TENSOR = StateLayout(None)


def parts_of(y: State) -> tuple[Tensor, ...]:
    """Return the tensors of a state."""
    return y if isinstance(y, tuple) else (y,)


def how_to_batch(y0: State) -> str:
    """Return the fix for a state without samples along dim 0."""
    if isinstance(y0, Tensor):
        return "y0 = y0.unsqueeze(0)   # for a single sample"
    return (
        "y0 = tuple(part.unsqueeze(0) for part in y0)   # for a single sample\n"
        "part.expand(n_samples, *part.shape)            # for a part that all samples share"
    )


def check_dtype(dtype: torch.dtype, *, is_tuple: bool = False) -> None:
    """Refuse states of integers.

    Args:
        dtype: the state's, or that of a part.
        is_tuple: whether the state is a tuple.

    Raises:
        StateTypeError: the dtype is neither floating nor complex.
    """
    if not (dtype.is_floating_point or dtype.is_complex):
        raise StateTypeError(
            explain(
                f"y0 has dtype {dtype}: derivatives would be rounded to integers.",
                "a floating-point (or complex) state.",
                "y0 = tuple(part.float() for part in y0)" if is_tuple else "y0 = y0.float()",
            )
        )


def is_half(dtype: torch.dtype) -> bool:
    """Return whether a dtype has too few digits to add up steps in."""
    return dtype in (torch.float16, torch.bfloat16)
