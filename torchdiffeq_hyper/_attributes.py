"""What calls of func assign to attributes is undone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType, ModuleType
from typing import Any

from torch import nn


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
