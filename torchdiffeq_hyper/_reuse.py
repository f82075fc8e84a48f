"""Derivatives that func may write into again: it may answer in one buffer (``out=``).

A method of several stages keeps a derivative over later calls of func. If these write into
the same memory, all stages are the last one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchdiffeq_hyper.tableaus import Edge, StageCall


def share_memory(stages: Sequence[Tensor]) -> bool:
    """Return whether two derivatives lie in the same memory, as far as can be told.

    What autograd records and never changes in place needs no look: ``out=`` is refused there.
    """
    last = stages[-1]
    if torch.compiler.is_compiling() or (last.requires_grad and last._version == 0):  # noqa: SLF001
        return False
    try:
        return len({k.data_ptr() for k in stages}) < len(stages) and last.numel() > 0
    except RuntimeError:  # no memory to look at: vmap, fake tensors
        return False


def own(k: Tensor) -> Tensor:
    """Return a derivative in memory that func does not write into."""
    return k if k.requires_grad else k.clone()


def owning(call: StageCall) -> StageCall:
    """Return ``call`` with answers of their own memory."""

    def call_and_copy(t: Tensor, y: Tensor, edge: Edge = Edge.INSIDE, /) -> Tensor:
        return call(t, y, edge).clone()

    return call_and_copy
