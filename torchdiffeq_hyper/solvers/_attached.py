"""Where an object's attachments are kept: on the object, so that they end with it.

A table would have to hold the solvers, and with them every field that its own solver holds
(its net may call the field): no weak dictionary sees that nothing else is left of the two.
As an entry of the object's ``__dict__`` the solver is an ordinary reference to the garbage
collector. The entry belongs to one object: a copy may carry it, and is not attached.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple

from torchdiffeq_hyper._fields import Owner

_NAME = "_torchdiffeq_hyper_attached"


class Attachment(NamedTuple):
    """A solver, and what it is attached as.

    Attributes:
        function: as in `Owner`.
        key: its method string, then what else tells it from others of the object.
        solver: the solver.
    """

    function: object | None
    key: tuple[Any, ...]
    solver: Any


class _Entry:
    """What is attached to one object. Pickles and deep copies hold None in its place."""

    __slots__ = ("attachments", "target")

    def __init__(self, target: object, attachments: tuple[Attachment, ...]) -> None:
        self.target = weakref.ref(target)
        self.attachments = attachments

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # nothing of this package's: a pickle may be read without it


# For objects without a dict of their own: by id, with what keeps that id theirs.
_elsewhere: dict[int, tuple[object, tuple[Attachment, ...]]] = {}
# Reentrant: the garbage collector may end an attachment while the lock is held.
_lock = threading.RLock()


def solvers(owner: Owner, method: str) -> list[Any]:
    """Return the solvers for ``method`` attached to ``owner``, the latest last."""
    return [
        item.solver
        for item in _read(owner.target)
        if item.function is owner.function and item.key[0] == method
    ]


def add(owner: Owner, key: tuple[Any, ...], solver: Any) -> None:
    """Attach a solver; it replaces the one of the same key."""
    with _lock:
        kept = [
            item
            for item in _read(owner.target)
            if item.function is not owner.function or item.key != key
        ]
        _write(owner.target, (*kept, Attachment(owner.function, key, solver)))


def remove(owner: Owner, method: str | None = None) -> bool:
    """Detach all solvers of a method, or all; return whether there was one."""
    with _lock:
        before = _read(owner.target)
        kept = tuple(
            item
            for item in before
            if item.function is not owner.function or (method is not None and item.key[0] != method)
        )
        if len(kept) == len(before):
            return False
        _write(owner.target, kept)
        return True


def _read(target: object) -> tuple[Attachment, ...]:
    entry = _entry_of(target, _dict_of(target))
    if entry is not None:
        return entry.attachments
    known = _elsewhere.get(id(target))
    return () if known is None else known[1]


def _write(target: object, items: tuple[Attachment, ...]) -> None:
    own = _dict_of(target)
    if own is not None and _is_free(own, target):
        if items:
            # Past `__setattr__`, which a class may have taken over.
            own[_NAME] = _Entry(target, items)
        else:
            own.pop(_NAME, None)
    elif items:
        _elsewhere[id(target)] = (_reference(target), items)
    else:
        _elsewhere.pop(id(target), None)


def _dict_of(target: object) -> dict[str, Any] | None:
    """Return where an object keeps its attributes; None where it has no such place."""
    try:
        found = object.__getattribute__(target, "__dict__")
        weakref.ref(target)
    except (AttributeError, TypeError):
        return None
    return found if isinstance(found, dict) else None  # a class gives a read-only view


def _entry_of(target: object, own: dict[str, Any] | None) -> _Entry | None:
    entry = None if own is None else own.get(_NAME)
    return entry if isinstance(entry, _Entry) and entry.target() is target else None


def _is_free(own: dict[str, Any], target: object) -> bool:
    """Return whether no other living object keeps its attachments in this very dict."""
    entry = own.get(_NAME)
    other = entry.target() if isinstance(entry, _Entry) else None
    # Shallow copies of a `functools.partial` share one dict.
    return other is None or other is target or _dict_of(other) is not own


def _reference(target: object) -> object:
    """Return what keeps an id valid for as long as its object lives."""
    key = id(target)
    try:
        return weakref.ref(target, lambda _: _elsewhere.pop(key, None))
    except TypeError:  # no weak references: hold the object, so that its id stays its own
        return target
