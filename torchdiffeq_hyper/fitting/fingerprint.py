"""What tells a field from another: its values at a few points, projected on fixed directions.

A norm does not tell a rotation from its inverse. Projections on random directions do: two
fields agree in all of them only if they agree, up to a chance that falls with their number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

N_DIRECTIONS = 4
SEED = 2020
SLACK = 1e-4
"""By which a field may differ relative to its size: sums depend on the number of threads."""
ROUNDINGS = 64
"""Roundings, relative to the largest size of all points, that a value may differ by as well:
where terms cancel, little else is left of it."""
HALF_SLACK = 4
"""Roundings that a field in half precision may differ by."""

Print = dict[str, Any]


@torch.no_grad()
def fingerprint(points: Sequence[Tensor], dtype: torch.dtype) -> list[Print | None]:
    """Return what tells values from others: their sizes, and projections relative to these.

    In units of the values' own size, so that it overflows for no unit. Global random
    state is not touched. What is not finite gives None.

    Args:
        points: values of one shape, real or complex.
        dtype: what they were computed in.

    Example:
        >>> import torch
        >>> (one,) = fingerprint([torch.ones(100)], torch.float32)
        >>> one["size"], len(one["projections"])
        (1.0, 4)
    """
    values = [_as_numbers(point) for point in points]
    count = values[0].numel()
    generator = torch.Generator().manual_seed(SEED)
    directions = [
        torch.randn(count, generator=generator, dtype=torch.float64) for _ in range(N_DIRECTIONS)
    ]
    return [_print(value, directions, torch.finfo(dtype).eps) for value in values]


def _as_numbers(value: Tensor) -> Tensor:
    """Return all numbers in a tensor, float64, on the CPU."""
    real = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
    return real.detach().cpu().double().flatten()


def _print(value: Tensor, directions: Sequence[Tensor], eps: float) -> Print | None:
    if not bool(torch.isfinite(value).all()):
        return None
    size = size_of(value)
    relative = value / size if size > 0 else value
    # Of the order of one, whatever the number of values.
    projections = [float(relative @ d) / math.sqrt(max(1, len(value))) for d in directions]
    return {"size": size, "projections": projections, "eps": eps}


def size_of(value: Tensor) -> float:
    """Return the root mean square, without overflow or underflow on the way."""
    wide = value.detach().cpu().abs().double().flatten()
    largest = float(wide.max()) if wide.numel() else 0.0
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * float((wide / largest).square().mean().sqrt())


def differing(first: object, second: object) -> int | None:
    """Return the first point at which two fingerprints differ, None if at none.

    Args:
        first: what was read from a file, whatever it is.
        second: what `fingerprint` returned.
    """
    assert isinstance(second, list)
    if not isinstance(first, list) or len(first) != len(second):
        return 0
    largest = max((one["size"] for one in second if one is not None), default=0.0)
    for position, (one, other) in enumerate(zip(first, second, strict=True)):
        if not _agree(one, other, largest):
            return position
    return None


def _agree(one: Any, other: Print | None, largest: float) -> bool:
    if one is None or other is None:
        return one is other
    try:
        sizes = float(one["size"]), float(other["size"])
        pairs = list(zip(one["projections"], other["projections"], strict=True))
        size, eps = max(sizes), float(other["eps"])
        slack = max(SLACK, HALF_SLACK * eps) * size + ROUNDINGS * eps * largest
        differences = [abs(a * sizes[0] - b * sizes[1]) for a, b in pairs]
        return all(found <= slack for found in [abs(sizes[0] - sizes[1]), *differences])
    except (KeyError, TypeError, ValueError):
        return False
