"""The units in which a fit computes: time in spans, states in their own size.

In these, tolerances, noise and losses are numbers of order one whatever units func is
written in, and no power of a step size leaves the range of float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

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

Fingerprint: TypeAlias = dict[str, Any]


@torch.no_grad()
def fingerprint(points: Sequence[Tensor], dtype: torch.dtype) -> list[Fingerprint | None]:
    """Return what tells values, computed in ``dtype``, from others: sizes and projections.

    The projections are relative to the sizes, so that they overflow for no unit. What is not
    finite gives None.

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
    return [_fingerprint_of(value, directions, torch.finfo(dtype).eps) for value in values]


def _as_numbers(value: Tensor) -> Tensor:
    """Return all numbers in a tensor, float64, on the CPU."""
    real = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
    return real.detach().cpu().double().flatten()


def _fingerprint_of(value: Tensor, directions: Sequence[Tensor], eps: float) -> Fingerprint | None:
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

    The first may be anything that was read from a file, the second is of `fingerprint`.
    """
    assert isinstance(second, list)
    if not isinstance(first, list) or len(first) != len(second):
        return 0
    largest = max((one["size"] for one in second if one is not None), default=0.0)
    pairs = enumerate(zip(first, second, strict=True))
    return next((n for n, (one, other) in pairs if not _agree(one, other, largest)), None)


def _agree(one: Any, other: Fingerprint | None, largest: float) -> bool:
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


DRIVEN = 1e-2
"""Share of the way that the first derivative would go over the span, below which starts count as
zero: the size of their solutions comes from func."""


@dataclass(frozen=True)
class Units:
    """What dimensionless time and states are multiplied by.

    Attributes:
        start: the time at dimensionless time 0.
        time: length of the span, above 0; dimensionless time has the sign of true time.
        state: size of the states, above 0.
    """

    start: float = 0.0
    time: float = 1.0
    state: float = 1.0

    @classmethod
    def of(cls, span: tuple[float, float], y0: Tensor, f0: Tensor) -> Units:
        """Return the units of a problem with flat starts ``y0`` and derivatives ``f0`` there."""
        width = abs(span[1] - span[0])
        size = max(size_of(y0), DRIVEN * width * size_of(f0))
        return cls(span[0], width, size if 0 < size < math.inf else 1.0)

    def times(self, t: Tensor) -> Tensor:
        """Return true times as dimensionless ones."""
        return (t - self.start) / self.time

    def time_of(self, t: float) -> float:
        """Return one true time as a dimensionless one."""
        return (t - self.start) / self.time

    def residual(self, order: int) -> float:
        """Return the unit of the residuals of a base of some order: state / time^(p+1)."""
        # One factor at a time: the power itself may leave the range of numbers.
        unit = self.state
        for _ in range(order + 1):
            unit /= self.time
        return unit
