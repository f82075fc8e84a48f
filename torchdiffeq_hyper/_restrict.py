"""Vector fields that hold something of every sample, restricted to some of the samples.

A solver that works on part of a batch must tell such a field which part. The protocol is
one method: ``func.restrict(index)`` returns the field of the samples at the positions
``index`` (1-D, in the order asked for); `tdh.Conditioned` has it ready.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor

from torchdiffeq_hyper._types import VectorField

SHAPE_CLASHES = (RuntimeError, ValueError, IndexError, TypeError)
"""What torch raises where shapes do not go together, e.g. in a func of the whole batch only."""

HOW_TO_RESTRICT = (
    "tdh.Conditioned(func, noise)   # calls func(t, y, noise), with the rows of its samples\n"
    "or give func's class the method restrict(self, index) -> func of these samples"
)


def restrict(func: VectorField, index: Tensor) -> VectorField:
    """Return the field of the samples at ``index``; ``func`` itself if it holds nothing of them.

    Args:
        func: with a method ``restrict`` (or a bound method of an object that has one) if
            it holds something of every sample.
        index: positions along the batch, 1-D.
    """
    method = _method_of(func)
    if method is None:
        return func
    if isinstance(func, MethodType) and getattr(func, "restrict", None) is None:
        restricted: VectorField = getattr(method(index), func.__name__)
        return restricted
    found: VectorField = method(index)
    return found


def can_restrict(func: VectorField) -> bool:
    """Return whether ``func`` has the method ``restrict``."""
    return _method_of(func) is not None


def _method_of(func: Any) -> Callable[[Tensor], Any] | None:
    owner = func.__self__ if isinstance(func, MethodType) else func
    method = getattr(owner, "restrict", None)
    return method if callable(method) else None
