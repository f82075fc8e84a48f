"""Stands in for torchdiffeq's methods while scopes, in any order, replace one or watch all."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from torchdiffeq_hyper.hosts.torchdiffeq._upstream import SOLVERS, HostCall, dopri5_solver
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.recording import assigned

NONE: Mapping[str, Callable[..., Any]] = MappingProxyType({})
# What a method name stands for, called as ``build(func=, y0=, rtol=, atol=, **options)``.
overrides = ContextVar("overrides", default=NONE)
# Called as ``watch(method, build, func=, y0=, rtol=, atol=, **options) -> solver``.
_watch: ContextVar[Callable[..., Any] | None] = ContextVar("watch", default=None)

_SERVED = "_torchdiffeq_hyper_served_backward"

_ALL = "all methods"
# Open scopes of the process by the method they patch: `SOLVERS` is one dict for all threads.
_scopes: Counter[str] = Counter()


class _Dispatcher:
    """Stands in `SOLVERS`; serves each context what its own scopes ask for."""

    def __init__(self, method: str, original: Any) -> None:
        self.method = method
        self.original = original

    def __call__(self, func: Any, **given: Any) -> Any:
        build = overrides.get().get(self.method, self.original)
        call = HostCall.of(func)
        if call.is_adjoint_backward and self.method in vars(call.carrier).get(_SERVED, ()):
            build = dopri5_solver
        watch = _watch.get()
        if watch is None:
            return build(func=func, **given)
        return watch(self.method, build, func=func, **given)

    def valid_callbacks(self) -> Any:
        return self.original.valid_callbacks()


def replaced(method: str, build: Callable[..., Any]) -> AbstractContextManager[None]:
    """Have ``method`` served by ``build`` in this context, inside the block."""
    return _scope(method, overrides, {**overrides.get(), method: build})


def watched(watch: Callable[..., Any]) -> AbstractContextManager[None]:
    """Have every method of this context built by ``watch``, inside the block."""
    return _scope(_ALL, _watch, watch)


@contextmanager
def _scope(method: str, variable: ContextVar[Any], value: Any) -> Iterator[None]:
    """Set a variable of the context and patch ``method`` inside the block."""
    _count(method, 1)
    try:
        with assigned(variable, value):
            yield
    finally:
        _count(method, -1)


def serve_backward(method: str, carrier: Any) -> None:
    """Have the backward solves of one `odeint_adjoint` call run the host's own dopri5.

    They may come after the scope has closed, or on another thread. So the method stays patched
    for as long as ``carrier``, which lives as long as the call's graph.
    """
    vars(carrier).setdefault(_SERVED, set()).add(method)
    _count(method, 1)
    weakref.finalize(carrier, _count, method, -1)


def unpatched(solver: Any) -> Any:
    """Return what `SOLVERS` holds when no scope is open."""
    return solver.original if isinstance(solver, _Dispatcher) else solver


def follow() -> None:
    """Bring `SOLVERS` in line with the open scopes (after methods have come or gone)."""
    with _registry.lock:
        for method, solver in list(SOLVERS.items()):
            if not (_scopes[_ALL] or _scopes[method]):
                SOLVERS[method] = unpatched(solver)
            elif not isinstance(solver, _Dispatcher):
                SOLVERS[method] = _Dispatcher(method, solver)


def _count(method: str, change: int) -> None:
    with _registry.lock:
        _scopes[method] += change
        follow()
