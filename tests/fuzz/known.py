"""Faults that are known and being mended: draws that meet them are left out.

Remove an entry when its fault is mended; the calls are then drawn again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fuzz.drawn import Draw


def _meets_half_times(drawn: Draw) -> bool:
    return drawn.t.dtype in (torch.float16, torch.bfloat16)


def _meets_scalar_promotion(drawn: Draw) -> bool:
    is_scalar = any(part.dim() == 0 for part in drawn.y0)
    return is_scalar and torch.promote_types(drawn.t.dtype, torch.float32) != (
        torch.float32 if drawn.is_half else drawn.real
    )


def _meets_first_time_of_bns(drawn: Draw) -> bool:
    return drawn.key[0] == "bns" and drawn.wants_gradient and drawn.domain_span is not None


KNOWN: dict[str, Callable[[Draw], bool]] = {
    "half-precision times": _meets_half_times,
    "a 0-d state and times of a wider dtype": _meets_scalar_promotion,
    "gradient of bns to the first time": _meets_first_time_of_bns,
    "samples that depend on each other": lambda drawn: (
        drawn.key[0] in ("dopri5_per_sample", "dise") and drawn.couples_samples
    ),
    "func that reuses its output buffer": lambda drawn: drawn.field_kind == "buffer",
    "blow-up with min_step": lambda drawn: "min_step" in drawn.options,
    "overflow in float16": lambda drawn: (
        drawn.dtype == torch.float16 and drawn.field_kind in ("strong", "burst")
    ),
}


def known_fault(drawn: Draw) -> str | None:
    """Return the name of a known fault that the call meets, or None."""
    return next((name for name, meets in KNOWN.items() if meets(drawn)), None)
