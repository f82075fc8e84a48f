"""Faults that are known: draws that meet them are left out.

Remove an entry when its fault is mended; the calls are then drawn again.
"""

from __future__ import annotations

from collections.abc import Callable

from fuzz.drawn import Draw

KNOWN: dict[str, Callable[[Draw], bool]] = {
    "inf from the host's own methods in a dise": lambda drawn: (
        drawn.key[0] == "dise" and drawn.field_kind in ("burst", "strong")
    ),
}


def known_fault(drawn: Draw) -> str | None:
    """Return the name of a known fault that the call meets, or None."""
    return next((name for name, meets in KNOWN.items() if meets(drawn)), None)
