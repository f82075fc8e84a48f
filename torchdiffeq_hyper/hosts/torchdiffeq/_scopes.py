"""Which overrides are in force; every context has its own."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

_NONE: Mapping[str, Any] = MappingProxyType({})

overrides: contextvars.ContextVar[Mapping[str, Any]] = contextvars.ContextVar(
    "overrides", default=_NONE
)
"""The class that serves each overridden method."""


@contextmanager
def no_overrides() -> Iterator[None]:
    """Let the host's methods be its own inside the block."""
    token = overrides.set(_NONE)
    try:
        yield
    finally:
        overrides.reset(token)
