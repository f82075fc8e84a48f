"""How the learning rate falls over a phase: half a cosine."""

from __future__ import annotations

import math

LOWEST_RATE = 0.01
"""What the learning rate is annealed to, as a share of its start."""


def annealed(share: float) -> float:
    """Return the share of the learning rate that is left after a share of a phase."""
    return LOWEST_RATE + (1 - LOWEST_RATE) * (1 + math.cos(math.pi * share)) / 2
