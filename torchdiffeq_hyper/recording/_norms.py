"""Per-sample L2 norms of states, part by part, and all parts together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchdiffeq_hyper._layout import StateLayout
from torchdiffeq_hyper._types import State
from torchdiffeq_hyper.errors import OptionError, StateShapeError, explain


def part_norms(layout: StateLayout, flat: Tensor) -> tuple[Tensor, ...]:
    """Return each part's norms over its non-batch dimensions, (batch,); 0-d parts give (1,)."""
    state = layout.split(flat)
    parts = (state,) if isinstance(state, Tensor) else state
    return tuple(
        torch.linalg.vector_norm(_rows(part), dim=-1) if part.numel() else _no_norms(part)
        for part in parts
    )


def _rows(part: Tensor) -> Tensor:
    return part.reshape(len(part) if part.dim() else 1, -1)


def _no_norms(part: Tensor) -> Tensor:
    return part.abs().new_zeros(len(part))


def batch_size(y: State) -> int:
    """Return the number of samples: the length that all parts with dimensions share, else 1."""
    parts = (y,) if isinstance(y, Tensor) else y
    sizes = {len(part) for part in parts if part.dim()}
    return sizes.pop() if len(sizes) == 1 else 1


def select(norms: Sequence[Tensor], layout: StateLayout, part: int | None) -> Tensor:
    """Return one part's norms, or those of all parts that have a batch dimension.

    Args:
        norms: per part, (..., batch of the part).
        layout: the state's parts.
        part: index of a part of a tuple state; None for all.

    Raises:
        OptionError: there is no such part.
        StateShapeError: all parts are asked for and their batches differ.
    """
    if part is not None:
        return norms[_check_part(part, layout)]
    if layout.shapes is None:
        return norms[0]
    with_batch = [n for n, shape in zip(norms, layout.shapes, strict=True) if shape] or list(norms)
    if len({n.shape for n in with_batch}) > 1:
        raise StateShapeError(
            explain(
                f"the state's parts have shapes {list(layout.shapes)}: they share no batch.",
                "parts with one leading batch dimension, or the choice of one part.",
                "rec.error_penalty(part=0)   # or solve.steps.error_of(0)",
            )
        )
    joint: Tensor = torch.linalg.vector_norm(torch.stack(with_batch, -1), dim=-1)
    return joint


def _check_part(part: int, layout: StateLayout) -> int:
    n_parts = 0 if layout.shapes is None else len(layout.shapes)
    if isinstance(part, bool) or not isinstance(part, int) or not 0 <= part < n_parts:
        raise OptionError(
            explain(
                f"part is {part!r}.",
                f"None, or an index of one of the state's {n_parts} parts."
                if n_parts
                else "None: the state is one tensor.",
                "part=0" if n_parts else "part=None",
            )
        )
    return part
