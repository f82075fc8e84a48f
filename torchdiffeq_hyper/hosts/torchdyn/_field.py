"""The user's vector field as torchdyn would have called it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import Tensor, nn

from torchdiffeq_hyper._fields import can_restrict, look_through, restrict
from torchdiffeq_hyper._state import VectorField
from torchdiffeq_hyper.hosts.torchdyn import _upstream

Held: TypeAlias = tuple[nn.Module, str, Tensor | None]


def with_args(func: VectorField, args: Any) -> VectorField:
    """Return ``func`` of (t, y), called with ``args`` if it takes them.

    Args:
        func: called as ``func(t, y)`` or ``func(t, y, args=args)``.
        args: the ``args`` of torchdyn's `odeint`.
    """
    return Field(func, {"args": args}) if _upstream.takes_args(func, args) else func


def of_samples(func: VectorField, args: Any, batch: int) -> VectorField:
    """Return `with_args`, with the method ``restrict`` if it holds something of every sample.

    Args:
        func: see `with_args`.
        args: see `with_args`.
        batch: number of samples.
    """
    keywords = {"args": args} if _upstream.takes_args(func, args) else {}
    if can_restrict(func):
        return RestrictableField(func, keywords) if keywords else func
    held = _upstream.sample_state(func, batch)
    # Depth alone is told anew at every call.
    if any(value is not None for _, _, value in held):
        return HoldingField(func, keywords, held)
    return Field(func, keywords) if keywords else func


class Field:
    """A vector field called with fixed keywords.

    Args:
        func: called as ``func(t, y, **keywords)``.
        keywords: the keywords.
    """

    def __init__(self, func: VectorField, keywords: Mapping[str, Any]) -> None:
        self.base_func = func
        self._keywords = keywords

    def __call__(self, t: Tensor, y: Tensor) -> Any:
        return self.base_func(t, y, **self._keywords)


class RestrictableField(Field):
    """A `Field` whose func knows how to be restricted to some of the samples."""

    def restrict(self, index: Tensor) -> RestrictableField:
        """Return the field of the samples at ``index``."""
        return RestrictableField(restrict(self.base_func, index), self._keywords)


class HoldingField(Field):
    """A `Field` with layers that hold something of every sample.

    Args:
        func: see `Field`.
        keywords: see `Field`.
        held: layer, attribute, and its value: for each sample along dim 0, or None for an
            attribute that is only put back after a call.
    """

    def __init__(
        self, func: VectorField, keywords: Mapping[str, Any], held: Sequence[Held]
    ) -> None:
        super().__init__(func, keywords)
        self._held = held

    def __call__(self, t: Tensor, y: Tensor) -> Any:
        with _lent(self._held):
            return super().__call__(t, y)

    def restrict(self, index: Tensor) -> HoldingField:
        """Return the field of the samples at ``index``; func and its weights are shared."""
        part = [
            (module, name, None if value is None else value[index.to(value.device)])
            for module, name, value in self._held
        ]
        return HoldingField(self.base_func, self._keywords, part)


@contextmanager
def _lent(held: Sequence[Held]) -> Iterator[None]:
    """Let layers hold the given values inside the block, and what they held after it."""
    before = [getattr(module, name) for module, name, _ in held]
    try:
        for module, name, value in held:
            if value is not None:
                setattr(module, name, value)
        yield
    finally:
        for (module, name, _), value in zip(held, before, strict=True):
            setattr(module, name, value)


for _wrapper in (Field, RestrictableField, HoldingField):
    look_through(_wrapper, "base_func")
