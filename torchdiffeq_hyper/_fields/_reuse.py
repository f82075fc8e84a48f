"""Derivatives that func may write into again: it may answer in one buffer (``out=``).

A method of several stages keeps a derivative over later calls of func. If these write into
the same memory, all stages are the last one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

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


@contextmanager
def attributes_as_found(func: object) -> Iterator[None]:
    """Undo what calls of func assign to attributes, e.g. ``self.nfe += 1``.

    Of func's modules, of the object of a bound method, and of func itself if it is a
    function or another callable. All assignments are undone together, so that a cached value
    and the size that it was made for stay a pair. What is changed in place stays changed.
    """
    before = [(owner, dict(vars(owner))) for owner in _owners_in(func)]
    try:
        yield
    finally:
        for owner, attributes in before:
            now: dict[str, Any] = vars(owner)
            for name in now.keys() - attributes.keys():
                del now[name]
            now.update(attributes)


def _owners_in(func: object) -> Iterator[object]:
    """Yield what calls of func may keep attributes on."""
    if isinstance(func, nn.Module):
        # torch's own modules count nothing, and some complete themselves at their first call.
        own = (part for part in func.modules() if not type(part).__module__.startswith("torch."))
        yield from own
    elif isinstance(func, MethodType):
        yield from _owners_in(func.__self__)
    elif isinstance(func, partial):
        for part in (func.func, *func.args, *func.keywords.values()):
            if callable(part):
                yield from _owners_in(part)
    elif not isinstance(func, type | ModuleType) and isinstance(
        getattr(func, "__dict__", None), dict
    ):
        yield func
